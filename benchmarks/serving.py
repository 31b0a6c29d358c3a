"""`make bench-serve DATA=FOLDER`: what serving costs, on SmolLM2-135M-Instruct.

Four tables, each of which ``--only NAME`` makes alone: ``onnx`` (cusprun's ONNX server against a loop over
onnxruntime-genai), ``gguf`` (cusprun serve against llama-cpp-python's server, under the load of vLLM's
generator), ``soak`` (many clients on every engine), and ``draft`` (the maths expert as the draft of its
original). Finished rows are kept. Writes ``benchmarks/results/serve.json`` and ``serve.md``. The file is not
named after them, since a module ``serve`` beside a script would hide the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import serve_draft
import serve_gguf
import serve_onnx
import serve_soak
from experts import SMOLLM2
from measuring import Ledger, Options, Row, run
from serve_target import Subject

from cusprun.errors import require_known


@dataclass(frozen=True)
class Part:
    """One table: what fills it, and what renders it."""

    fill: Callable[[Subject, Options, Ledger], None]
    to_markdown: Callable[[Row], str]


PARTS: Mapping[str, Part] = {
    module.TABLE: Part(module.fill, module.to_markdown)
    for module in (serve_onnx, serve_gguf, serve_soak, serve_draft)
}


def make(options: Options, ledger: Ledger) -> str:
    """Make all rows and return the tables."""
    if options.only is not None:
        require_known(options.only, PARTS, "table")
    subject = Subject.of(SMOLLM2.source, options.scratch)
    for name, part in PARTS.items():
        if options.only in (None, name):
            part.fill(subject, options, ledger)
    return to_markdown(ledger)


def to_markdown(ledger: Ledger) -> str:
    """Render the tables that have rows."""
    made = [name for name in PARTS if ledger.tables.get(name, {}).get("rows")]
    rows = [row for name in made for row in ledger.tables[name]["rows"].values()]
    tables = [PARTS[name].to_markdown(ledger.tables[name]) for name in made]
    return "\n".join([*tables, f"{_machine_text(rows)} Made by `{ledger.content['command']}`.\n"])


def _machine_text(rows: list[Row]) -> str:
    machines = ", ".join(
        sorted({f"{row['machine']['cores']} cores of {row['machine']['cpu']}" for row in rows})
    )
    engines = {f"{name} {version}" for row in rows for name, version in row["engines"].items()}
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{len(rows)} rows, {minutes:.0f} minutes on {machines}, with {', '.join(sorted(engines))}."


if __name__ == "__main__":
    run("serve", __doc__ or "", make)
