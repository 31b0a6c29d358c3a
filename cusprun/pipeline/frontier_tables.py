"""The frontier of a sweep for people: rows and notes of its tables, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cusprun.panels import MUTED, OUTLINE, POINTS, Line, Panel
from cusprun.pipeline.curve import LOGARITHMIC_ABOVE, SweepReport
from cusprun.pipeline.evaluation import HELD_OUT
from cusprun.pipeline.frontier import FrontierPoint, Speed
from serve.bench.records import TOO_FEW_PAIRS, Interval

if TYPE_CHECKING:
    from cusprun.pipeline.curve_quality import CurveQuality


DECODE, PROMPT = "decode", "prompt"
"""The two speeds of a point."""


def frontier_columns(report: SweepReport, *, with_speed: bool) -> tuple[str, ...]:
    """Return the headings of :func:`frontier_cells`."""
    speed = _speed_columns(DECODE) if with_speed else ()
    sets = (f"{name.replace('_', '-')} perplexity × original" for name in report.original.corpora)
    return ("export", "size", "bits per weight", *speed, *sets, "dominated by")


def frontier_cells(report: SweepReport, point: FrontierPoint, *, with_speed: bool) -> tuple[str, ...]:
    """Return what a point costs and gives, as text; what was not measured is empty."""
    from serve.bench.table import format_bytes

    return (
        point.name,
        "" if point.file_bytes is None else format_bytes(point.file_bytes),
        "" if point.bits_per_weight is None else f"{point.bits_per_weight:.2f}",
        *(_speed_cells(point.speed, DECODE) if with_speed else ()),
        *(_ratio_cell(point.corpora.get(name)) for name in report.original.corpora),
        verdict(point),
    )


def verdict(point: FrontierPoint) -> str:
    """Return what dominates a point, ``nothing`` for one on the frontier, or why it is not judged."""
    return f"not judged: {point.failure}" if point.failure else point.dominated_by or "nothing"


def is_greyed(point: FrontierPoint) -> bool:
    """Whether nobody should choose a point."""
    return point.failure is not None or point.dominated_by is not None


def speed_columns(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the headings of :func:`speed_rows`."""
    columns = (column for kind in kinds for column in _speed_columns(kind))
    return ("export", *columns, "peak memory", "pairs of runs")


def speed_rows(report: SweepReport, kinds: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the speeds of each point that has some, of ``DECODE`` and ``PROMPT``, and its memory, as text."""
    from serve.bench.table import format_bytes

    for point in report.frontier:
        speed = point.speed
        if speed is not None:
            rates = (cell for kind in kinds for cell in _speed_cells(speed, kind))
            yield (point.name, *rates, format_bytes(speed.peak_memory_bytes), str(speed.num_pairs))


def frontier_notes(report: SweepReport) -> tuple[str, ...]:
    """Return what a reader must know to trust the frontier."""
    from serve.bench.table import short_library

    options = report.speed_options
    speed = "decode speed, " if options else ""
    axes = f"size on disk, {speed}held-out perplexity"
    notes = [
        f"An export is dominated by another one that is worse in none of {axes}, and better in one of them, "
        "each time by more than noise explains: intervals of speeds that do not touch, perplexities compared "
        "document by document.",
        "Perplexities are those that each export's own runtime gives on the documents above, divided by the "
        f"original's in float32; {100 * report.confidence:.0f} % intervals over documents.",
    ]
    if options is None:
        return tuple(notes)
    speeds = [(point.name, point.speed) for point in report.frontier if point.speed]
    libraries = sorted({short_library(speed.library) for _, speed in speeds})
    machines = sorted({speed.machine for _, speed in speeds})
    notes.append(
        f"Speeds: {options.prompt_tokens} tokens of a prompt at once, then {options.decode_tokens} tokens "
        f"decoded one by one at {options.context_depth} in the cache, in turns with the original in the same "
        f"export; medians with 95 % intervals. {', '.join(libraries)} on {' and on '.join(machines)}."
    )
    noises = dict.fromkeys(noise for _, speed in speeds for noise in speed.noise)
    for noise in noises:
        heard = ", ".join(name for name, speed in speeds if noise in speed.noise)
        notes.append(f"Noise: {noise} ({heard}).")
    return tuple(notes)


def frontier_markdown(report: SweepReport) -> str:
    """Return the frontier as the second part of a Markdown page; empty without exports."""
    if not report.frontier:
        return ""
    timed = report.speed_options is not None
    rows = [frontier_cells(report, point, with_speed=timed) for point in report.frontier]
    lines = ["", "## Exports", "", *_markdown_table(frontier_columns(report, with_speed=timed), rows)]
    speeds = list(speed_rows(report, (PROMPT,)))
    if speeds:
        lines += ["", *_markdown_table(speed_columns((PROMPT,)), speeds)]
    return "\n".join([*lines, "", *(f"- {note}" for note in frontier_notes(report))]) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|---{'|--:' * (len(columns) - 2)}|---|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _speed_columns(kind: str) -> tuple[str, str]:
    return f"{kind} tokens/s", "× original's export"


def _speed_cells(speed: Speed | None, kind: str) -> tuple[str, str]:
    """Return a rate and its ratio to that of the original's export."""
    if speed is None:
        return "", ""
    rate: Interval = getattr(speed, f"{kind}_tokens_per_second")
    ratio: Interval = getattr(speed, f"{kind}_ratio")
    if speed.too_few_pairs:
        return f"{rate.median:,.1f} ({TOO_FEW_PAIRS})", f"{ratio.median:.2f}"
    return (
        f"{rate.median:,.1f} ({rate.low:,.1f}–{rate.high:,.1f})",
        f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})",
    )


