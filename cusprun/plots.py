"""Curves, intervals and shares as pictures, without a display: records of panels in, a PNG or SVG out.

matplotlib is the extra ``plot``; it is imported here alone, and through its objects rather than ``pyplot``,
so that nothing is kept between two pictures.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.errors import MissingDependencyError, UserError
from cusprun.panels import BARRED, JOINED, MUTED, OUTLINE, POINTS, AnyPanel, Forest, Heat, Line, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
COMMAND = "pip install 'cusprun[plot]'"

_STYLES = ("-", "--", "-.")
_COLOURS = 10
"""Colours of matplotlib's own cycle; with the styles, thirty lines can be told apart."""

_LOOKS: Mapping[str, Mapping[str, Any]] = {
    JOINED: {},
    BARRED: {"linestyle": "-"},
    OUTLINE: {"color": "0.5", "linewidth": 1.0, "marker": ""},
    POINTS: {"color": "C0", "linestyle": "", "marker": "o"},
    MUTED: {"color": "0.5", "linestyle": "", "marker": "x", "markersize": 4.0},
}
_TEXT_OFFSET_POINTS = (4, 4)
_TEXT_MARGIN = 0.15  # of the width, for the text at the last point

_MARKERS = ("o", "s", "^", "D", "v", "P")
"""With error bars, lines differ by marker too, so that no line is known by its colour alone."""

_PANEL_INCHES = (6.0, 3.4)
_PAGE_PANEL_INCHES = (5.2, 3.2)
_LEGEND_ROW_INCHES = 0.22
_ROW_INCHES = 0.27
_DOTS_PER_INCH = 120
_HEAT_STEPS = 20
_NARROW = 6.0  # between the ends of a logarithmic axis: powers of ten would leave it almost without ticks


@dataclass(frozen=True)
class Palette:
    """Colours of a picture that stands in a page, as ``#rrggbb``; the ground is the page's own."""

    text: str
    grid: str
    cycle: tuple[str, ...]


_HEAT = "cividis"
"""Dark to bright on a white ground and on a black one, and the same to eyes that see fewer colours."""


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


def draw(panels: Sequence[AnyPanel], path: Path, title: str, kind: str | None = None) -> None:
    """Draw panels two in a row, with one legend for all; ``kind`` is ``png`` or ``svg``, else ``path`` tells.

    Equal panels give equal bytes: no date is written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_plots()
    chosen = kind or path.suffix.lower().removeprefix(".")
    undated = {"Date": None} if chosen == "svg" else {"Software": None}
    with _settings({}):
        figure = _figure(panels, title, _PANEL_INCHES, _COLOURS)
        figure.savefig(path, format=chosen, dpi=_DOTS_PER_INCH, metadata=undated)


def svg_document(panel: AnyPanel, palette: Palette) -> bytes:
    """Return one panel as an SVG document on no ground, its text as text; equal panels give equal bytes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_plots()
    stream = io.BytesIO()
    with _settings(_page_settings(palette)):
        figure = _figure((panel,), "", _PAGE_PANEL_INCHES, len(palette.cycle))
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", dpi=_DOTS_PER_INCH, transparent=True, metadata=unsaid)
    return stream.getvalue()


