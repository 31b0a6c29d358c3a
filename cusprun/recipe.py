"""Reading ``RECIPE.yaml``: the whole way from a model to a measured expert, as one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cusprun.corpus.yaml_tree import Section, Value, read_yaml
from cusprun.errors import UserError, nearest
from cusprun.paths import expand_home
from cusprun.pipeline.samples import DEFAULT_SAMPLES, MAX_SAMPLES
from cusprun.pipeline.wishes import BUDGETS, DEFAULT_RATIO, PruneWishes
from cusprun.records import DIMENSIONS, REFIT_TARGETS, UNITS
from cusprun.walk.device import DEFAULT_DEVICE, DEFAULT_DTYPE, check_device, check_dtype

if TYPE_CHECKING:
    from exporters.registry import Format
    from serve.bench.records import BenchOptions

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class ExportSpec:
    """One artifact: its format, precision, and the format's options that are not the default."""

    to: str
    quant: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class BenchSpec:
    """What is measured: exports, as format and precision, and how."""

    exports: tuple[tuple[str, str], ...]
    options: BenchOptions


@dataclass(frozen=True)
class Recipe:
    """A recipe as it is run; ``expert`` and ``out`` are absolute, ``bench`` is None when nothing is measured.

    ``wishes`` say how to prune. ``model`` is a path, a hub id or ``package:NAME``; ``device`` is to run it,
    and ``dtype`` what its linear layers multiply in while it is scored and refit.
    ``samples`` held-out prompts are answered by original and expert, for the report.
    """

    model: str
    expert: str
    out: str
    wishes: PruneWishes
    exports: tuple[ExportSpec, ...]
    verify: bool
    evaluate: bool
    bench: BenchSpec | None
    device: str = DEFAULT_DEVICE
    dtype: str = DEFAULT_DTYPE
    samples: int = DEFAULT_SAMPLES


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; paths in it are relative to its folder.

    Raises:
        ConfigError: the file is missing or has faults; all of them, each with file and line.
    """
    root = read_yaml(path)
    folder = path.absolute().parent
    model = root.require("model", str, "", _not_blank)
    expert = root.require("expert", str, "", _not_blank)
    out = root.require("out", str, "", _not_blank)
    exports = _exports(root)
    recipe = Recipe(
        model=str(folder / model) if (folder / model).exists() else model,
        expert=str(folder / expand_home(expert)),
        out=str((folder / expand_home(out)).resolve()),
        wishes=_wishes(root),
        exports=exports,
        verify=root.take("verify", bool, True),
        evaluate=root.take("eval", bool, True),
        bench=_bench(root, exports),
        device=root.take("device", str, DEFAULT_DEVICE, _valid(check_device)),
        dtype=root.take("dtype", str, DEFAULT_DTYPE, _valid(check_dtype)),
        samples=root.take("samples", int, DEFAULT_SAMPLES, _sample_count),
    )
    root.finish()
    return recipe


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says beside its model and paths, as its file would; defaults are left out."""
    from cusprun.pruning.rules import DEFAULT_RULE

    wishes, bench = recipe.wishes, recipe.bench
    said: dict[str, tuple[Any, Any]] = {
        **{name: (getattr(wishes, name), None) for name in BUDGETS},
        "rule": (wishes.rule, DEFAULT_RULE),
        "targets": ([*wishes.targets], []),
        "units": ([*wishes.units], []),
        "refit": (wishes.refit, True),
        "weights": (dict(wishes.dimension_weights), {}),
        "refit_target": (wishes.refit_target, None),
        "exports": ([_export_tree(spec) for spec in recipe.exports], []),
        "verify": (recipe.verify, True),
        "eval": (recipe.evaluate, True),
        "bench": (False if bench is None else _bench_tree(bench), {}),
        "device": (recipe.device, DEFAULT_DEVICE),
        "dtype": (recipe.dtype, DEFAULT_DTYPE),
        "samples": (recipe.samples, DEFAULT_SAMPLES),
    }
    return {name: value for name, (value, default) in said.items() if value != default}


