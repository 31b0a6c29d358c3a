"""The mathematics of the benchmark: quantiles, intervals, a test of difference, ratios by pairs. No I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from serve.bench.measurement import Job, Measurement
from serve.bench.metrics import (
    DECODE_ENERGY,
    DECODE_SPEED,
    FIRST_TOKEN,
    LATENCIES,
    LOAD,
    MAPPED,
    PEAK_MEMORY,
    PROMPT_ENERGY,
    PROMPT_SPEED,
    PSS,
    STEADY_MEMORY,
    Metric,
    at,
)
from serve.bench.records import NO_DIFFERENCE, TOO_FEW_PAIRS, Comparison, Interval, Run

CONFIDENCE = 0.95
RESAMPLES = 2000


def quantile(values: Sequence[float], share: float) -> float:
    """Return the quantile by linear interpolation between order statistics (Hyndman and Fan's type 7)."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    # This form, unlike a weighted sum, gives equal neighbours back exactly; min() guards the last bit.
    return min(high, low + (high - low) * (position - below))


def order_statistic_rank(count: int, confidence: float = CONFIDENCE) -> int:
    """Return the largest rank k (from 0) with P(x_(k) <= median <= x_(n-1-k)) >= ``confidence``.

    The number of values under the median is binomial(n, 1/2) whatever their distribution, so the interval
    from the k-th smallest to the k-th largest misses with probability 2 * P(binomial <= k) (the interval
    that belongs to the sign test). 0, the whole range, also when no rank reaches the confidence.
    """
    rank, cumulative = 0, 0.5**count
    while rank + 1 <= (count - 1) // 2:
        cumulative += math.comb(count, rank + 1) * 0.5**count
        if 1 - 2 * cumulative < confidence:
            break
        rank += 1
    return rank


def bootstrap_interval(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the median, reproducible by ``seed``."""
    import numpy as np

    draws = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    medians = np.median(np.asarray(values, np.float64)[draws], axis=1).tolist()
    tail = (1 - CONFIDENCE) / 2
    return quantile(medians, tail), quantile(medians, 1 - tail)


def median_interval(values: Sequence[float], seed: int) -> Interval:
    """Return the median with an interval that covers it in at least 95 % of cases from six values on.

    The bootstrap alone is too narrow for so few values (seven: 87.5 %), so the interval is never narrower
    than that of the order statistics, which holds for any distribution.
    """
    ordered = sorted(values)
    low, high = bootstrap_interval(ordered, seed)
    rank = order_statistic_rank(len(ordered))
    return Interval(statistics.median(ordered), min(low, ordered[rank]), max(high, ordered[-1 - rank]))


def signed_rank_p_value(ratios: Sequence[float]) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test that ratios scatter evenly about 1.

    Exact, from the distribution of the rank sum over all signs of the logarithms, mid-ranks for ties, zeros
    dropped (F. Wilcoxon, Biometrics Bulletin 1, 1945). Which model runs first in a pair is drawn at random,
    so equal models give each sign with probability 1/2 whatever the noise: the test then rejects at level p
    in at most a share p of cases.
    """
    values = [math.log(ratio) for ratio in ratios if ratio != 1]
    if not values:
        return 1.0
    # Rounded, since ln 0.8 and ln 1.25, which tie, differ in their last bits.
    doubled = _doubled_ranks([round(abs(value), 12) for value in values])
    ways = [1] + [0] * sum(doubled)  # ways[s]: sign patterns whose positive ranks add up to s / 2
    for rank in doubled:
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    positive = sum(rank for rank, value in zip(doubled, values, strict=True) if value > 0)
    smaller = min(positive, sum(doubled) - positive)
    return float(min(1.0, 2 * sum(ways[: smaller + 1]) / 2 ** len(values)))


def _doubled_ranks(sizes: Sequence[float]) -> list[int]:
    """Return twice the rank of each value, so that the mean rank of ties is whole."""
    ordered = sorted(sizes)
    first = {size: ordered.index(size) for size in set(sizes)}
    return [2 * first[size] + ordered.count(size) + 1 for size in sizes]


def least_pairs(num_tests: int) -> int:
    """Return the pairs from which ``num_tests`` corrected tests can show a difference at all.

    The smallest p-value of n pairs is 2 / 2**n, times the number of tests for the first of them.
    """
    return math.ceil(math.log2(2 * num_tests / (1 - CONFIDENCE)))


def corrected(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, after Holm (Scandinavian Journal of Statistics 6, 1979).

    The probability that any of them falls to 0.05 without a difference is then at most 0.05.
    """
    found, largest = [0.0] * len(p_values), 0.0
    for done, number in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[number]))
        found[number] = largest
    return found


def nothing_shown(
    ratio: Interval, p_value: float | None, num_pairs: int, least: int, slack: float = 0.0
) -> str | None:
    """Say that a ratio shows no difference, None where it does.

    It does when its interval leaves out 1, and what is within ``slack`` of it, and the corrected p-value is
    at most 0.05; from fewer than ``least`` pairs no test can tell.
    """
    if ratio.low <= 1 + slack and ratio.high >= 1 - slack:
        return NO_DIFFERENCE
    if p_value is not None and p_value > 1 - CONFIDENCE:
        return TOO_FEW_PAIRS if num_pairs < least else NO_DIFFERENCE
    return None


def verdict(metric: Metric, ratio: Interval, p_value: float | None, num_pairs: int, least: int) -> str:
    """Say what the ratio after / before shows about ``metric``.

    For a metric with a resolution there is no test, and the interval must leave out all changes within that.
    """
    found = nothing_shown(ratio, p_value, num_pairs, least, metric.resolution or 0.0)
    if found is not None:
        return found
    improved = (ratio.median < 1) == (metric.better == "lower")
    return metric.better_word if improved else metric.worse_word


def measured_metrics(runs: Sequence[Run], metrics: Sequence[Metric]) -> list[Metric]:
    """Return the metrics that all of the runs have."""
    return [metric for metric in metrics if all(metric.name in run.values for run in runs)]


def tested(metrics: Sequence[Metric]) -> list[Metric]:
    """Return the metrics that a test of difference is made for."""
    return [metric for metric in metrics if metric.resolution is None]


def compare_runs(runs: Sequence[Run], metrics: Sequence[Metric], seed: int) -> tuple[Comparison, ...]:
    """Compare every metric that all of the runs have; they come in complete pairs."""
    ordered = sorted(runs, key=lambda run: run.pair)
    sides = [[run.values for run in ordered if run.side == side] for side in ("before", "after")]
    found = measured_metrics(runs, metrics)
    columns = [[[values[metric.name] for values in side] for side in sides] for metric in found]
    ratios = [[b / a for a, b in zip(before, after, strict=True)] for before, after in columns]
    numbers = [number for number, metric in enumerate(found) if metric in tested(found)]
    p_values: list[float | None] = [None] * len(found)
    for number, value in zip(
        numbers, corrected([signed_rank_p_value(ratios[i]) for i in numbers]), strict=True
    ):
        p_values[number] = value
    num_pairs, least = len(sides[0]), least_pairs(len(numbers)) if numbers else 1
    comparisons = []
    for metric, (before, after), pairs, p_value in zip(found, columns, ratios, p_values, strict=True):
        ratio = median_interval(pairs, seed)
        comparisons.append(
            Comparison(
                metric=metric.name,
                label=metric.label,
                unit=metric.unit,
                better=metric.better,
                before=median_interval(before, seed),
                after=median_interval(after, seed),
                ratio=ratio,
                p_value=p_value,
                verdict=verdict(metric, ratio, p_value, num_pairs, least),
            )
        )
    return tuple(comparisons)


def is_precise(comparisons: Sequence[Comparison], precision: float) -> bool:
    """Whether all ratios are known within ``precision`` of themselves, half a width."""
    ratios = [entry.ratio for entry in comparisons]
    return all((ratio.high - ratio.low) / 2 <= precision * ratio.median for ratio in ratios)


def reduce_run(side: str, pair: int, measured: Measurement, job: Job) -> Run:
    """Reduce what a worker measured to the metrics of a run; what was not counted is absent."""
    values: dict[str, float | None] = {
        LOAD.name: measured.load_time_ms,
        PEAK_MEMORY.name: measured.memory.peak_bytes,
        STEADY_MEMORY.name: measured.memory.rss_bytes,
        PSS.name: measured.memory.pss_bytes,
        MAPPED.name: measured.memory.mapped_file_bytes or None,
        PROMPT_ENERGY.name: _joules_per_token(
            [(timing.prompt_joules, timing.num_prompt_tokens) for timing in measured.timings]
        ),
        DECODE_ENERGY.name: _joules_per_token(
            [(timing.decode_joules, len(timing.latencies_s)) for timing in measured.timings]
        ),
    }
    for timing in measured.timings:
        length = timing.num_prompt_tokens
        if length in job.prompt_lengths:
            values[at(FIRST_TOKEN.name, length)] = 1000 * timing.first_token_s
            values[at(PROMPT_SPEED.name, length)] = length / timing.prefill_s
        if length in job.context_depths:
            latencies = timing.latencies_s
            values[at(DECODE_SPEED.name, length)] = len(latencies) / math.fsum(latencies)
            for share, metric in LATENCIES.items():
                values[at(metric.name, length)] = 1000 * quantile(latencies, share)
    return Run(side, pair, {name: value for name, value in values.items() if value is not None})


def _joules_per_token(parts: Sequence[tuple[float | None, int]]) -> float | None:
    """Return joules per token; None where they are not counted, or the counter did not move meanwhile."""
    counted = [(joules, tokens) for joules, tokens in parts if tokens]
    if not counted or any(joules is None for joules, _ in counted):
        return None
    total = math.fsum(joules or 0.0 for joules, _ in counted)
    return total / sum(tokens for _, tokens in counted) if total > 0 else None


def spread(values: Sequence[float]) -> float:
    """Return the range, largest less smallest, over the median; one disturbed run is enough to show."""
    return (max(values) - min(values)) / statistics.median(values)
