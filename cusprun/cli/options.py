"""Options that several commands share, and reading them."""

from __future__ import annotations

import re
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
    str | None, typer.Option("--rule", help="How impacts become a choice: mean (default) or paper.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the whole report to this file.", show_default=False)
]

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kmg]?)b?", re.IGNORECASE)
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def split_list(values: Iterable[str] | None) -> tuple[str, ...]:
    """Return the entries of a repeatable option that may also hold comma lists."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())


def parse_size(text: str | None) -> int | None:
    """Return the bytes of a size like ``5GB`` or ``800M``; raises ``UserError`` for anything else."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if not match or not float(match[1]):
        raise UserError(f"the size {text!r} is not a number with MB or GB; write for example 5GB")
    return int(float(match[1]) * _FACTORS[match[2].lower()])


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


def print_json(record: object) -> None:
    """Print a record as JSON on standard output."""
    import json

    from cusprun.codec import to_plain

    typer.echo(json.dumps(to_plain(record), ensure_ascii=False, indent=2, allow_nan=False))
