"""``prune --estimate``: what pruning will take, as a table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.cli.console import duration, shown_progress, stdout
from cusprun.cli.options import refuse_existing_json, write_json
from cusprun.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cusprun.pipeline.estimate import Estimate
    from cusprun.walk.ranks import Ranks


def refuse_unknowable(options: Mapping[str, object]) -> None:
    """Refuse options, by name, that no estimate can be made with; those that are None were not given."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(
            "an estimate is for scoring and pruning by a ratio or to a number of parameters; leave out "
            f"{' and '.join(given)}"
        )


def refuse_several(ranks: Ranks) -> None:
    """Refuse to estimate in several processes, which would time one another."""
    if ranks.size > 1:
        raise UserError(f"an estimate is the work of one process, and there are {ranks.size}; start one")


def show_estimate(model: str, expert: Any, *, json: Path | None, **options: Any) -> None:
    """Make and print an estimate; ``options`` are those of :func:`cusprun.estimate`."""
    from cusprun.pipeline.estimate import estimate

    refuse_existing_json(json)
    start = _seconds_since_start()
    made = estimate(model, expert, start_seconds=start, **options, progress=shown_progress())
    write_json(made, json)
    console = stdout()
    for table in estimate_tables(made):
        console.print(table)


def _seconds_since_start() -> float:
    """Return how long this process has run: the command that is estimated starts as slowly."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def estimate_tables(made: Estimate) -> Iterator[RenderableType]:
    """Lay out an estimate."""
    from rich.text import Text

    from cusprun.cli.tables import make_table
    from serve.bench.table import format_bytes

    rows = [
        (stage.name, duration(stage.seconds), format_bytes(stage.memory_bytes) if stage.memory_bytes else "–")
        for stage in made.stages
    ]
    rows.append(("all", duration(made.seconds), format_bytes(made.memory_bytes)))
    yield make_table(
        f"Estimate: {made.model} for {made.expert} on {made.device}", ("stage", "time", "memory"), rows
    )
    disk = made.disk
    parts = (
        ("expert", disk.expert_bytes),
        ("scores", disk.scores_bytes),
        ("while scoring", disk.score_work_bytes),
        ("while refitting", disk.refit_work_bytes),
        ("refit weights, until all is done", disk.refit_weights_bytes),
        ("while measuring", disk.measure_work_bytes),
        ("most at one time", made.disk_bytes),
    )
    yield make_table(None, ("disk", "size"), ((name, format_bytes(size)) for name, size in parts))
    yield Text(
        f"From {made.measured_blocks} of {made.blocks} blocks and {made.measured_tokens:,} of "
        f"{made.tokens:,} tokens in {made.documents:,} documents, tried for "
        f"{duration(made.measured_seconds)}. Memory is what no file stands behind."
    )
