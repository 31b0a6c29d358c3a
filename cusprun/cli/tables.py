"""Records as tables for people."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cusprun.checkpoint.inspect import Inspection
    from cusprun.diagnosis import DoctorReport
    from cusprun.pipeline.curve import SweepReport
    from cusprun.pruning.overlap import KindOverlap, OverlapReport
    from cusprun.quality.report import CorpusQuality, Estimate, EvalReport, TaskQuality
    from cusprun.records import Manifest, NeuronManifest, Plan, Shape
    from exporters.parity_records import ParityReport
    from serve.bench.records import BenchReport
    from serve.bench.table import Table as BenchTable

_SHAPE_LABELS = {
    "num_hidden_layers": "decoder blocks",
    "hidden_size": "hidden size",
    "intermediate_size": "FFN width",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV heads",
    "head_dim": "head size",
    "vocab_size": "vocabulary",
}


def make_table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    dimmed: Collection[int] = (),
) -> Table:
    """Return a table with text to the left in the first and last column, numbers to the right between.

    Rows whose numbers, from 0, are in ``dimmed`` are grey where the terminal has colours.
    """
    # Text, as names are the user's, and rich would read square brackets in them as its markup.
    heading = None if title is None else Text(title, style="bold")
    table = Table(title=heading, title_justify="left")
    for position, column in enumerate(columns):
        inner = 0 < position < len(columns) - 1
        table.add_column(Text(column), justify="right" if inner else "left", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*(Text(cell) for cell in row), style="dim" if number in dimmed else None)
    return table


def row_table(table: BenchTable, title: str | None = None) -> RenderableType:
    """Lay out rows of before, after and change, with their notes below."""
    shown = make_table(
        title,
        ("", "before", "after", "change"),
        ((row.metric, row.before, row.after, row.change) for row in table.rows),
    )
    return _stacked(shown, table.notes)


def _stacked(shown: Table, notes: Sequence[str]) -> RenderableType:
    from rich.console import Group

    return Group(shown, *(Text(note) for note in notes))


def bench_tables(report: BenchReport) -> Iterator[RenderableType]:
    """Lay out a benchmark, a table for each runtime."""
    from serve.bench.table import bench_table, suite_title

    for suite in report.suites:
        yield row_table(bench_table(report, suite), title=suite_title(suite))


def inspection_tables(found: Inspection) -> Iterator[RenderableType]:
    """Lay out what a model is made of."""
    from serve.bench.table import format_bytes, format_count

    facts = [
        ("format", found.format),
        ("family", found.family + ("" if found.supported else " (not supported)")),
        ("parameters", f"{found.num_parameters:,} ({format_count(found.num_parameters)})"),
        ("bytes", f"{format_bytes(found.num_bytes)}, {found.bits_per_weight:.2f} bits per weight"),
        ("types", ", ".join(f"{name} ({format_count(count)})" for name, count in found.dtypes.items())),
        ("context", f"{found.context_length:,} tokens" if found.context_length else "not stated"),
        ("embeddings", "tied" if found.tied else "untied"),
        ("tokenizer", "yes" if found.has_tokenizer else "no"),
        ("chat template", "yes" if found.has_chat_template else "no"),
    ]
    if found.shape:
        facts += [(label, f"{getattr(found.shape, name):,}") for name, label in _SHAPE_LABELS.items()]
    if found.provenance:
        facts.append(("made from", f"{found.provenance.source} for {found.provenance.expert}"))
    yield make_table(found.path, ("", ""), facts)
    yield make_table(
        "Parts",
        ("part", "tensors", "parameters", "share", "bytes", "bits/weight", "types"),
        (
            (
                part.name,
                str(part.num_tensors),
                f"{part.num_parameters:,}",
                f"{part.parameter_share:.1%}",
                format_bytes(part.num_bytes),
                f"{part.bits_per_weight:.2f}",
                ", ".join(part.dtypes),
            )
            for part in found.parts
        ),
    )
    yield make_table(
        "Tensors",
        ("name", "shape", "count", "type"),
        (
            (group.name, " × ".join(map(str, group.shape)), str(group.count), group.dtype)
            for group in found.tensors
        ),
    )
    yield from (Text(f"note: {note}") for note in found.notes)


def doctor_tables(report: DoctorReport) -> Iterator[RenderableType]:
    """Lay out what is installed and what works."""
    from serve.bench.table import format_bytes

    machine = report.machine
    yield make_table(
        f"cusprun {report.cusprun_version}, Python {report.python_version}",
        ("", ""),
        (
            ("system", f"{machine.operating_system}, {machine.architecture}"),
            ("cores", str(machine.available_cores)),
            (
                "memory",
                f"{format_bytes(machine.memory_bytes)}, "
                f"{format_bytes(machine.available_memory_bytes)} available",
            ),
            ("disk", f"{format_bytes(machine.free_disk_bytes)} free at {machine.folder}"),
            (
                "GPUs",
                ", ".join(f"{gpu.name} ({format_bytes(gpu.memory_bytes)})" for gpu in machine.gpus) or "none",
            ),
        ),
    )
    yield make_table(
        "Runtimes",
        ("runtime", "state", "version", "runs", "detail, or the command that helps"),
        ((r.name, r.state, r.version or "", r.runs, r.command or r.detail) for r in report.runtimes),
    )
    yield make_table(
        "Libraries",
        ("library", "version", "for", "the command that adds it"),
        (
            (entry.name, entry.version or "missing", entry.purpose, entry.command or "")
            for entry in report.libraries
        ),
    )
    yield from (Text(f"problem: {problem}") for problem in report.problems)


def plan_tables(plan: Plan) -> Iterator[RenderableType]:
    """Lay out what a plan chose, and why."""
    yield make_table("Plan", ("", "before", "after", "change"), _shape_rows(plan.before, plan.after))
    yield Text(
        f"{plan.block_ratio:.1%} of the decoder blocks' attention and FFN parameters go "
        f"(asked for: {plan.budget}), {plan.total_ratio:.1%} of all parameters"
    )
    yield from (Text(f"- {reason}") for reason in plan.reasons)


def _shape_rows(before: Shape, after: Shape) -> Iterator[tuple[str, str, str, str]]:
    names = ["intermediate_size", "num_key_value_heads", "num_attention_heads"]
    if before.num_hidden_layers != after.num_hidden_layers:
        names.insert(0, "num_hidden_layers")
    for name in names:
        old, new = getattr(before, name), getattr(after, name)
        change = "same" if old == new else f"{new / old - 1:+.1%}"
        yield _SHAPE_LABELS[name], f"{old:,}", f"{new:,}", change


def manifest_tables(manifest: Manifest) -> Iterator[RenderableType]:
    """Lay out what pruning did."""
    old, new = manifest.parameters_before, manifest.parameters_after
    rows = [*_shape_rows(manifest.plan.before, manifest.plan.after)]
    rows.append(("parameters", f"{old:,}", f"{new:,}", f"{new / old - 1:+.1%}"))
    held_out = manifest.measurements.get("held_out")
    if held_out:
        rows.append(
            (
                "perplexity, held-out documents",
                f"{held_out['perplexity_before']:.2f}",
                f"{held_out['perplexity_after']:.2f}",
                f"{held_out['perplexity_ratio'] - 1:+.1%}",
            )
        )
    yield make_table(manifest.expert.name, ("", "before", "after", "change"), rows)
    if manifest.refit:
        before = sum(entry.relative_error_before for entry in manifest.refit) / len(manifest.refit)
        after = sum(entry.relative_error_after for entry in manifest.refit) / len(manifest.refit)
        what = "output" if manifest.refit_target == "output" else "stream"
        yield Text(f"refit: mean relative {what} error {before:.2%} to {after:.2%}")
        chosen = manifest.measurements.get("refit_target")
        if chosen:
            tried = ", ".join(f"{name} {value:.3f}" for name, value in chosen["perplexity"].items())
            yield Text(f"refit target {chosen['chosen']}: perplexity on documents set apart: {tried}")


def neuron_tables(manifest: NeuronManifest) -> Iterator[RenderableType]:
    """Lay out what zeroing single neurons did."""
    kinds = sorted({kind for block in manifest.counts for kind in block})
    yield make_table(
        f"{manifest.expert.name}: {manifest.zeroed_parameters:,} of {manifest.parameters:,} parameters "
        "are zero",
        ("neurons set to zero, of all blocks", ""),
        ((kind, f"{sum(block.get(kind, 0) for block in manifest.counts):,}") for kind in kinds),
    )
    held_out = manifest.measurements.get("held_out")
    if held_out:
        yield Text(
            f"perplexity on held-out documents {held_out['perplexity_before']:.2f} before, "
            f"{held_out['perplexity_after']:.2f} after ({held_out['perplexity_ratio'] - 1:+.1%})"
        )


def parity_table(reports: Sequence[ParityReport]) -> RenderableType:
    """Lay out proofs."""
    return make_table(
        None,
        ("artifact", "top-1", "KL (nats)", "max logit diff.", "texts with the same ids", "tokens", "verdict"),
        (
            (
                report.artifact,
                f"{report.logits.top1_agreement:.2%}",
                _number(report.logits.mean_kl, ".1e"),
                _number(report.logits.max_abs_logit_difference, ".2g"),
                f"{report.text.probe_texts - report.text.mismatch_count} of {report.text.probe_texts}",
                f"{report.logits.tokens:,}",
                report.verdict,
            )
            for report in reports
        ),
    )


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def quality_tables(report: EvalReport) -> Iterator[RenderableType]:
    """Lay out the quality of models, one table for each set of documents."""
    for name in report.corpus_names():
        first = report.models[0].corpora[name]
        title = f"{name.replace('_', '-')}: {first.documents} documents, {first.predicted_tokens:,} tokens"
        yield make_table(
            title,
            ("model", "perplexity", "× first", "KL (nats)", "top-1", "95 % interval of ×"),
            ((model.model, *_quality_cells(model.corpora[name])) for model in report.models),
        )
    for position, task in enumerate(report.models[0].tasks):
        yield make_table(
            f"{task.name}: {task.metric}, {task.documents} documents",
            ("model", "score", "against first", "95 % interval of that"),
            ((model.model, *_task_cells(model.tasks[position])) for model in report.models),
        )


def _task_cells(quality: TaskQuality) -> tuple[str, ...]:
    score, apart = quality.score, quality.difference
    return (
        f"{score.value:.1%} ({score.low:.1%}–{score.high:.1%})",
        "" if apart is None else f"{apart.value:+.1%}",
        "" if apart is None else f"{apart.low:+.1%} to {apart.high:+.1%}",
    )


def _quality_cells(quality: CorpusQuality) -> tuple[str, ...]:
    def value(estimate: Estimate | None, form: str) -> str:
        return "" if estimate is None else format(estimate.value, form)

    ratio = quality.perplexity_ratio
    spread = quality.perplexity
    return (
        f"{spread.value:.3f} ({spread.low:.2f}–{spread.high:.2f})",
        value(ratio, ".3f"),
        value(quality.mean_kl_divergence, ".4f"),
        value(quality.top1_agreement, ".1%"),
        "" if ratio is None else f"{ratio.low:.3f}–{ratio.high:.3f}",
    )


def overlap_tables(report: OverlapReport) -> Iterator[RenderableType]:
    """Lay out overlaps over groups of layers, one table for each kind of unit."""
    yield make_table(
        f"Dimensions (rule {report.rule}, ratio {report.ratio:g})",
        ("name", "documents", "tokens", "expert"),
        (
            (entry.name, f"{entry.documents:,}", f"{entry.tokens:,}", entry.expert_name)
            for entry in report.dimensions
        ),
    )
    for kind in report.kinds:
        yield _overlap_table(report, kind)
    yield Text(
        "Jaccard overlap of the irrelevant sets, two by two"
        + ("" if len(report.dimensions) < 3 else "; the last row is the share of units in all of them")
        + ". Chance is the mean for independent random sets of the same size."
    )


def _overlap_table(report: OverlapReport, kind: KindOverlap) -> Table:
    from cusprun.pruning.overlap import layer_groups

    whole = kind.layers[0].layer is None
    groups = () if whole else layer_groups(report.num_hidden_layers)
    names = [f"{group[0]}–{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups]

    def row(label: str, values: Sequence[float], mean: float, chance: float) -> tuple[str, ...]:
        cells = (sum(values[number] for number in group) / len(group) for group in groups)
        return (label, *(f"{value:.3f}" for value in (*cells, mean)), f"{chance:.3f}")

    rows = [
        row(
            " and ".join(pair),
            [layer.jaccard[number] for layer in kind.layers],
            kind.mean_jaccard[number],
            kind.chance_jaccard,
        )
        for number, pair in enumerate(report.pairs)
    ]
    if len(report.dimensions) > 2:
        shared = [layer.intersection for layer in kind.layers]
        rows.append(row("all of them", shared, kind.mean_intersection, kind.chance_intersection))
    where = "of all layers" if whole else "of each layer"
    return make_table(
        f"{kind.kind}: {kind.irrelevant:,} of {kind.units:,} {where}",
        ("layers", *names, "all" if whole else "mean", "chance"),
        rows,
    )


def sweep_tables(report: SweepReport) -> Iterator[RenderableType]:
    """Lay out a size/quality curve: what was made, then how good it is."""
    from cusprun.pipeline import curve

    rows = report.rows()
    title = f"{report.model} → {report.expert}"
    yield make_table(title, curve.size_columns(), (curve.size_cells(point) for point in rows))
    yield make_table(
        None,
        ("ratio", *curve.quality_columns(report)),
        ((curve.ratio_label(point), *curve.quality_cells(point)) for point in rows),
    )
    yield from (Text(note) for note in curve.curve_notes(report))
    if report.frontier:
        yield from _frontier_tables(report)


def _frontier_tables(report: SweepReport) -> Iterator[RenderableType]:
    """Lay out what each size costs and gives in each export; what nobody should choose is grey."""
    from cusprun.pipeline import frontier_tables as frontier

    points = report.frontier
    yield make_table(
        "Exports",
        frontier.frontier_columns(report, with_speed=False),
        (frontier.frontier_cells(report, point, with_speed=False) for point in points),
        dimmed=[number for number, point in enumerate(points) if frontier.is_greyed(point)],
    )
    kinds = (frontier.DECODE, frontier.PROMPT)
    speeds = list(frontier.speed_rows(report, kinds))
    if speeds:
        yield make_table(None, frontier.speed_columns(kinds), speeds)
    yield from (Text(note) for note in frontier.frontier_notes(report))
