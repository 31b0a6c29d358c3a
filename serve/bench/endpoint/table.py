"""A load test as tables for people: plain cells, and the same as text or Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from serve.bench.endpoint.records import (
    OK,
    EndpointReport,
    LevelResult,
    LevelSummary,
    LoadComparison,
    LoadOptions,
    Quantiles,
)
from serve.bench.endpoint.summary import METRICS, least_pairs_of
from serve.bench.endpoint.timeline import FROM_TOKENIZER
from serve.bench.records import NO_DIFFERENCE, TOO_FEW_PAIRS

SHOWN_METRICS = (
    "requests_per_second",
    "output_tokens_per_second",
    "goodput_per_second",
    "time_to_first_token_p50_ms",
    "time_per_output_token_p50_ms",
    "end_to_end_latency_p50_ms",
)
"""What the table of a comparison shows; the report holds every metric."""

PACK = "pack "
"""How the source of prompts that were made, to the asked length, begins; others are a file's name."""

_UNKNOWN = "–"
_BUNDLED = 1.1  # tokens to an event with text, from which on a reader must know
_TAIL_REQUESTS = 100  # below it, the 99th percentile is the largest value or near it
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class LoadTable:
    """Cells under a title, and what a reader must know to trust them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def letter(endpoint: int) -> str:
    """Return what tables call the endpoint in this place: A, B and so on."""
    return _LETTERS[endpoint] if endpoint < len(_LETTERS) else str(endpoint + 1)


def load_tables(report: EndpointReport) -> tuple[LoadTable, ...]:
    """Lay out a report: the levels of each endpoint, then each comparison, then the notes with the last."""
    tables = [_level_table(report, place) for place in range(len(report.endpoints))]
    tables += [_comparison_table(report, place) for place in range(1, len(report.endpoints))]
    last = tables[-1]
    tables[-1] = LoadTable(last.title, last.columns, last.rows, (*last.notes, *_notes(report)))
    return tuple(tables)


def _level_table(report: EndpointReport, place: int) -> LoadTable:
    endpoint = report.endpoints[place]
    has_goal = _has_goal(report.options)
    own = [result for result in report.results if result.endpoint == place]
    goal = ("good/s",) if has_goal else ()
    return LoadTable(
        title=f"{letter(place)}: {endpoint.model} at {endpoint.url}, {endpoint.route}",
        columns=("load", "", *_LATENCIES, "requests/s", "tokens/s", *goal, "requests"),
        rows=tuple(row for result in own for row in _level_rows(result, has_goal)),
        notes=(*(note for result in own for note in _level_notes(report, result)), *_bundling_note(own)),
    )


_LATENCIES: Mapping[str, Callable[[LevelSummary], Quantiles | None]] = {
    "TTFT ms": lambda summary: summary.time_to_first_token_ms,
    "ITL ms": lambda summary: summary.inter_token_latency_ms,
    "TPOT ms": lambda summary: summary.time_per_output_token_ms,
    "E2E ms": lambda summary: summary.end_to_end_latency_ms,
}


def _level_rows(result: LevelResult, has_goal: bool) -> Iterator[tuple[str, ...]]:
    """Yield a row for each percentile; what a level has one of stands in the first."""
    summary = result.summary
    rates = [summary.requests_per_second, summary.output_tokens_per_second]
    rates += [summary.goodput_per_second] if has_goal else []
    once = (*map(_rate, rates), outcome(summary))
    for share in ("p50", "p90", "p99"):
        found = (read(summary) for read in _LATENCIES.values())
        latencies = (_UNKNOWN if one is None else _ms(getattr(one, share)) for one in found)
        is_first = share == "p50"
        label, rest = (result.level.label, once) if is_first else ("", ("",) * len(once))
        yield (label, share, *latencies, *rest)


def outcome(summary: LevelSummary) -> str:
    """Say how the requests of a level ended, such as ``32 ok`` or ``30 ok, 2 stalled``."""
    parts = [f"{summary.ok} ok", *(f"{count} {status}" for status, count in summary.failures.items())]
    if summary.unsent:
        parts.append(f"{summary.unsent} not sent")
    return ", ".join(parts)


def _has_goal(options: LoadOptions) -> bool:
    return options.goodput_ttft_ms is not None or options.goodput_tpot_ms is not None


def _rate(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def _ms(value: float) -> str:
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _level_notes(report: EndpointReport, result: LevelResult) -> Iterator[str]:
    """Yield what happened at a level, the first reason of each kind of failure with it."""
    label = f"{letter(result.endpoint)}, {result.level.label}"
    summary = result.summary
    requests = [
        request
        for run in report.runs
        if (run.endpoint, run.level) == (result.endpoint, result.level)
        for request in run.requests
    ]
    for status, count in summary.failures.items():
        reason = next(request.reason for request in requests if request.status == status)
        yield f"{label}: {count} {status}: {reason}."
    if summary.unsent:
        yield f"{label}: {summary.unsent} requests were not sent, because those before them hung."
    if summary.client_was_late:
        yield (
            f"{label}: the client itself was the bottleneck: it sent its requests up to "
            f"{_ms(summary.lateness_p99_ms)} ms late (p99), so these latencies are partly its own."
        )


def _bundling_note(own: Sequence[LevelResult]) -> Iterator[str]:
    """Say where inter-token latency is not what its name says."""
    bundles = [
        result.summary.mean_output_tokens / result.summary.mean_content_chunks
        for result in own
        if result.summary.mean_output_tokens is not None and result.summary.mean_content_chunks
    ]
    if bundles and max(bundles) > _BUNDLED:
        yield (
            f"{letter(own[0].endpoint)}: an event with text holds up to {max(bundles):.1f} tokens on "
            "average, so ITL is the time between events; TPOT counts tokens."
        )


def _comparison_table(report: EndpointReport, place: int) -> LoadTable:
    own = [comparison for comparison in report.comparisons if comparison.endpoint == place]
    shown = [entry for entry in own if entry.metric in SHOWN_METRICS and entry.ratio is not None]
    first, later = letter(0), letter(place)
    return LoadTable(
        title=f"{later} against {first}",
        columns=("load", "", first, later, f"{later} / {first}"),
        rows=tuple(_comparison_row(entry) for entry in shown),
        notes=() if shown else ("No pair of runs is without failed requests.",),
    )


def _comparison_row(entry: LoadComparison) -> tuple[str, ...]:
    metric = next(metric for metric in METRICS if metric.name == entry.metric)
    assert entry.first is not None
    assert entry.later is not None
    shown = _ms if metric.unit == "ms" else _rate
    unit = "ms" if metric.unit == "ms" else "per s"
    return (
        "all levels" if entry.level is None else entry.level.label,
        f"{metric.label}, {unit}",
        shown(entry.first.median),
        shown(entry.later.median),
        change(entry),
    )


def change(entry: LoadComparison) -> str:
    """Return a ratio with its interval in words, such as ``1.31 (1.22 to 1.40), slower``."""
    assert entry.ratio is not None
    middle, low, high = (f"{value:.3f}" for value in (entry.ratio.median, entry.ratio.low, entry.ratio.high))
    if entry.verdict in (NO_DIFFERENCE, TOO_FEW_PAIRS):
        return f"{entry.verdict} ({low} to {high})"
    return f"{middle} ({low} to {high}), {entry.verdict}"


def _notes(report: EndpointReport) -> Iterator[str]:
    options = report.options
    rounds = options.num_rounds(len(report.endpoints))
    yield (
        "TTFT is the time to first token, ITL the inter-token latency, TPOT the time per output token, E2E "
        "the end-to-end latency, of the requests that ended well."
    )
    made = report.prompts.startswith(PACK)
    length = f" of about {options.prompt_tokens} tokens" if made else ""
    yield (
        f"{options.requests} requests a level and round, "
        f"{rounds} {'round' if rounds == 1 else 'rounds'}, prompts{length} from {report.prompts}, "
        f"answers of at most {options.output_tokens} tokens."
    )
    if options.requests * rounds < _TAIL_REQUESTS:
        yield f"With fewer than {_TAIL_REQUESTS} requests a level, p99 is its largest value or near it."
    yield from _usage_notes(report)
    if len(report.endpoints) > 1:
        yield (
            "Ratios are formed pair by pair, a pair being two runs of one level in one round; the median "
            "with its 95 % interval. A difference is named where that leaves out 1 and Wilcoxon's "
            "signed-rank test, corrected after Holm, shows it too."
        )
        alone = [entry for entry in report.comparisons if (entry.endpoint, bool(entry.level)) == (1, True)]
        least = least_pairs_of(alone)
        if rounds < least:
            yield f"A level alone shows a difference from {least} rounds on (--rounds {least})."
    if not report.is_complete:
        yield "The load test was interrupted; this is what had ended."


def _usage_notes(report: EndpointReport) -> Iterator[str]:
    for place, endpoint in enumerate(report.endpoints):
        own = [r for run in report.runs if run.endpoint == place for r in run.requests]
        if any(r.status == OK and r.output_tokens is None for r in own):
            yield (
                f"{letter(place)} does not state how many tokens it sent, so its token rates are unknown; "
                "--tokenizer counts them."
            )
        if any(r.tokens_from == FROM_TOKENIZER for r in own):
            yield f"{letter(place)}: tokens counted by {report.tokenizer}, since usage was absent."
        if not endpoint.ignores_eos:
            yield f"{letter(place)} does not take ignore_eos: its answers may be shorter than asked."


def to_text(tables: Sequence[LoadTable]) -> str:
    """Return the tables in aligned columns, numbers to the right."""
    return "\n".join(_text(table) for table in tables)


def _text(table: LoadTable) -> str:
    cells = [table.columns, *table.rows]
    last = len(table.columns) - 1
    widths = [max(len(row[i]) for row in cells) for i in range(last + 1)]
    lines = [
        "  ".join(
            f"{cell:>{widths[i]}}" if 0 < i < last else f"{cell:<{widths[i]}}" for i, cell in enumerate(row)
        ).rstrip()
        for row in cells
    ]
    notes = ["", *table.notes] if table.notes else []
    return "\n".join([table.title, *lines, *notes]) + "\n"


def to_markdown(tables: Sequence[LoadTable]) -> str:
    """Return the tables and their notes in Markdown."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: LoadTable) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---", *["---:"] * (len(table.columns) - 2), "---"]) + "|"
    notes = ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return (
        "\n".join([f"**{table.title}**", "", line(table.columns), rule, *map(line, table.rows), *notes])
        + "\n"
    )