@contextmanager
def _settings(more: Any) -> Iterator[None]:
    import matplotlib as mpl

    # A dollar in a user's name is no formula, and a script that the font lacks is drawn as boxes.
    with (
        mpl.rc_context({"text.parse_math": False, "svg.hashsalt": "cusprun", **more}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _page_settings(palette: Palette) -> dict[str, Any]:
    from cycler import cycler

    named = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(named, palette.text),
        "grid.color": palette.grid,
        "axes.prop_cycle": cycler(color=palette.cycle),
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",  # text stays text: it can be searched, and is not drawn glyph by glyph
    }


def _figure(
    panels: Sequence[AnyPanel],
    title: str,
    panel_inches: tuple[float, float],
    colours: int,
) -> Figure:
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    lines = [line for panel in panels if isinstance(panel, Panel) for line in panel.lines]
    labels = list(dict.fromkeys(line.label for line in lines))
    legend_rows = -(-len(labels) // columns)
    height = max(_height(panel, panel_inches[1]) for panel in panels)
    size = (columns * panel_inches[0], rows * height + legend_rows * _LEGEND_ROW_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    handles: dict[str, Any] = {}
    pen = _Pen(labels, handles, colours, apart=not title)
    for position, panel in enumerate(panels):
        _DRAWN[type(panel)](figure.add_subplot(rows, columns, position + 1), panel, pen)
    if title:
        figure.suptitle(_printable(title))
    if handles:
        columns = columns if title else min(2, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    return figure


def _height(panel: AnyPanel, usual: float) -> float:
    """Return the height in inches: that of its rows, for a panel that has some."""
    rows = len(panel.marks) if isinstance(panel, Forest) else 0
    return max(_ROW_INCHES * rows + 1.0, 1.6) if rows else usual


@dataclass(frozen=True)
class _Pen:
    """What the panels of a figure share: labels of lines in their order, and the handles of the legend.

    With ``apart``, lines differ by more than colour as soon as there are two.
    """

    labels: Sequence[str]
    handles: dict[str, Any]
    colours: int
    apart: bool


def _draw_lines(axes: Axes, panel: Panel, pen: _Pen) -> None:
    import matplotlib as mpl

    for line in panel.lines:
        number = pen.labels.index(line.label)
        colour = mpl.rcParams["text.color"] if line.reference else f"C{number % pen.colours}"
        turn = number if pen.apart else number // pen.colours
        marker = _MARKERS[number % len(_MARKERS)] if line.look == BARRED else "o"
        drawn: dict[str, Any] = {
            "color": colour,
            "linestyle": ":" if line.reference else _STYLES[turn % len(_STYLES)],
            "linewidth": 1.2,
            "marker": marker if panel.dots and not line.reference else "",
            **_LOOKS[line.look],
        }
        (handle,) = axes.plot(line.x, line.y, **drawn)
        pen.handles.setdefault(_printable(line.label), handle)
        if line.low and line.look == JOINED:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        elif line.low:
            caps = 4 if line.look == BARRED else 0
            axes.errorbar(
                line.x, line.y, _arms(line), fmt="none", ecolor=drawn["color"], elinewidth=0.9, capsize=caps
            )
        _write_texts(axes, line, drawn["color"])
    _name(axes, panel.title, panel.x_label, panel.y_label)
    if panel.logarithmic:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    if panel.ticks:
        axes.set_xticks(range(len(panel.ticks)), [_printable(tick) for tick in panel.ticks])
        axes.set_xlim(-0.5, len(panel.ticks) - 0.5)
    axes.grid(alpha=0.3)


def _arms(line: Line) -> list[list[float]]:
    """Return the lengths of error bars below and above; an interval may not hold its own median."""
    below = [max(y - low, 0.0) for y, low in zip(line.y, line.low, strict=True)]
    above = [max(high - y, 0.0) for y, high in zip(line.y, line.high, strict=True)]
    return [below, above]


def _write_texts(axes: Axes, line: Line, colour: str) -> None:
    if line.texts:
        axes.margins(x=_TEXT_MARGIN)
    for x, y, text in zip(line.x, line.y, line.texts, strict=False):  # lines mostly have none
        axes.annotate(
            _printable(text),
            (x, y),
            xytext=_TEXT_OFFSET_POINTS,
            textcoords="offset points",
            fontsize="xx-small",
            color=colour,
        )


def _draw_forest(axes: Axes, panel: Forest, _pen: _Pen) -> None:
    import matplotlib as mpl

    for row, mark in enumerate(panel.marks):
        colour = "C0" if mark.shown else "0.5"
        axes.plot((mark.low, mark.high), (row, row), color=colour, linewidth=2, solid_capstyle="butt")
        filling = colour if mark.shown else "none"
        axes.plot(
            (mark.value,), (row,), marker="o", color=colour, markerfacecolor=filling, markeredgewidth=1.5
        )
    axes.axvline(panel.reference, color=mpl.rcParams["text.color"], linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(panel.marks)), [_printable(mark.label) for mark in panel.marks])
    axes.set_ylim(len(panel.marks) - 0.5, -0.5)
    if panel.logarithmic:
        _scale_ratios(axes, panel)
    if panel.from_zero:
        axes.set_xlim(0, max(panel.reference, *(mark.high for mark in panel.marks)) * 1.05)
    _name(axes, panel.title, panel.x_label, "")
    axes.grid(alpha=0.3, axis="x")


def _scale_ratios(axes: Axes, panel: Forest) -> None:
    """Set a logarithmic axis on which a half is as far from 1 as 2 is, with ticks in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low = min(panel.reference, *(mark.low for mark in panel.marks))
    high = max(panel.reference, *(mark.high for mark in panel.marks))
    if low <= 0:  # no ratio, and nothing that such an axis could show
        return
    axes.set_xscale("log")
    narrow = high / low < _NARROW
    axes.xaxis.set_major_locator(
        MaxNLocator(5, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=(1.0, 2.0, 5.0))
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    margin = (high / low) ** 0.06 * 1.005
    axes.set_xlim(low / margin, high * margin)


def _draw_heat(axes: Axes, panel: Heat, _pen: _Pen) -> None:
    import matplotlib as mpl

    # Each colour of the scale is an element of the picture, and an eye tells no more apart.
    colours = mpl.colormaps[_HEAT].resampled(_HEAT_STEPS)
    shown = axes.imshow(
        panel.values,
        vmin=0.0,
        vmax=1.0,
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        extent=(0, panel.columns, len(panel.values), 0),
    )
    if panel.columns <= 16:
        axes.set_xticks([place + 0.5 for place in range(panel.columns)], map(str, range(panel.columns)))
    if panel.row_labels:
        step = -(-len(panel.row_labels) // 16)  # more names than sixteen run into each other
        places = range(0, len(panel.row_labels), step)
        axes.set_yticks(
            [place + 0.5 for place in places], [_printable(panel.row_labels[place]) for place in places]
        )
    figure = axes.figure
    figure.colorbar(shown, ax=axes, label=_printable(panel.scale_label))
    _name(axes, panel.title, panel.x_label, panel.y_label)


_DRAWN: Mapping[type, Callable[[Any, Any, _Pen], None]] = {
    Panel: _draw_lines,
    Forest: _draw_forest,
    Heat: _draw_heat,
}
"""How each kind of panel is drawn into its axes."""


def _name(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(_printable(title), fontsize="medium")
    axes.set_xlabel(_printable(x_label))
    axes.set_ylabel(_printable(y_label))


def _printable(text: str) -> str:
    """Return text without the control characters and half surrogates that XML cannot hold."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
