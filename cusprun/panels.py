"""What pictures show, as plain numbers: lines over an axis, values with intervals, and shares of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

JOINED, BARRED, OUTLINE, POINTS, MUTED = "joined", "barred", "outline", "points", "muted"
"""How a line looks: a curve; one with error bars; stairs behind points; points; ones nobody should choose."""


@dataclass(frozen=True)
class Line:
    """One curve; ``low`` and ``high`` shade its interval, ``reference`` lines are thin and dotted.

    ``look`` is one of ``JOINED``, ``BARRED``, ``OUTLINE``, ``POINTS`` and ``MUTED``; ``texts`` stand beside
    its points. The intervals of all looks but ``JOINED`` are bars.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    reference: bool = False
    look: str = JOINED
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One diagram of lines; ``limits`` bound its vertical axis, ``logarithmic`` scales it.

    ``ticks`` are labels of the horizontal axis at 0, 1, 2 and so on, where its values are names.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    limits: tuple[float, float] | None = None
    logarithmic: bool = False
    dots: bool = False
    ticks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark:
    """One row of a forest: a value with its interval, filled where ``shown``, else hollow."""

    label: str
    value: float
    low: float
    high: float
    shown: bool = True


@dataclass(frozen=True)
class Forest:
    """Values with intervals one below the other, against the value ``reference``."""

    title: str
    x_label: str
    marks: tuple[Mark, ...]
    reference: float = 1.0
    logarithmic: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Heat:
    """Shares from 0 to 1, a row for each layer, the first at the top; ``row_labels`` name the rows.

    The columns are ``columns`` units wide together, as the horizontal axis counts them.
    """

    title: str
    x_label: str
    y_label: str
    scale_label: str
    values: tuple[tuple[float, ...], ...]
    columns: int
    row_labels: tuple[str, ...] = ()


AnyPanel: TypeAlias = Panel | Forest | Heat
