"""What the tables of the benchmark of scale share: which rows are asked for, and how numbers are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from measuring import Job, Options

DEMO_EXPERT = Path(__file__).parent / "demo" / "expert.yaml"
RATIO = 0.25


def asked_for(options: Options, table: str) -> bool:
    """Return whether rows of a table are asked for; ``--only`` names a table, or TABLE/ROW."""
    return options.only is None or options.only.partition("/")[0] == table


def wanted(options: Options) -> Callable[[Job], bool]:
    """Return which jobs of a table are asked for: those whose label begins with the row's name."""
    row = (options.only or "").partition("/")[2]
    return lambda job: not row or str(next(iter(job.label.values()))) == row


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
