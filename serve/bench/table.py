"""A benchmark as a table for people: plain rows, and the same as text or Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serve.bench.engines import ENGINES
from serve.bench.metrics import DECODE_SPEED, FIRST_TOKEN, LATENCIES, LOAD, PEAK_MEMORY, PROMPT_SPEED
from serve.bench.records import NO_DIFFERENCE, TOO_FEW_PAIRS, Artifact, BenchReport, Comparison, Suite

SUMMARY_METRICS = (
    PEAK_MEMORY.name, LOAD.name, FIRST_TOKEN.name, PROMPT_SPEED.name, DECODE_SPEED.name,
    LATENCIES[0.5].name, LATENCIES[0.99].name,
)  # fmt: skip
"""What the short table shows, at every prompt length and depth; the report holds every metric."""


@dataclass(frozen=True)
class Row:
    """One line: what was measured, its values with units, and the change in words."""

    metric: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Table:
    """Rows and, under them, what a reader must know to trust or repeat them."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def format_bytes(value: float) -> str:
    """Return bytes in decimal megabytes or gigabytes, three or more digits."""
    if value < 1e6:
        return f"{value / 1e3:.1f} kB"
    return f"{value / 1e6:.1f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"


def format_count(value: float) -> str:
    """Return a parameter count in millions or billions."""
    if value < 1e6:
        return f"{value:,.0f}"
    return f"{value / 1e6:.1f} M" if value < 1e9 else f"{value / 1e9:.2f} B"


FORMATS: dict[str, Callable[[float], str]] = {
    "bytes": format_bytes,
    "ms": lambda value: f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms",
    "tokens/s": lambda value: f"{value:,.1f}" if value < 100 else f"{value:,.0f}",
    "J/token": lambda value: f"{value:.3f} J",
}


def exact_change(before: float, after: float, less_word: str, more_word: str) -> str:
    """Return the change of a quantity that has no spread, such as ``↓ 24.6 %, smaller``."""
    if before == after:
        return "same"
    percent = 100 * (after / before - 1)
    return f"{'↓' if percent < 0 else '↑'} {abs(percent):.1f} %, {less_word if percent < 0 else more_word}"


def measured_change(comparison: Comparison) -> str:
    """Return the change with its 95 % interval, such as ``↑ 31.2 % (30.1 to 32.0), faster``."""
    low, middle, high = (
        100 * (ratio - 1) for ratio in (comparison.ratio.low, comparison.ratio.median, comparison.ratio.high)
    )
    if comparison.verdict in (NO_DIFFERENCE, TOO_FEW_PAIRS):
        return f"{comparison.verdict} ({low:+.1f} to {high:+.1f} %)"
    near, far = sorted((abs(low), abs(high)))
    arrow = "↓" if middle < 0 else "↑"
    return f"{arrow} {abs(middle):.1f} % ({near:.1f} to {far:.1f}), {comparison.verdict}"


def bench_table(report: BenchReport, suite: Suite, metrics: tuple[str, ...] = SUMMARY_METRICS) -> Table:
    """Lay out a suite as rows of metric, before, after and change, with notes on how it was measured.

    ``metrics`` are names without prompt length or depth; all of those that were measured are shown.
    """
    rows = _size_rows(suite.before, suite.after)
    wanted = {name: number for number, name in enumerate(metrics)}
    shown = [entry for entry in suite.comparisons if _base(entry) in wanted]
    for entry in sorted(shown, key=lambda entry: wanted[_base(entry)]):
        text = FORMATS[entry.unit]
        label = f"{entry.label} ({entry.unit})" if entry.unit == "tokens/s" else entry.label
        rows.append(Row(label, text(entry.before.median), text(entry.after.median), measured_change(entry)))
    return Table(tuple(rows), suite_notes(report, suite))


def _size_rows(before: Artifact, after: Artifact) -> list[Row]:
    facts = (
        ("Parameters", before.num_parameters, after.num_parameters, format_count),
        ("File size", before.file_bytes, after.file_bytes, format_bytes),
    )
    return [
        Row(name, text(one), text(other), exact_change(one, other, "smaller", "larger"))
        for name, one, other, text in facts
        if one and other
    ]


def _base(entry: Comparison) -> str:
    return entry.metric.partition("@")[0]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def short_library(library: str) -> str:
    """Return a library without what its build says of itself, which the report keeps."""
    return library.partition(":")[0]


def suite_title(suite: Suite) -> str:
    """Return what was measured in what."""
    precision = f" ({suite.before.precision})" if suite.before.precision else ""
    return f"{ENGINES[suite.runtime].label}{precision}"


def suite_notes(report: BenchReport, suite: Suite) -> tuple[str, ...]:
    """Return what a reader must know to trust or repeat a suite."""
    if suite.failure is not None:
        return (f"Not measured: {suite.failure}.",)
    options, machine = report.options, report.environment
    notes = [
        f"Medians over {_count(suite.num_pairs, 'pair')} of fresh processes in "
        f"{short_library(suite.library)}; the change is the median ratio of a pair, with its 95 % interval. "
        f"Measured until: {suite.stopped}.",
        f"{options.num_decode_tokens} tokens decoded one by one; {_count(machine.num_threads, 'thread')} on "
        f"{machine.cpu_model}.",
    ]
    notes += [f"{note}." for note in (suite.roofline.notes if suite.roofline else ())]
    notes += [f"Lost run: pair {lost.pair + 1}, {lost.side}, {lost.reason}." for lost in suite.lost_runs]
    notes += [f"Noisy machine: {sentence}." for sentence in suite.noise]
    return tuple(notes)


_HEADER = Row("", "before", "after", "change")


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.metric, row.before, row.after, row.change


def to_text(table: Table) -> str:
    """Return the table in aligned columns, numbers to the right."""
    cells = [_cells(row) for row in (_HEADER, *table.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {before:>{widths[1]}}  {after:>{widths[2]}}  {change}".rstrip()
        for name, before, after, change in cells
    ]
    return "\n".join([*lines, "", *table.notes]) + "\n"


def to_markdown(table: Table) -> str:
    """Return the table and its notes in Markdown."""
    lines = ["| | before | after | change |", "|---|---:|---:|---|"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in table.rows
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]) + "\n"