def _ratio_cell(quality: CurveQuality | None) -> str:
    ratio = None if quality is None else quality.perplexity_ratio
    return "" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def frontier_panels(report: SweepReport) -> tuple[Panel, ...]:
    """Return quality over size and, where it was measured, over speed; none without a measured point."""
    points = [point for point in report.frontier if point.failure is None]
    if not points:
        return ()
    panels = [
        _panel("size on disk (MB)", points, [_megabytes(point) for point in points], more_is_better=False)
    ]
    timed = [point for point in points if point.speed is not None]
    if timed:
        rates = [point.speed.decode_tokens_per_second.median for point in timed if point.speed]
        panels.append(_panel("decode speed (tokens/s)", timed, rates, more_is_better=True))
    return tuple(panels)


def _panel(label: str, points: Sequence[FrontierPoint], x: Sequence[float], *, more_is_better: bool) -> Panel:
    places = list(zip(points, x, strict=True))
    chosen = [(point, value) for point, value in places if point.dominated_by is None]
    greyed = [(point, value) for point, value in places if point.dominated_by is not None]
    lines = [_stairs([(value, _ratio(point)) for point, value in chosen], more_is_better=more_is_better)]
    lines += [_points("on the frontier", chosen, POINTS)]
    lines += [_points("dominated: choose another", greyed, MUTED)] if greyed else []
    return Panel(
        title="",
        x_label=label,
        y_label="held-out perplexity ÷ original",
        lines=tuple(lines),
        logarithmic=max(map(_ratio, points)) > LOGARITHMIC_ABOVE,
    )


def _points(label: str, places: Sequence[tuple[FrontierPoint, float]], look: str) -> Line:
    ratios = [point.corpora[HELD_OUT].perplexity_ratio for point, _ in places]
    return Line(
        label=label,
        x=tuple(value for _, value in places),
        y=tuple(_ratio(point) for point, _ in places),
        low=tuple(ratio.low for ratio in ratios if ratio),
        high=tuple(ratio.high for ratio in ratios if ratio),
        look=look,
        texts=tuple(point.name for point, _ in places),
    )


def _stairs(places: Sequence[tuple[float, float]], *, more_is_better: bool) -> Line:
    """Return the best quality that can be had at each x or better, as stairs over the points that reach it.

    A point that is on the frontier for what this panel does not show may lie above the stairs.
    """
    sign = -1.0 if more_is_better else 1.0
    stairs: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (sign * place[0], place[1])):
        if not stairs:
            stairs.append((x, y))
        elif y < stairs[-1][1]:
            stairs += [(x, stairs[-1][1]), (x, y)]
    return Line(
        label="best at this or better",
        x=tuple(x for x, _ in stairs),
        y=tuple(y for _, y in stairs),
        look=OUTLINE,
    )


def _ratio(point: FrontierPoint) -> float:
    ratio = point.corpora[HELD_OUT].perplexity_ratio
    assert ratio is not None
    return ratio.value


def _megabytes(point: FrontierPoint) -> float:
    assert point.file_bytes is not None
    return point.file_bytes / 1e6
