"""The size/quality curve of a sweep: its record, and the record as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cusprun.panels import Line, Panel
from cusprun.pipeline.curve_quality import CurveQuality
from cusprun.pipeline.frontier import FrontierPoint, SpeedOptions
from cusprun.quality.report import CONFIDENCE, RESAMPLES, Estimate
from cusprun.records import Shape

LOGARITHMIC_ABOVE = 3.0
"""Times the original's perplexity from which a linear axis would hide the good end of the curve."""


@dataclass(frozen=True)
class CurvePoint:
    """One size: what was asked for, what was made, and its quality on ``held_out`` and ``general`` text.

    ``block_ratio`` and ``total_ratio`` are the shares of the decoder blocks' attention and FFN parameters,
    and of all parameters, that are gone; ``weight_bytes`` are those of the checkpoint.
    """

    ratio: float
    block_ratio: float
    total_ratio: float
    shape: Shape
    num_parameters: int
    weight_bytes: int
    corpora: Mapping[str, CurveQuality]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class SweepReport:
    """``sweep.json``: one model and expert at several sizes, ascending by ratio.

    ``inputs_hash`` stands for everything that the curve was made from, so that with a ratio it stands for a
    point. ``device`` is the kind that models ran on, ``cpu`` or ``cuda``; ``refit_target`` what the refit
    aims at. ``original`` is the point at ratio 0. ``frontier`` is every size in every export that was asked
    for, the original among them, and ``speed_options`` how their speeds were measured, None where they were
    not. Intervals are bootstrap intervals over documents, and those of ratios are paired: original and expert
    see the same draws.
    """

    created: str
    cusprun_version: str
    versions: Mapping[str, str]
    model: str
    model_hash: str
    expert: str
    corpus_hash: str
    calibration_documents: int
    calibration_tokens: int
    rule: str
    targets: tuple[str, ...]
    units: tuple[str, ...]
    refit: bool
    dimension_weights: Mapping[str, float]
    inputs_hash: str
    original: CurvePoint
    points: tuple[CurvePoint, ...]
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    seed: int = 0
    device: str = "cpu"
    refit_target: str = "output"
    frontier: tuple[FrontierPoint, ...] = ()
    speed_options: SpeedOptions | None = None
    schema_version: int = 1

    def rows(self) -> tuple[CurvePoint, ...]:
        """Return the original and then every size."""
        return (self.original, *self.points)

    @property
    def failures(self) -> tuple[FrontierPoint, ...]:
        """The exports that could not be made or measured."""
        return tuple(point for point in self.frontier if point.failure is not None)


def size_columns() -> tuple[str, ...]:
    """Return the headings of :func:`size_cells`."""
    return ("ratio", "block params", "all params", "blocks", "FFN", "KV", "query", "parameters", "weights")


def size_cells(point: CurvePoint) -> tuple[str, ...]:
    """Return what a point is, as text."""
    from serve.bench.table import format_bytes, format_count

    shape = point.shape
    return (
        ratio_label(point),
        f"{-point.block_ratio:.1%}" if point.block_ratio else "",
        f"{-point.total_ratio:.1%}" if point.total_ratio else "",
        str(shape.num_hidden_layers),
        f"{shape.intermediate_size:,}",
        str(shape.num_key_value_heads),
        str(shape.num_attention_heads),
        format_count(point.num_parameters),
        format_bytes(point.weight_bytes),
    )


def ratio_label(point: CurvePoint) -> str:
    """Return the ratio that was asked for, or ``original``."""
    return f"{point.ratio:g}" if point.ratio else "original"


def quality_columns(report: SweepReport) -> Iterator[str]:
    """Yield the headings of :func:`quality_cells`."""
    for name in report.original.corpora:
        yield from (
            f"{name.replace('_', '-')} perplexity",
            f"× original ({100 * report.confidence:.0f} % interval)",
        )


def quality_cells(point: CurvePoint) -> Iterator[str]:
    """Yield perplexity and its ratio to the original's on each set of documents, as text."""
    for row in point.corpora.values():
        ratio = row.perplexity_ratio
        yield f"{row.perplexity.value:.3f}"
        yield "1" if ratio is None else f"{ratio.value:.3f} ({ratio.low:.3f}–{ratio.high:.3f})"


def curve_notes(report: SweepReport) -> tuple[str, ...]:
    """Return what a reader must know to trust or repeat the numbers."""
    sizes = "; ".join(
        f"{name.replace('_', '-')}: {row.documents} documents, {row.predicted_tokens:,} tokens"
        for name, row in report.original.corpora.items()
    )
    weights = ", ".join(f"{name} {weight:g}" for name, weight in report.dimension_weights.items())
    told = [f"weights: {weights}"] if weights else []
    told += [f"target: {report.refit_target}"] if report.refit_target != "output" else []
    told_text = "; ".join(told)
    return (
        f"Rule {report.rule} on {', '.join(report.units)}, {'with' if report.refit else 'no'} refit"
        f"{f' ({told_text})' if told else ''}, "
        f"{report.calibration_documents} calibration documents ({report.calibration_tokens:,} tokens), "
        f"for {', '.join(report.targets)}.",
        f"Perplexities in float32 on documents that nothing was calibrated on ({sizes}); intervals over "
        "documents.",
    )


def to_markdown(report: SweepReport) -> str:
    """Return the curve as a Markdown page with one table."""
    columns = (*size_columns(), *quality_columns(report))
    lines = [
        f"# {report.model} → {report.expert}",
        "",
        f"| {' | '.join(columns)} |",
        f"|---{'|--:' * (len(columns) - 1)}|",
        *(f"| {' | '.join((*size_cells(point), *quality_cells(point)))} |" for point in report.rows()),
        "",
        *(f"- {note}" for note in curve_notes(report)),
    ]
    return "\n".join(lines) + "\n"


def curve_panels(report: SweepReport) -> tuple[Panel, ...]:
    """Return the curve twice: over the share of block parameters that is gone, and over the weights' size."""
    rows = report.rows()
    axes = (
        ("share of block parameters removed", [point.block_ratio for point in rows]),
        ("weights (MB)", [point.weight_bytes / 1e6 for point in rows]),
    )
    highest = max(ratio.high for point in rows for ratio in _ratios(point).values())
    return tuple(
        Panel(
            title="",
            x_label=label,
            y_label="perplexity ÷ original",
            lines=tuple(_line(name, x, report) for name in report.original.corpora),
            logarithmic=highest > LOGARITHMIC_ABOVE,
            dots=True,
        )
        for label, x in axes
    )


def _ratios(point: CurvePoint) -> dict[str, Estimate]:
    same = Estimate(1.0, 1.0, 1.0)
    return {name: row.perplexity_ratio or same for name, row in point.corpora.items()}


def _line(name: str, x: list[float], report: SweepReport) -> Line:
    ratios = [_ratios(point)[name] for point in report.rows()]
    return Line(
        label=f"{name.replace('_', '-')} documents",
        x=tuple(x),
        y=tuple(ratio.value for ratio in ratios),
        low=tuple(ratio.low for ratio in ratios),
        high=tuple(ratio.high for ratio in ratios),
    )
