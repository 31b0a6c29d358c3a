"""Benchmarks in a report: every metric before and after, the plots, the machine and the method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cusprun.panels import BARRED, Forest, Line, Mark, Panel
from cusprun.pipeline.reporting.wording import (
    amount,
    counted,
    interval,
    metric_base,
    metric_label,
    metric_tokens,
    number,
    ratio,
    shown,
    suite_name,
)
from serve.bench.records import Artifact, BenchReport, Comparison, Roofline, Suite
from serve.report.view import Block, Bullets, Grid, Heading, Picture, Prose, Section

_OVER_LENGTH = {
    "prompt_tokens_per_second": ("Prompt processing", "prompt length (tokens)", "tokens per second"),
    "decode_tokens_per_second": ("Decoding", "tokens in the cache", "tokens per second"),
    "time_to_first_token_ms": ("Time to first token", "prompt length (tokens)", "ms"),
    "inter_token_latency_p99_ms": ("Slowest tokens (p99)", "tokens in the cache", "ms"),
}
"""What is drawn over the lengths that it was measured at: title, horizontal and vertical axis."""

_APART = 0.06  # of a step between two lengths: error bars of both models stay beside each other


def bench_sections(reports: Sequence[BenchReport]) -> Iterator[Section]:
    """Yield every measurement, the plots of it, and what the hardware allows."""
    suites = [suite for report in reports for suite in report.suites]
    yield Section("measured", "Every measurement", tuple(_measured(suites)))
    drawn = [
        block
        for number_, suite in enumerate(suites)
        if suite.comparisons
        for block in _pictures(suite, f"speed-{number_}")
    ]
    if drawn:
        yield Section("speed", "Speed, latency and memory in pictures", tuple(drawn))


def title_of(suite: Suite) -> str:
    """Return what a report calls a suite: the library without how it was built, the runtime and precision."""
    return f"{suite.library.partition(': ')[0] or suite.runtime} ({suite_name(suite)})"


def _measured(suites: Sequence[Suite]) -> Iterator[Block]:
    if any(suite.comparisons for suite in suites):
        yield Prose(
            "Medians over runs in fresh processes, with 95 % intervals in brackets. Ratios are after ÷ "
            "before, pair by pair; where their interval contains 1, no difference was shown."
        )
    for suite in suites:
        if suite.failure is None:
            yield _artifact_grid(suite)
        yield _comparison_grid(suite)


def _artifact_grid(suite: Suite) -> Grid:
    sides = (("before", suite.before), ("after", suite.after))
    return Grid(
        f"The files measured in {title_of(suite)}",
        ("side", "file", "size", "parameters", "bits per weight", "precision"),
        tuple(_artifact_row(side, artifact) for side, artifact in sides),
        texts=(1, 5),
    )


def _artifact_row(side: str, artifact: Artifact) -> tuple[str, ...]:
    from serve.bench.table import format_count

    count, bits = artifact.num_parameters, artifact.bits_per_weight
    return (
        side,
        artifact.file_name,
        amount(artifact.file_bytes, "bytes"),
        "not counted" if count is None else format_count(count),
        "not counted" if bits is None else f"{bits:.2f}",
        artifact.precision or "",
    )


def _comparison_grid(suite: Suite) -> Grid:
    columns = ("what", "before", "after", "after ÷ before", "verdict")
    title = f"Before and after in {title_of(suite)}"
    if suite.failure is not None:
        rows: tuple[tuple[str, ...], ...] = (("everything", "", "", "", f"failed: {suite.failure}"),)
        return Grid(title, columns, rows, texts=(4,))
    rows = tuple(
        (
            metric_label(one),
            interval(one.before, one.unit),
            interval(one.after, one.unit),
            ratio(one.ratio),
            _verdict_text(one),
        )
        for one in suite.comparisons
    )
    return Grid(f"{title}, {counted(suite.num_pairs, 'pair')} of runs", columns, rows, texts=(4,))


def _verdict_text(comparison: Comparison) -> str:
    chance = "" if comparison.p_value is None else f" (p = {comparison.p_value:.2g})"
    return f"{comparison.verdict}{chance}"


def _pictures(suite: Suite, name: str) -> Iterator[Block]:
    yield Heading(title_of(suite))
    panels = tuple(_length_panels(suite))
    if panels:
        measured = [one for one in suite.comparisons if metric_base(one.metric) in _OVER_LENGTH]
        yield Picture(
            f"{name}-lengths",
            f"Speed and latency of both models in {title_of(suite)} by prompt length and context depth, with "
            "95 % intervals as error bars.",
            panels,
            (_lengths_grid(suite, measured),),
        )
    yield _ratio_picture(suite, f"{name}-ratios")
    if suite.roofline is not None and suite.roofline.bounds:
        yield from _roofline(suite, suite.roofline, f"{name}-roofline")


def _length_panels(suite: Suite) -> Iterator[Panel]:
    for base, (title, x_label, y_label) in _OVER_LENGTH.items():
        found = [one for one in suite.comparisons if metric_base(one.metric) == base and "@" in one.metric]
        found.sort(key=lambda one: metric_tokens(one.metric) or 0)
        if not found:
            continue
        yield Panel(
            title=title,
            x_label=x_label,
            y_label=y_label,
            lines=tuple(_side_line(side, found, shift) for side, shift in (("before", -1), ("after", 1))),
            # From 0, so that a difference looks as large as it is.
            limits=(0.0, 1.12 * max(max(one.before.high, one.after.high) for one in found)),
            dots=True,
            ticks=tuple(f"{metric_tokens(one.metric) or 0:,}" for one in found),
        )


def _side_line(side: str, comparisons: Sequence[Comparison], shift: int) -> Line:
    spreads = [one.before if side == "before" else one.after for one in comparisons]
    return Line(
        label=side,
        x=tuple(place + shift * _APART for place in range(len(spreads))),
        y=tuple(spread.median for spread in spreads),
        low=tuple(spread.low for spread in spreads),
        high=tuple(spread.high for spread in spreads),
        look=BARRED,
    )


def _lengths_grid(suite: Suite, comparisons: Sequence[Comparison]) -> Grid:
    rows = (
        (metric_label(one), interval(one.before, one.unit), interval(one.after, one.unit))
        for one in comparisons
    )
    return Grid(f"By length, in {title_of(suite)}", ("what", "before", "after"), tuple(rows))


def _ratio_picture(suite: Suite, name: str) -> Picture:
    panels = []
    for better in ("higher", "lower"):
        marks = tuple(
            Mark(metric_label(one), one.ratio.median, one.ratio.low, one.ratio.high, shown(one))
            for one in suite.comparisons
            if one.better == better
        )
        if marks:
            title = f"{better.capitalize()} is better"
            panels.append(Forest(title, "after ÷ before", marks, logarithmic=True))
    rows = tuple((metric_label(one), ratio(one.ratio), one.verdict) for one in suite.comparisons)
    return Picture(
        name,
        f"Ratios after ÷ before in {title_of(suite)} with 95 % intervals, against 1; filled where a "
        "difference was shown, hollow where none was.",
        tuple(panels),
        (Grid(f"Ratios in {title_of(suite)}", ("what", "after ÷ before", "verdict"), rows, texts=(2,)),),
    )


def _roofline(suite: Suite, roofline: Roofline, name: str) -> Iterator[Block]:
    labels = {one.metric: metric_label(one) for one in suite.comparisons}
    marks, rows = [], []
    for bound in roofline.bounds:
        label = f"{labels.get(bound.metric, bound.metric)}, {bound.side}"
        marks.append(Mark(label, bound.reached, bound.reached, bound.reached))
        rows.append(
            (
                label,
                amount(bound.bytes_per_token, "bytes"),
                f"{bound.flops_per_token:.3g}",
                f"{number(bound.limit_tokens_per_second)} tokens/s",
                f"{bound.reached:.0%}",
                bound.bound_by,
            )
        )
    first = roofline.bounds[0]
    rates = {
        one.side: f"{amount(one.bandwidth_bytes_per_second, 'bytes')} per second" for one in roofline.bounds
    }
    reading = " and ".join(f"{rate} ({side})" for side, rate in rates.items())
    yield Prose(
        f"What the hardware allows is the slower of reading the bytes of each token at {reading} and "
        f"computing its operations at {first.flops_per_second / 1e9:,.1f} billion per second, both measured "
        "on this machine; weights that fit into a cache are read faster."
    )
    columns = ("speed", "bytes per token", "operations per token", "limit", "reached", "bound by")
    yield Picture(
        name,
        f"Share of what this machine allows that each speed reached in {title_of(suite)}; 1 is the limit.",
        (Forest("Reached of what the hardware allows", "share of the limit", tuple(marks), from_zero=True),),
        (Grid(f"Limits in {title_of(suite)}", columns, tuple(rows), texts=(5,)),),
    )
    if roofline.notes:
        yield Bullets(tuple(f"{note.rstrip('.')}." for note in roofline.notes))
