"""A benchmark as a table for people: plain rows, and the same as text or Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serve.bench.records import METRICS, NO_DIFFERENCE, TOO_FEW_PAIRS, BenchReport, Comparison

SUMMARY_METRICS = (
    "peak_memory_bytes",
    "load_time_ms",
    "time_to_first_token_ms",
    "prompt_tokens_per_second",
    "decode_tokens_per_second",
    "inter_token_latency_p50_ms",
    "inter_token_latency_p99_ms",
)
"""What the short table shows; the report holds every metric."""


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


def bench_table(report: BenchReport, metrics: tuple[str, ...] = SUMMARY_METRICS) -> Table:
    """Lay out a report as rows of metric, before, after and change, with notes on how it was measured."""
    a, b = report.before, report.after
    rows = [
        Row(
            "Parameters",
            format_count(a.num_parameters),
            format_count(b.num_parameters),
            exact_change(a.num_parameters, b.num_parameters, "smaller", "larger"),
        ),
        Row(
            "File size",
            format_bytes(a.file_bytes),
            format_bytes(b.file_bytes),
            exact_change(a.file_bytes, b.file_bytes, "smaller", "larger"),
        ),
    ]
    known = {metric.name: metric for metric in METRICS}
    for name in metrics:
        metric, comparison = known[name], report.comparison(name)
        shown = FORMATS[metric.unit]
        label = f"{metric.label} (tokens/s)" if metric.unit == "tokens/s" else metric.label
        rows.append(
            Row(
                label,
                shown(comparison.before.median),
                shown(comparison.after.median),
                measured_change(comparison),
            )
        )
    return Table(tuple(rows), _notes(report))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _notes(report: BenchReport) -> tuple[str, ...]:
    options, machine = report.options, report.environment
    notes = [
        f"Medians over {_count(report.num_pairs, 'pair')} of fresh processes; the change is the median ratio "
        "of a pair, with its 95 % interval.",
        f"Prompt of {options.num_prompt_tokens} tokens, then {options.num_decode_tokens} tokens one by one "
        f"from a context depth of {options.decode_depth}; {machine.num_threads} threads on "
        f"{machine.cpu_model}.",
    ]
    notes += [
        f"Lost run: pair {lost.pair + 1}, file {lost.side}, {lost.reason}." for lost in report.lost_runs
    ]
    notes += [f"Noisy machine: {sentence}." for sentence in report.noise]
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
