"""Records as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cusprun.checkpoint.inspect import Inspection
    from cusprun.diagnosis import DoctorReport
    from cusprun.quality.report import CorpusQuality, Estimate, EvalReport
    from cusprun.records import Manifest, Plan, Shape
    from exporters.parity_records import ParityReport
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


def make_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table with text to the left in the first and last column, numbers to the right between."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        inner = 0 < position < len(columns) - 1
        table.add_column(column, justify="right" if inner else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
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
        f"({plan.ratio:.1%} were asked for), {plan.total_ratio:.1%} of all parameters"
    )
    yield from (Text(f"- {reason}") for reason in plan.reasons)


def _shape_rows(before: Shape, after: Shape) -> Iterator[tuple[str, str, str, str]]:
    for name in ("intermediate_size", "num_key_value_heads", "num_attention_heads"):
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
        yield Text(f"refit: mean relative output error {before:.2%} to {after:.2%}")


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
