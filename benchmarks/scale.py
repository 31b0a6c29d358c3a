"""`make bench-scale`: memory, time and survival at the sizes where they matter.

Each table is made alone by ``--only TABLE``, one row of it by ``--only TABLE/ROW``, several by names between
commas; see the modules for what they hold. Finished rows are kept. ``--scratch FOLDER`` keeps models and
outputs between runs: the table ``memory`` takes some 45 GB there. Writes ``scale.json`` and ``scale.md`` into
``benchmarks/results``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import scale_dtype
import scale_estimate
import scale_kills
import scale_linear
import scale_memory
import scale_plans
import scale_processes
import scale_walk
from measuring import Ledger, Options, Row, machine_text, run
from scale_parts import require_tables


@dataclass(frozen=True)
class Part:
    """One table: its heading, what fills it, and what renders it."""

    title: str
    fill: Callable[[Options, Ledger], None]
    to_markdown: Callable[[Row], str]


PARTS: Mapping[str, Part] = {
    module.TABLE: Part(title, module.fill, module.to_markdown)
    for title, module in (
        ("Memory", scale_memory),
        ("The walk against a plain forward pass", scale_walk),
        ("Products in bfloat16", scale_dtype),
        ("Growth", scale_linear),
        ("Several processes", scale_processes),
        ("Kills", scale_kills),
        ("Estimates", scale_estimate),
    )
}


def make(options: Options, ledger: Ledger) -> str:
    """Make the rows that are asked for and return all tables."""
    require_tables(options.only, PARTS)
    for part in PARTS.values():
        part.fill(options, ledger)
    return to_markdown(ledger)


def to_markdown(ledger: Ledger) -> str:
    """Render the tables that have rows."""
    made = [name for name in PARTS if ledger.tables.get(name, {}).get("rows")]
    rows = [row for name in made for row in ledger.tables[name]["rows"].values()]
    tables = [f"**{PARTS[name].title}**\n\n{PARTS[name].to_markdown(ledger.tables[name])}" for name in made]
    tables += [f"**Plans**\n\n{scale_plans.to_markdown(row)}" for row in _wide_rows(ledger)]
    return "\n".join([*tables, f"{machine_text(rows)} Made by `{ledger.content['command']}`.\n"])


def _wide_rows(ledger: Ledger) -> list[Row]:
    """Return the row, if it is there, that plans for other models are computed from."""
    rows = ledger.tables.get(scale_walk.TABLE, {}).get("rows", {}).values()
    return [row for row in rows if row["model"] == scale_walk.WIDE]


if __name__ == "__main__":
    run("scale", __doc__ or "", make, needs_data=False)
