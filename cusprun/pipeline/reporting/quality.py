"""Quality and proofs in a report: perplexities with their ratios, tasks, and the verdict on each export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cusprun.panels import Forest, Mark
from cusprun.pipeline.reporting.wording import change, estimate
from cusprun.quality.report import CorpusQuality, Estimate, EvalReport
from exporters.parity_records import ParityReport
from serve.report.view import Block, Bullets, Grid, Picture, Prose, Section

_SETS = {"held_out": "held-out expert documents", "general": "general text"}


def eval_sections(reports: Sequence[EvalReport]) -> Iterator[Section]:
    """Yield the perplexities of all models, their ratios as a picture, and the tasks."""
    blocks: list[Block] = [
        Prose(
            "Perplexity says how well a model foresees text that it was not calibrated on: lower is better, "
            "and the ratio to the first model is what pruning cost. Intervals are bootstrap intervals over "
            "documents, the same draws for both models."
        )
    ]
    for number, report in enumerate(reports):
        blocks += (_corpus_grid(report, name) for name in report.corpus_names())
        picture = _ratios(report, f"perplexity-{number}")
        blocks += [picture] if picture is not None else []
        blocks += _tasks(report)
    yield Section("quality", "Quality", tuple(blocks))


def _corpus_grid(report: EvalReport, name: str) -> Grid:
    first = report.models[0].corpora[name]
    title = (
        f"{_set_name(name).capitalize()}: {first.documents:,} documents, {first.predicted_tokens:,} tokens"
    )
    columns = ("model", "perplexity", "change", "KL (nats per token)", "same most likely token")
    rows = tuple(
        (model.model, *_cells(model.corpora[name])) for model in report.models if name in model.corpora
    )
    return Grid(title, columns, rows)


def _set_name(name: str) -> str:
    return _SETS.get(name, name.replace("_", "-"))


def _cells(row: CorpusQuality) -> tuple[str, ...]:
    ratio = row.perplexity_ratio
    return (
        estimate(row.perplexity),
        "the reference" if ratio is None else change(ratio.low, ratio.value, ratio.high),
        _optional(row.mean_kl_divergence, ".3f"),
        _optional(row.top1_agreement, ".1%"),
    )


def _optional(value: Estimate | None, form: str) -> str:
    return "" if value is None else estimate(value, form)


def _ratios(report: EvalReport, name: str) -> Picture | None:
    marks, rows = [], []
    for model in report.models[1:]:
        for corpus, row in model.corpora.items():
            ratio = row.perplexity_ratio
            if ratio is None:
                continue
            label = _set_name(corpus) if len(report.models) == 2 else f"{model.model}, {_set_name(corpus)}"
            marks.append(Mark(label, ratio.value, ratio.low, ratio.high, not ratio.low <= 1 <= ratio.high))
            rows.append((label, estimate(ratio, ".3f")))
    if not marks:
        return None
    return Picture(
        name,
        "Perplexity ÷ the original's with 95 % intervals, against 1: to the right of it is worse.",
        (
            Forest(
                "Perplexity ÷ original: left is better",
                "perplexity ÷ original",
                tuple(marks),
                logarithmic=True,
            ),
        ),
        (Grid("Ratios of perplexity", ("documents", "perplexity ÷ original"), tuple(rows)),),
    )


def _tasks(report: EvalReport) -> Iterator[Grid]:
    for position, task in enumerate(report.models[0].tasks):
        rows = []
        for model in report.models:
            if position < len(model.tasks):
                own = model.tasks[position]
                apart = "the reference" if own.difference is None else estimate(own.difference, "+.1%")
                rows.append((model.model, estimate(own.score, ".1%"), apart))
        title = f"Task {task.name}: {task.metric} on {task.documents:,} documents"
        yield Grid(title, ("model", "score", "difference"), tuple(rows))


def parity_sections(reports: Sequence[ParityReport]) -> Iterator[Section]:
    """Yield one row for each proof, and why those failed that did."""
    rows = tuple(
        (
            report.artifact or report.candidate,
            f"{report.format} {report.quant}".strip(),
            "not finite" if report.logits.mean_kl is None else f"{report.logits.mean_kl:.1e}",
            f"{report.logits.top1_agreement:.2%}",
            f"{report.logits.tokens:,}",
            f"{report.text.probe_texts - report.text.mismatch_count} of {report.text.probe_texts}",
            "✓ pass" if report.verdict == "pass" else f"✗ {report.verdict}",
            report.candidate,
        )
        for report in reports
    )
    columns = (
        "artifact", "format", "KL (nats per token)", "same most likely token", "tokens",
        "texts with the same ids", "verdict", "proven in",
    )  # fmt: skip
    failures = tuple(
        f"{report.artifact or report.candidate}: {failure}"
        for report in reports
        for failure in report.failures
    )
    failures += tuple(
        f"{report.artifact or report.candidate}: the first tensor that differs is {report.first_difference}"
        for report in reports
        if report.first_difference
    )
    blocks: list[Block] = [
        Prose(
            "Each export was run in its own runtime and compared with the checkpoint it was made from: token "
            "ids, chat prompts, special tokens and the distribution of the next token."
        ),
        Grid("Proofs", columns, rows, texts=(1, 6, 7)),
    ]
    blocks += [Bullets(failures)] if failures else []
    yield Section("parity", "Exports, and whether they compute the same", tuple(blocks))
