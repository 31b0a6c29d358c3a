"""The result of a recipe in a report: its table, its sample answers, and the commands of its exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cusprun.pipeline.reporting.wording import amount
from cusprun.pipeline.results import RunReport
from cusprun.pipeline.samples import SampleAnswer
from serve.report.view import Answers, Block, Code, Grid, Prose, Section


def run_sections(reports: Sequence[RunReport]) -> Iterator[Section]:
    """Yield the table of each run, its samples and how to make it again."""
    for report in reports:
        rows = tuple((row.metric, row.before, row.after, row.change) for row in report.table.rows)
        title = f"{report.source} → {report.expert}"
        grid = Grid(title, ("what", "before", "after", "change"), rows, texts=(3,), notes=report.table.notes)
        yield Section("table", "Before and after", (grid,))
        if report.samples:
            yield Section("answers", "Answers side by side", tuple(_samples(report.samples)))
        yield Section("reproduce", "How to make it again", tuple(_again(report)))


def _samples(samples: Sequence[SampleAnswer]) -> Iterator[Block]:
    yield Prose(
        "Prompts from the expert's own held-out documents, which nothing was calibrated on. Both models "
        "answer greedily: the most likely token each time. A few answers show the manner, not the quality."
    )
    for number, sample in enumerate(samples, start=1):
        about = f", from the {sample.dimension} documents" if sample.dimension else ""
        yield Answers(
            f"Prompt {number}{about}",
            sample.prompt,
            sample.before,
            sample.after,
            sample.reference,
            f"At most {sample.max_new_tokens} new tokens; an answer that stops in the middle was cut there.",
        )


def _again(report: RunReport) -> Iterator[Block]:
    import yaml

    tree = {
        "model": report.source,
        "expert": "expert.yaml",
        "out": "out",
        "ratio": report.ratio,
        "exports": [
            {"to": file.format, "quant": file.quant} for file in report.artifacts if file.side == "after"
        ],
    }
    text = str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)).rstrip()
    yield Code("recipe.yaml: the whole way; run it with cusprun run recipe.yaml", text)
    if report.artifacts:
        sides = {"before": "original", "after": "expert"}
        rows = tuple(
            (file.file_name, sides.get(file.side, file.side), file.kind, amount(file.file_bytes, "bytes"))
            for file in report.artifacts
        )
        yield Grid("Exports", ("file", "of", "format", "size"), rows, texts=(1, 2))
    if report.seconds:
        seconds = tuple((stage, f"{value:,.1f} s") for stage, value in report.seconds.items())
        yield Grid("Time of the stages of this run", ("stage", "time"), seconds)
