"""Reading ``RECIPE.yaml``: the whole way from a model to a measured expert, as one file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cusprun.corpus.yaml_tree import Section, Value, read_yaml
from cusprun.errors import UserError, nearest
from cusprun.paths import expand_home
from cusprun.pipeline.stages import DEFAULT_RATIO


@dataclass(frozen=True)
class ExportSpec:
    """One artifact: its format and precision."""

    to: str
    quant: str


@dataclass(frozen=True)
class BenchSpec:
    """What is measured (the export of this precision) and how; see ``serve.bench.records.BenchOptions``."""

    quant: str
    num_prompt_tokens: int
    num_decode_tokens: int
    num_pairs: int
    time_limit_s: float


@dataclass(frozen=True)
class Recipe:
    """A recipe as it is run; ``expert`` and ``out`` are absolute, ``bench`` is None when nothing is measured.

    ``model`` is a path, a hub id or ``package:NAME``.
    """

    model: str
    expert: str
    out: str
    ratio: float
    rule: str
    targets: tuple[str, ...]
    refit: bool
    exports: tuple[ExportSpec, ...]
    verify: bool
    evaluate: bool
    bench: BenchSpec | None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; paths in it are relative to its folder.

    Raises:
        ConfigError: the file is missing or has faults; all of them, each with file and line.
    """
    from cusprun.pruning.rules import DEFAULT_RULE, RULES

    root = read_yaml(path)
    folder = path.absolute().parent
    model = root.require("model", str, "", _not_blank)
    expert = root.require("expert", str, "", _not_blank)
    out = root.require("out", str, "", _not_blank)
    exports = tuple(_export(item) for item in root.items("exports")) or (ExportSpec("gguf", "f16"),)
    recipe = Recipe(
        model=str(folder / model) if (folder / model).exists() else model,
        expert=str(folder / expand_home(expert)),
        out=str((folder / expand_home(out)).resolve()),
        ratio=root.take("ratio", float, DEFAULT_RATIO, _ratio),
        rule=root.take("rule", str, DEFAULT_RULE, lambda name: _known(name, RULES, "rule")),
        targets=tuple(_target(item) for item in root.items("targets")),
        refit=root.take("refit", bool, True),
        exports=exports,
        verify=root.take("verify", bool, True),
        evaluate=root.take("eval", bool, True),
        bench=_bench(root, exports),
    )
    root.finish()
    return recipe


def _not_blank(value: str) -> str:
    return "" if value.strip() else "must not be blank"


def _ratio(value: float) -> str:
    from cusprun.pruning.planner import MAX_RATIO

    return "" if 0 < value <= MAX_RATIO else f"must be above 0 and at most {MAX_RATIO}, not {value:g}"


def _known(name: str, names: Iterable[str], what: str) -> str:
    known = sorted(names)
    if name in known:
        return ""
    hint = nearest(name, known) or f" (known: {', '.join(known)})"
    return f"is the unknown {what} {name!r}{hint}"


def _target(item: Value) -> str:
    from cusprun.pruning.targets import parse_targets

    def check(text: str) -> str:
        try:
            parse_targets((text,))
        except UserError as error:
            return f"is not valid: {error}"
        return ""

    return item.scalar(str, "", check)


def _export(item: Value) -> ExportSpec:
    from exporters.registry import FORMATS

    section = item.section()
    to = section.take("to", str, "gguf", lambda name: _known(name, FORMATS, "format"))
    quant = section.require(
        "quant", str, "f16", lambda name: _known(name, FORMATS[to].quants, f"{to} precision")
    )
    return ExportSpec(to, quant)


def _bench(root: Section, exports: tuple[ExportSpec, ...]) -> BenchSpec | None:
    """Read ``bench``: true, false, or a mapping of options."""
    from serve.bench.records import BenchOptions

    value = root.value("bench")
    default = BenchOptions()
    ggufs = [export.quant for export in exports if export.to == "gguf"]
    first = ggufs[0] if ggufs else ""
    if not ggufs and value is not None:
        value.fault("'bench' measures a gguf file, and 'exports' names none")
    if value is not None and value.is_mapping:
        section = value.section()
        return BenchSpec(
            quant=section.take(
                "quant", str, first, lambda name: _known(name, ggufs, "precision of 'exports'")
            ),
            num_prompt_tokens=section.take("num_prompt_tokens", int, default.num_prompt_tokens, _positive),
            num_decode_tokens=section.take("num_decode_tokens", int, default.num_decode_tokens, _positive),
            num_pairs=section.take("num_pairs", int, default.num_pairs, _positive),
            time_limit_s=section.take("time_limit_s", float, default.time_limit_s, _positive),
        )
    if not root.take("bench", bool, bool(ggufs)):
        return None
    return BenchSpec(
        first, default.num_prompt_tokens, default.num_decode_tokens, default.num_pairs, default.time_limit_s
    )


def _positive(value: float) -> str:
    return "" if value > 0 else f"must be above 0, not {value:g}"