def _export_tree(spec: ExportSpec) -> dict[str, Any]:
    options = {name: [*value] if isinstance(value, tuple) else value for name, value in spec.options}
    return {"to": spec.to, "quant": spec.quant, **({"options": options} if options else {})}


def _bench_tree(spec: BenchSpec) -> dict[str, Any]:
    from serve.bench.records import BenchOptions

    usual = vars(BenchOptions())
    changed = {name: value for name, value in vars(spec.options).items() if value != usual[name]}
    options = {name: [*value] if isinstance(value, tuple) else value for name, value in changed.items()}
    return {"exports": [f"{to}:{quant}" for to, quant in spec.exports], **options}


def _sample_count(value: int) -> str:
    return "" if 0 <= value <= MAX_SAMPLES else f"must be from 0 to {MAX_SAMPLES}, not {value}"


def _not_blank(value: str) -> str:
    return "" if value.strip() else "must not be blank"


def _wishes(root: Section) -> PruneWishes:
    """Read what is asked of the pruning; every fault is noted."""
    from cusprun.pruning.budget_text import parse_count, parse_share, parse_size
    from cusprun.pruning.rules import DEFAULT_RULE, check_rule
    from cusprun.pruning.targets import parse_targets

    given = [name for name in BUDGETS if root.has(name)]
    if len(given) > 1:
        root.fault(given[1], f"only one budget may be given, not {' and '.join(given)}")
    weights = root.section("weights")
    refit = root.take("refit", bool, True)
    wishes = PruneWishes(
        ratio=root.take("ratio", float, None if given else DEFAULT_RATIO, _ratio),
        rule=root.take("rule", str, DEFAULT_RULE, _valid(check_rule)),
        targets=tuple(
            item.scalar(str, "", _valid(lambda text: parse_targets((text,))))
            for item in root.items("targets")
        ),
        units=tuple(
            item.scalar(str, "", lambda name: _known(name, UNITS, "kind of unit"))
            for item in root.items("units")
        ),
        target_params=_amount(root, "target_params", int, parse_count),
        target_bytes=_amount(root, "target_bytes", int, parse_size),
        max_loss=_amount(root, "max_loss", float, parse_share),
        refit=refit,
        dimension_weights={
            name: weights.take(name, float, 1.0, _not_negative)
            for name in DIMENSIONS
            if weights is not None and weights.has(name)
        },
        refit_target=root.take(
            "refit_target", str, None, lambda name: _known(name, REFIT_TARGETS, "refit target")
        ),
    )
    if wishes.target_bytes is not None:
        wrong = _valid(lambda _text: wishes.gguf_target())("")
        if wrong:
            root.fault("target_bytes", f"'target_bytes' {wrong}")
    if wishes.dimension_weights and not refit:
        root.fault("weights", "'weights' weigh the refit, and 'refit' is false")
    if wishes.refit_target is not None and not refit:
        root.fault("refit_target", "'refit_target' is what the refit aims at, and 'refit' is false")
    return wishes


def _amount(root: Section, key: str, kind: type[N], parse: Callable[[str], N]) -> N | None:
    """Return a positive number, or one written like ``100M``, ``80MB`` or ``5%``."""
    value = root.value(key)
    if value is None:
        return None
    if not value.is_text:
        return value.scalar(kind, None, _positive)
    text = value.scalar(str, "", _valid(parse))
    try:
        return parse(text) if text else None
    except UserError:
        return None  # noted above


def _valid(check: Callable[[str], object]) -> Callable[[str], str]:
    """Turn a function that raises ``UserError`` into one that says what is wrong."""

    def wrong(text: str) -> str:
        try:
            check(text)
        except UserError as error:
            return f"is not valid: {error}"
        return ""

    return wrong


