"""Options that several commands share, and reading them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from cusprun.errors import UserError

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder, hub id, GGUF file or package:NAME.", show_default=False),
]
ExpertFile = Annotated[
    Path, typer.Option("--expert", help="EXPERT.yaml: what the model is to be good at.", show_default=False)
]
OptionalExpertFile = Annotated[
    Path | None,
    typer.Option("--expert", help="Prove on the held-out documents of this expert.", show_default=False),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        help="What it is to run in, like gguf:q8_0 or vllm:tp2; repeat or separate by commas.",
        show_default=False,
    ),
]
RuleName = Annotated[
    str | None,
    typer.Option(
        "--rule",
        help="How impacts become a choice: surgeon (default), mean, paper, quantile:0.9, union, "
        "variance+bias, magnitude or random.",
        show_default=False,
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="Share of the decoder blocks' attention and FFN parameters that goes, above 0 and at most 0.9. "
        "Default 0.25, unless another budget is given.",
        show_default=False,
    ),
]
TargetParams = Annotated[
    str | None, typer.Option(help="Budget: most parameters of the expert, like 100M.", show_default=False)
]
TargetBytes = Annotated[
    str | None,
    typer.Option(
        help="Budget: most bytes of its file in the one gguf target of --for, like 80MB.", show_default=False
    ),
]
Units = Annotated[
    list[str] | None,
    typer.Option(
        help="Kinds that may go: ffn_channel, query_head, kv_group (these three unless given) and block; "
        "repeat or separate by commas.",
        show_default=False,
    ),
]
Refit = Annotated[
    bool,
    typer.Option(
        "--refit/--no-refit",
        help="Make good for what goes: least squares, or biases with the rule variance+bias.",
    ),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        metavar="DIMENSION=NUMBER",
        help="How much the documents of a dimension count in the refit, like language=0.3 (default 1); "
        "repeat for others.",
        show_default=False,
    ),
]
RefitTarget = Annotated[
    str | None,
    typer.Option(
        help="What the refit aims at: output, what a projection gave (the default); residual, the original's "
        "stream behind it; auto, the better of both on calibration documents set apart.",
        show_default=False,
    ),
]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where models run: cpu, cuda, cuda:N, or auto (CUDA where it works, else the CPU).",
    ),
]
DtypeName = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="What linear layers multiply in while a model is scored and refit: float32, or bfloat16, which "
        "is faster where the device has it and rounds to 8 bits.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory that the work may take, like 4GB; batches and what lies in files are chosen to fit it.",
        show_default=False,
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--workdir",
        metavar="DIR",
        help="Folder for hidden states and unfinished work, from which the same command goes on after a "
        "crash; the cache unless given.",
        show_default=False,
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        help="Processes of this machine that share the documents, with --device cuda one for each GPU.",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the whole report to this file.", show_default=False)
]


def split_list(values: Iterable[str] | None) -> tuple[str, ...]:
    """Return the entries of a repeatable option that may also hold comma lists."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """Return whole numbers written with commas between them; raises ``UserError`` for anything else."""
    parts = split_list([text])
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{option} must be whole numbers like 128,512, not {text!r}")
    return tuple(int(part) for part in parts)


def parse_size(text: str | None) -> int | None:
    """Return the bytes of a size like ``5GB`` or ``800M``; raises ``UserError`` for anything else."""
    from cusprun.pruning.budget_text import parse_size as parse

    return None if text is None else parse(text)


def parse_count(text: str | None) -> int | None:
    """Return a number of parameters like ``100M``; raises ``UserError`` for anything else."""
    from cusprun.pruning.budget_text import parse_count as parse

    return None if text is None else parse(text)


def parse_share(text: str | None) -> float | None:
    """Return a share like ``5%`` or ``0.05``; raises ``UserError`` for anything else."""
    from cusprun.pruning.budget_text import parse_share as parse

    return None if text is None else parse(text)


def parse_weights(texts: Iterable[str] | None) -> dict[str, float]:
    """Return the weights of dimensions from texts like ``language=0.3``.

    Raises:
        UserError: a text has another form, or names a dimension twice.
    """
    weights: dict[str, float] = {}
    for text in split_list(texts):
        name, equals, number = (part.strip() for part in text.partition("="))
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise UserError(f"the weight {text!r} is not of the form DIMENSION=NUMBER, like language=0.3")
        if name in weights:
            raise UserError(f"the dimension {name!r} has two weights; give it one")
        weights[name] = weight
    return weights


def write_json(record: object, path: Path | None) -> None:
    """Write a report to a file that does not exist; ``None`` writes nothing."""
    if path is None:
        return
    from cusprun.checkpoint.output import atomic_file
    from cusprun.codec import json_bytes

    with atomic_file(path) as partial:
        partial.write_bytes(json_bytes(record))


def refuse_existing_json(path: Path | None) -> None:
    """Refuse a report file that exists before the work that would fill it."""
    if path is not None:
        from cusprun.checkpoint.output import refuse_existing

        refuse_existing(path)


def refuse_same(*outputs: Path | None) -> None:
    """Refuse to write two outputs to one file; ``None`` is not written."""
    from cusprun.paths import expand_home

    places = [expand_home(path).resolve() for path in outputs if path is not None]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is named for two outputs; give each its own file")


def print_json(record: object) -> None:
    """Print a record as JSON on standard output."""
    import json
    import sys

    from cusprun.codec import to_plain

    # Escapes lose nothing where the stream would write a question mark.
    text_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo(json.dumps(to_plain(record), ensure_ascii=text_only, indent=2, allow_nan=False))
