"""Which of several points nobody should choose: pure mathematics over axes with intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """What a point has on one axis, with its interval; less is better. An exact value is its own interval."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Axis:
        """Return a value that was counted, not measured."""
        return cls(value, value, value)

    @classmethod
    def more_is_better(cls, value: float, low: float, high: float) -> Axis:
        """Turn round an axis on which more is better."""
        return cls(-value, -high, -low)

    def is_beyond(self, other: Axis) -> bool:
        """Whether this is better and the intervals, with the values in them, do not touch."""
        return max(self.value, self.high) < min(other.value, other.low)


@dataclass(frozen=True)
class Candidate:
    """A point by its name; ``group`` says what it may be compared with: only its own kind."""

    name: str
    axes: tuple[Axis, ...]
    group: str = ""


def dominates(one: Candidate, other: Candidate) -> bool:
    """Whether ``one`` is at least as good on every axis, and better beyond the intervals on one of them.

    "At least as good" compares the values, "beyond the intervals" asks that they do not touch: what noise
    can explain is never the reason, and what an interval is too wide to tell is not taken for equal.
    """
    return (
        one.group == other.group
        and len(one.axes) == len(other.axes)
        and all(mine.value <= theirs.value for mine, theirs in zip(one.axes, other.axes, strict=True))
        and any(mine.is_beyond(theirs) for mine, theirs in zip(one.axes, other.axes, strict=True))
    )


def dominators(candidates: Iterable[Candidate]) -> dict[str, str | None]:
    """Return for each name the name of an undominated point that dominates it, or None.

    A point counts as dominated only where a point that is itself undominated dominates it. This names a
    point that one may choose instead, never leaves all dominated, and makes no point's verdict depend on a
    dominated one (with intervals, domination alone is not transitive). Of several the one that is best on
    the first axis is named. Names are distinct.
    """
    # What dominates has no greater value anywhere and a smaller one somewhere, so it comes before in the
    # order of the values: every point meets its judges decided.
    ordered = sorted(candidates, key=lambda point: (tuple(axis.value for axis in point.axes), point.name))
    undominated: list[Candidate] = []
    found: dict[str, str | None] = {}
    for point in ordered:
        judge = next((other for other in undominated if dominates(other, point)), None)
        found[point.name] = None if judge is None else judge.name
        if judge is None:
            undominated.append(point)
    return found