def _ratio(value: float) -> str:
    from cusprun.pruning.budget import MAX_RATIO

    return "" if 0 < value <= MAX_RATIO else f"must be above 0 and at most {MAX_RATIO}, not {value:g}"


def _not_negative(value: float) -> str:
    return "" if 0 <= value < math.inf else f"must be 0 or above, not {value:g}"


def _known(name: str, names: Iterable[str], what: str) -> str:
    known = sorted(names)
    if name in known:
        return ""
    hint = nearest(name, known) or f" (known: {', '.join(known)})"
    return f"is the unknown {what} {name!r}{hint}"


def _exports(root: Section) -> tuple[ExportSpec, ...]:
    """Read ``exports``; two entries that would write the same output are a fault."""
    items = root.items("exports")
    specs = tuple(_export(item) for item in items) or (ExportSpec("gguf", "f16"),)
    for number, spec in enumerate(specs):
        if (spec.to, spec.quant) in [(other.to, other.quant) for other in specs[:number]]:
            items[number].fault(f"{spec.to} in {spec.quant} is asked for twice; remove one")
    return specs


def _export(item: Value) -> ExportSpec:
    from exporters.registry import FORMATS

    section = item.section()
    to = section.take("to", str, "gguf", lambda name: _known(name, FORMATS, "format"))
    chosen = FORMATS.get(to, FORMATS["gguf"])
    quant = section.take(
        "quant", str, chosen.default_quant, lambda name: _known(name, chosen.quants, f"{to} precision")
    )
    options = section.section("options")
    return ExportSpec(to, quant, () if options is None else tuple(_options(options, chosen)))


def _options(section: Section, chosen: Format) -> Iterator[tuple[str, Any]]:
    """Read the fields of a format's ``Options`` that are given, each as the type of its default."""
    for field in chosen.option_fields():
        if not section.has(field.name):
            continue
        if isinstance(field.default, tuple):
            yield field.name, tuple(item.scalar(str, "") for item in section.items(field.name))
        else:
            kind = int if field.default is None else type(field.default)
            yield field.name, section.take(field.name, kind, field.default)


def _bench(root: Section, exports: tuple[ExportSpec, ...]) -> BenchSpec | None:
    """Read ``bench``: true, false, or a mapping of options.

    Without ``exports`` the first one is measured that does not want a server started for each run.
    """
    from serve.bench.records import BenchOptions

    value = root.value("bench")
    known = {f"{export.to}:{export.quant}": (export.to, export.quant) for export in exports}
    first = tuple(export for export in known.values() if export[0] != "vllm")[:1]
    if value is None or not value.is_mapping:
        return BenchSpec(first, BenchOptions()) if root.take("bench", bool, True) and first else None
    section, default = value.section(), BenchOptions()
    named = [
        item.scalar(str, "", lambda name: _known(name, known, "one of 'exports'"))
        for item in section.items("exports")
    ]
    options = BenchOptions(
        prompt_lengths=_counts(section, "prompt_lengths", default.prompt_lengths),
        context_depths=_counts(section, "context_depths", default.context_depths),
        num_decode_tokens=section.take("num_decode_tokens", int, default.num_decode_tokens, _positive),
        num_pairs=section.take("num_pairs", int, None, _positive),
        precision=section.take("precision", float, default.precision, _positive),
        time_limit_s=section.take("time_limit_s", float, None, _positive),
    )
    chosen = tuple(known[name] for name in named if name in known) or first
    if not chosen:
        value.fault("'bench' must name what to measure: exports: [FORMAT:PRECISION]")
    return BenchSpec(chosen, options)


def _counts(section: Section, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Read a list of numbers of tokens."""
    found = tuple(item.scalar(int, 1, _positive) for item in section.items(key))
    if len(set(found)) != len(found):
        section.fault(key, f"{key!r} names a number twice")
    return found or default


def _positive(value: float) -> str:
    return "" if 0 < value < math.inf else f"must be above 0, not {value:g}"
