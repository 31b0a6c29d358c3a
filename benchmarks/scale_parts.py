"""What the tables of the benchmark of scale share: which rows are asked for, and how numbers are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from measuring import Job, Options

from cusprun.errors import require_known

DEMO_EXPERT = Path(__file__).parent / "demo" / "expert.yaml"
RATIO = 0.25


def asked_for(options: Options, table: str) -> bool:
    """Return whether rows of a table are asked for; ``--only`` names tables, or TABLE/ROW, between commas."""
    return options.only is None or any(name == table for name, _ in _asked(options.only))


def wanted(options: Options, table: str) -> Callable[[Job], bool]:
    """Return which jobs of a table are asked for: those whose label begins with the row's name."""
    rows = {row for name, row in _asked(options.only or table) if name == table}
    return lambda job: "" in rows or str(next(iter(job.label.values()))) in rows


def require_tables(only: str | None, tables: Iterable[str]) -> None:
    """Raise ``UserError`` when ``--only`` names a table that is not known."""
    if only is not None:
        for name, _ in _asked(only):
            require_known(name, tables, "table")


def _asked(only: str) -> list[tuple[str, str]]:
    """Return each table with the row of it that is asked for, which is empty for all of them."""
    return [(name, row) for name, _, row in (part.strip().partition("/") for part in only.split(","))]


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of log seconds over log sizes, by least squares."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - mean_x) ** 2 for x in xs
    )


def gigabytes(num_bytes: float) -> str:
    """Show bytes in gigabytes of 10^9."""
    return f"{num_bytes / 1e9:,.2f}"


def minutes(seconds: float) -> str:
    """Show a duration in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def verdict(is_met: bool) -> str:
    """Say whether a target is met."""
    return "met" if is_met else "missed"
