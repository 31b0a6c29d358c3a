"""Curves over sizes and overlaps of dimensions in a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cusprun.pipeline.curve import (
    SweepReport,
    curve_notes,
    curve_panels,
    quality_cells,
    quality_columns,
    ratio_label,
    size_cells,
    size_columns,
)
from cusprun.pipeline.frontier_tables import (
    DECODE,
    PROMPT,
    frontier_cells,
    frontier_columns,
    frontier_notes,
    frontier_panels,
    is_greyed,
    speed_columns,
    speed_rows,
)
from serve.report.view import Block, Bullets, Grid, Heading, Picture, Prose, Section

if TYPE_CHECKING:
    from cusprun.pruning.overlap import KindOverlap, OverlapReport


def sweep_sections(reports: Sequence[SweepReport]) -> Iterator[Section]:
    """Yield the curve of each sweep: what was made, how good it is, and both as a picture."""
    blocks: list[Block] = []
    for number, report in enumerate(reports):
        title = f"{report.model} → {report.expert}"
        sizes = Grid(f"Sizes, {title}", size_columns(), tuple(size_cells(point) for point in report.rows()))
        rows = tuple((ratio_label(point), *quality_cells(point)) for point in report.rows())
        quality = Grid(f"Quality, {title}", ("ratio", *quality_columns(report)), rows)
        blocks += [
            Picture(
                f"curve-{number}",
                "Perplexity ÷ the original's over the share of block parameters removed, and over the size "
                "of the weights, with 95 % intervals.",
                curve_panels(report),
                (quality,),
            ),
            sizes,
            Bullets(curve_notes(report)),
            *_frontier(report, f"frontier-{number}"),
        ]
    yield Section("curve", "Size against quality", tuple(blocks))


def _frontier(report: SweepReport, name: str) -> Iterator[Block]:
    """Yield every size in every export, those that nobody should choose named as such."""
    if not report.frontier:
        return
    timed = report.speed_options is not None
    columns = frontier_columns(report, with_speed=timed)
    grid = Grid(
        "Exports of every size",
        columns,
        tuple(frontier_cells(report, point, with_speed=timed) for point in report.frontier),
        texts=(len(columns) - 1,),
    )
    yield Heading("Which export to choose")
    chosen = [point.name for point in report.frontier if not is_greyed(point)]
    if chosen:
        yield Prose(
            f"Choose among {', '.join(chosen)}: for each of the others one of these is the better choice."
        )
    panels = frontier_panels(report)
    if panels:
        description = (
            "Quality of every export over its size and speed; what is dominated is crossed out in grey."
        )
        yield Picture(name, description, panels, (grid,))
    else:
        yield grid
    rows = tuple(speed_rows(report, (DECODE, PROMPT)))
    if rows:
        yield Grid("Speeds of the exports", speed_columns((DECODE, PROMPT)), rows)
    yield Bullets(frontier_notes(report))


def overlap_sections(reports: Sequence[OverlapReport]) -> Iterator[Section]:
    """Yield how much the irrelevant units of languages, domains and tasks are the same."""
    from cusprun.pipeline.overlap import panels

    blocks: list[Block] = [
        Prose(
            "A unit is irrelevant to a dimension when it is among those that its documents need least. "
            "Overlap is the share of units irrelevant to either of two dimensions that is irrelevant to "
            "both: 1 is the same units, and the dotted line is what chance would give. Where dimensions "
            "overlap, one cut serves them all."
        )
    ]
    for number, report in enumerate(reports):
        rows = tuple(
            (one.name, one.expert_name, f"{one.documents:,}", f"{one.tokens:,}") for one in report.dimensions
        )
        title = f"Dimensions, rule {report.rule}, ratio {report.ratio:g}"
        blocks.append(Grid(title, ("name", "expert", "documents", "tokens"), rows, texts=(1,)))
        blocks.append(_means(report))
        blocks.append(
            Picture(
                f"overlap-{number}",
                "Overlap of the irrelevant units of each pair of dimensions by layer, and by chance.",
                panels(report),
                tuple(_by_layer(report, kind) for kind in report.kinds),
            )
        )
    yield Section("overlap", "Overlap of language, domain and task", tuple(blocks))


def _means(report: OverlapReport) -> Grid:
    rows = [
        (
            kind.kind,
            " and ".join(pair),
            f"{kind.mean_jaccard[place]:.3f}",
            f"{kind.chance_jaccard:.3f}",
            f"{kind.irrelevant:,} of {kind.units:,}",
        )
        for kind in report.kinds
        for place, pair in enumerate(report.pairs)
    ]
    columns = ("unit", "dimensions", "mean overlap", "by chance", "irrelevant to each")
    notes = tuple(
        f"{kind.kind}: {kind.mean_intersection:.1%} of the units are irrelevant to all of them, by chance "
        f"{kind.chance_intersection:.1%}."
        for kind in report.kinds
        if len(report.dimensions) > 2
    )
    return Grid("Mean overlap over the layers", columns, tuple(rows), texts=(1,), notes=notes)


def _by_layer(report: OverlapReport, kind: KindOverlap) -> Grid:
    pairs = tuple(" and ".join(pair) for pair in report.pairs)
    rows = tuple(
        (
            "all" if layer.layer is None else str(layer.layer),
            *(f"{value:.3f}" for value in layer.jaccard),
            f"{layer.intersection:.3f}",
        )
        for layer in kind.layers
    )
    return Grid(f"{kind.kind} by layer", ("layer", *pairs, "irrelevant to all"), rows)
