"""The mathematics of the benchmark: quantiles, intervals of a median, ratios pair by pair. No I/O."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from serve.bench.records import (
    METRICS,
    NO_DIFFERENCE,
    TOO_FEW_PAIRS,
    Comparison,
    Interval,
    Measurement,
    Metric,
    Run,
    metric_value,
)

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
    generator = random.Random(seed)
    medians = [statistics.median(generator.choices(values, k=len(values))) for _ in range(resamples)]
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


def verdict(metric: Metric, ratio: Interval, num_pairs: int) -> str:
    """Say what the ratio after / before shows about ``metric``."""
    if ratio.low <= 1 <= ratio.high:
        return NO_DIFFERENCE
    if num_pairs < metric.min_pairs:
        return TOO_FEW_PAIRS
    improved = (ratio.median < 1) == (metric.better == "lower")
    return metric.better_word if improved else metric.worse_word


def compare(metric: Metric, before: Sequence[float], after: Sequence[float], seed: int) -> Comparison:
    """Compare one metric; ``before[i]`` and ``after[i]`` were measured in the same pair."""
    ratio = median_interval([b / a for a, b in zip(before, after, strict=True)], seed)
    return Comparison(
        metric=metric.name,
        before=median_interval(before, seed),
        after=median_interval(after, seed),
        ratio=ratio,
        verdict=verdict(metric, ratio, len(before)),
    )


def compare_runs(runs: Sequence[Run], seed: int) -> tuple[Comparison, ...]:
    """Compare every metric of complete pairs of runs."""
    ordered = sorted(runs, key=lambda run: run.pair)
    before = [run for run in ordered if run.side == "before"]
    after = [run for run in ordered if run.side == "after"]
    return tuple(
        compare(
            metric,
            [metric_value(run, metric.name) for run in before],
            [metric_value(run, metric.name) for run in after],
            seed,
        )
        for metric in METRICS
    )


def reduce_run(side: str, pair: int, measured: Measurement) -> Run:
    """Reduce what a worker measured to the metrics of a run."""
    latencies = measured.inter_token_latencies_ms
    return Run(
        side=side,
        pair=pair,
        load_time_ms=measured.load_time_ms,
        time_to_first_token_ms=measured.time_to_first_token_ms,
        prompt_tokens_per_second=1000 * measured.num_prompt_tokens / measured.prefill_ms,
        decode_tokens_per_second=1000 * len(latencies) / math.fsum(latencies),
        inter_token_latency_p50_ms=quantile(latencies, 0.5),
        inter_token_latency_p90_ms=quantile(latencies, 0.9),
        inter_token_latency_p99_ms=quantile(latencies, 0.99),
        peak_memory_bytes=measured.memory.peak_bytes,
        maxrss_bytes=measured.memory.maxrss_bytes,
        pss_bytes=measured.memory.pss_bytes,
    )


def spread(values: Sequence[float]) -> float:
    """Return the range, largest less smallest, over the median; one disturbed run is enough to show."""
    return (max(values) - min(values)) / statistics.median(values)
