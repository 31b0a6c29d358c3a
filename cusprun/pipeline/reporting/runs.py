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
        if report.artifacts:
            yield Section("parity", "Exports, and whether they compute the same", (_exports(report),))
        yield Section("reproduce", "How to make it again", (_recipe(report),))


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


def _recipe(report: RunReport) -> Code:
    import yaml

    exports = [{"to": file.format, "quant": file.quant} for file in report.artifacts if file.side == "after"]
    told = report.recipe or {"ratio": report.ratio, "exports": exports}
    tree = {"model": report.source, "expert": "expert.yaml", "out": "out", **told}
    text = str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)).rstrip()
    took = f"; its stages took {sum(report.seconds.values()):,.0f} s" if report.seconds else ""
    return Code(f"recipe.yaml: the whole way, by cusprun run recipe.yaml{took}", text)


def _exports(report: RunReport) -> Grid:
    sides = {"before": "original", "after": "expert"}
    rows = tuple(
        (file.file_name, sides.get(file.side, file.side), file.kind, amount(file.file_bytes, "bytes"))
        for file in report.artifacts
    )
    return Grid("Exports", ("file", "of", "format", "size"), rows, texts=(1, 2))
