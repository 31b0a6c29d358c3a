"""Which of several points nobody should choose: pure mathematics over axes that know what noise explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cusprun.quality.report import CONFIDENCE


class Axis(Protocol):
    """What a point has on one axis."""

    def is_beyond(self, other: Any) -> bool:
        """Whether this is better than the same axis of another point by more than noise explains."""
        ...


@dataclass(frozen=True)
class Measured:
    """A value with its interval; less is better. An exact one is its own interval."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Measured:
        """Return a value that was counted, not measured."""
        return cls(value, value, value)

    @classmethod
    def more_is_better(cls, value: float, low: float, high: float) -> Measured:
        """Turn round an axis on which more is better."""
        return cls(-value, -high, -low)

    def is_beyond(self, other: Measured) -> bool:
        """Whether this is less, and the intervals, with the values in them, do not touch."""
        return max(self.value, self.high) < min(other.value, other.low)


@dataclass(frozen=True, eq=False)
class Resampled:
    """A mean over documents, float64 ``[1 + resamples]``: over all, then over each draw; less is better.

    Two points are compared on the same draws, so that what makes documents hard for both does not count.
    """

    means: NDArray[np.float64]

    def is_beyond(self, other: Resampled) -> bool:
        """Whether the difference, and the interval of the differences draw by draw, is below zero."""
        apart = self.means - other.means
        high = np.quantile(apart[1:], (1 + CONFIDENCE) / 2)
        return bool(max(apart[0], high) < 0)


@dataclass(frozen=True)
class Candidate:
    """A point by its name; ``group`` says what it may be compared with: only its own kind."""

    name: str
    axes: tuple[Axis, ...]
    group: str = ""


def dominates(one: Candidate, other: Candidate) -> bool:
    """Whether ``other`` is better than ``one`` on no axis and worse on one, both by more than noise explains.

    What noise can explain is never the reason. No two points dominate each other.
    """
    if one.group != other.group or len(one.axes) != len(other.axes):
        return False
    pairs = list(zip(one.axes, other.axes, strict=True))
    return any(mine.is_beyond(theirs) for mine, theirs in pairs) and not any(
        theirs.is_beyond(mine) for mine, theirs in pairs
    )


def dominators(candidates: Sequence[Candidate]) -> dict[str, str | None]:
    """Return for each name the name of an undominated point that dominates it, or None.

    A point counts as dominated where one that is itself undominated dominates it: that one can be chosen
    instead. So a dominated point judges nobody, and some point is always left. Since what noise explains
    passes for equal, points can dominate one another in a ring: they stay, and so does what they alone
    dominate. Of several judges the first in the order given is named. Names are distinct.
    """
    above = {
        point.name: [other.name for other in candidates if dominates(other, point)] for point in candidates
    }
    kept: set[str] = set()
    dominated: set[str] = set()
    open_ones = set(above)
    while free := {name for name in open_ones if dominated.issuperset(above[name])}:
        kept |= free
        dominated |= {name for name in open_ones - free if not kept.isdisjoint(above[name])}
        open_ones -= kept | dominated
    return {name: next((other for other in judges if other in kept), None) for name, judges in above.items()}
