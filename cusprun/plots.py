"""Curves as a picture: a record of panels and lines in, a PNG or SVG file out, without a display.

matplotlib is the extra ``plot``; it is imported here alone, and through its objects rather than ``pyplot``,
so that nothing is kept between two pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.errors import MissingDependencyError, UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
COMMAND = "pip install 'cusprun[plot]'"

_STYLES = ("-", "--", "-.")
_COLOURS = 10
"""Colours of matplotlib's own cycle; with the styles, thirty lines can be told apart."""

JOINED, OUTLINE, POINTS, MUTED = "joined", "outline", "points", "muted"
"""How a line looks: a curve; stairs behind points; points alone; points that nobody should choose."""

_LOOKS: Mapping[str, Mapping[str, Any]] = {
    JOINED: {},
    OUTLINE: {"color": "0.5", "linewidth": 1.0, "marker": ""},
    POINTS: {"color": "C0", "linestyle": "", "marker": "o"},
    MUTED: {"color": "0.5", "linestyle": "", "marker": "x", "markersize": 4.0},
}
_TEXT_OFFSET_POINTS = (4, 4)
_TEXT_MARGIN = 0.15  # of the width, for the text at the last point

_PANEL_INCHES = (6.0, 3.4)
_LEGEND_ROW_INCHES = 0.22
_DOTS_PER_INCH = 120


@dataclass(frozen=True)
class Line:
    """One curve; ``low`` and ``high`` shade its interval, ``reference`` lines are thin, black and dotted.

    ``look`` is one of ``JOINED``, ``OUTLINE``, ``POINTS`` and ``MUTED``; ``texts`` stand beside its points.
    The intervals of points alone are bars.
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
    """One diagram of a picture; ``limits`` bound its vertical axis, ``logarithmic`` scales it."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    limits: tuple[float, float] | None = None
    logarithmic: bool = False
    dots: bool = False


def check_picture(path: Path) -> None:
    """Raise ``UserError`` when a picture of this name could not be written, before the work it would show.

    Raises:
        UserError: the name ends in neither ``.png`` nor ``.svg``.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"the picture {path} must end in {' or '.join(FORMATS)}; name it so")
    require_plots()


def require_plots() -> None:
    """Raise ``MissingDependencyError`` when matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            f"pictures need matplotlib, which is not installed; run: {COMMAND}"
        ) from None


def draw(panels: Sequence[Panel], path: Path, title: str, kind: str | None = None) -> None:
    """Draw panels two in a row, with one legend for all; ``kind`` is ``png`` or ``svg``, else ``path`` tells.

    Equal panels give equal bytes: no date is written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_plots()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    legend_rows = -(-len(labels) // columns)
    size = (columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + legend_rows * _LEGEND_ROW_INCHES)
    # A dollar in a user's name is no formula, and a script that the font lacks is drawn as boxes.
    with (
        mpl.rc_context({"text.parse_math": False, "svg.hashsalt": "cusprun"}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        figure = Figure(figsize=size, layout="constrained")
        handles: dict[str, Any] = {}
        for position, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, position + 1)
            _draw_panel(axes, panel, labels, handles)
        figure.suptitle(title)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
        chosen = kind or path.suffix.lower().removeprefix(".")
        undated = {"Date": None} if chosen == "svg" else {"Software": None}
        figure.savefig(path, format=chosen, dpi=_DOTS_PER_INCH, metadata=undated)


def _draw_panel(axes: Axes, panel: Panel, labels: Sequence[str], handles: dict[str, Any]) -> None:
    for line in panel.lines:
        number = labels.index(line.label)
        colour = "black" if line.reference else f"C{number % _COLOURS}"
        style = ":" if line.reference else _STYLES[number // _COLOURS % len(_STYLES)]
        drawn: dict[str, Any] = {
            "color": colour,
            "linestyle": style,
            "linewidth": 1.2,
            "marker": "o" if panel.dots and not line.reference else "",
            **_LOOKS[line.look],
        }
        (handle,) = axes.plot(line.x, line.y, **drawn)
        handles.setdefault(line.label, handle)
        if line.low and line.look == JOINED:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        elif line.low:
            axes.vlines(line.x, line.low, line.high, color=drawn["color"], linewidth=0.8)
        _write_texts(axes, line, drawn["color"])
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.logarithmic:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.grid(alpha=0.3)


def _write_texts(axes: Axes, line: Line, colour: str) -> None:
    if line.texts:
        axes.margins(x=_TEXT_MARGIN)
    for x, y, text in zip(line.x, line.y, line.texts, strict=False):  # lines mostly have none
        axes.annotate(
            text,
            (x, y),
            xytext=_TEXT_OFFSET_POINTS,
            textcoords="offset points",
            fontsize="xx-small",
            color=colour,
        )
