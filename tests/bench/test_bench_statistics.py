from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.bench.records import METRICS, NO_DIFFERENCE, TOO_FEW_PAIRS, Interval, Measurement, Memory
from serve.bench.statistics import (
    bootstrap_interval,
    compare,
    median_interval,
    order_statistic_rank,
    quantile,
    reduce_run,
    spread,
    verdict,
)

LATENCY = next(metric for metric in METRICS if metric.name == "time_to_first_token_ms")
SPEED = next(metric for metric in METRICS if metric.name == "decode_tokens_per_second")
MEMORY = next(metric for metric in METRICS if metric.name == "peak_memory_bytes")
positive = st.floats(0.01, 1000.0)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("count", range(1, 15))
def test_rank_is_the_largest_that_covers_by_counting_every_sign_pattern(count: int) -> None:
    """Each value lies below or above the median with equal chance: 2**n equally likely patterns."""

    def coverage(rank: int) -> float:
        hits = 0
        for signs in itertools.product((0, 1), repeat=count):
            hits += rank < sum(signs) < count - rank
        return hits / 2**count

    rank = order_statistic_rank(count)
    covering = [k for k in range((count + 1) // 2) if coverage(k) >= 0.95]
    assert rank == max(covering, default=0)


def test_six_and_nine_pairs_are_the_thresholds_that_the_options_promise() -> None:
    assert 1 - 2 * 0.5**5 < 0.95 <= 1 - 2 * 0.5**6
    assert [order_statistic_rank(n) for n in (6, 8, 9)] == [0, 0, 1]


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 4.0, 8.0, 16.0], [3.0, 1.0, 2.0, 9.0], [5.0, 5.0, 5.0, 7.0, 7.0]]
)
def test_bootstrap_agrees_with_every_possible_resample(values: list[float]) -> None:
    exact = [statistics.median(draw) for draw in itertools.product(values, repeat=len(values))]
    low, high = bootstrap_interval(values, seed=3, resamples=20_000)
    for end, tail in ((low, 0.025), (high, 0.975)):
        below = sum(median < end for median in exact) / len(exact)
        up_to = sum(median <= end for median in exact) / len(exact)
        assert below - 0.006 <= tail <= up_to + 0.006


@given(positive, st.integers(1, 12), st.floats(0, 1))
def test_equal_values_come_back_to_the_last_bit(value: float, count: int, share: float) -> None:
    assert quantile([value] * count, share) == value
    assert median_interval([value / value] * count, seed=0) == Interval(1.0, 1.0, 1.0)


@given(st.lists(positive, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_interval_holds_the_median_lies_in_the_range_and_forgets_the_order(
    values: list[float], shuffler: random.Random
) -> None:
    interval = median_interval(values, seed=1)
    assert min(values) <= interval.low <= interval.median <= interval.high <= max(values)
    assert interval.median == float(np.median(values))
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    assert median_interval(shuffled, seed=1) == interval


def test_interval_covers_the_true_median_of_a_skewed_distribution() -> None:
    generator = random.Random(5)
    hits = 0
    for trial in range(100):
        interval = median_interval([generator.expovariate(1.0) for _ in range(9)], seed=trial)
        hits += interval.low <= math.log(2) <= interval.high
    assert hits >= 93  # 96.1 in the mean; fewer than 93 has a chance of 4 %, and the seed is fixed


def test_nine_pairs_outlive_one_disturbed_pair() -> None:
    before = [10.0, 10.1, 9.9, 10.0, 50.0, 10.05, 9.95, 10.0, 10.02]
    after = [8.0, 8.1, 8.0, 7.9, 8.0, 8.05, 7.95, 8.02, 8.0]
    result = compare(LATENCY, before, after, seed=0)
    assert result.verdict == "faster"
    assert 0.78 < result.ratio.low <= result.ratio.high < 0.82


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=10), st.floats(0.1, 10))
def test_ratios_are_taken_pair_by_pair_and_scale_with_the_after_file(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    plain = compare(LATENCY, before, after, seed=0).ratio
    scaled = compare(LATENCY, before, [factor * b for b in after], seed=0).ratio
    assert plain.median == pytest.approx(float(np.median(np.array(after) / np.array(before))))
    assert scaled.median == pytest.approx(factor * plain.median)
    assert (scaled.low, scaled.high) == pytest.approx((factor * plain.low, factor * plain.high))


@pytest.mark.parametrize(
    ("metric", "ratio", "pairs", "said"),
    [
        (LATENCY, Interval(0.8, 0.7, 0.9), 9, "faster"),
        (LATENCY, Interval(1.2, 1.1, 1.3), 9, "slower"),
        (SPEED, Interval(1.2, 1.1, 1.3), 9, "faster"),
        (SPEED, Interval(0.8, 0.7, 0.9), 6, "slower"),
        (SPEED, Interval(0.8, 0.7, 1.0), 9, NO_DIFFERENCE),
        (SPEED, Interval(1.0, 1.0, 1.0), 9, NO_DIFFERENCE),
        (SPEED, Interval(0.8, 0.7, 0.9), 5, TOO_FEW_PAIRS),
        (SPEED, Interval(1.0, 0.7, 1.9), 5, NO_DIFFERENCE),
        (MEMORY, Interval(0.8, 0.799, 0.801), 1, "less"),
    ],
)
def test_verdict(metric, ratio: Interval, pairs: int, said: str) -> None:
    assert verdict(metric, ratio, pairs) == said


@given(st.lists(positive, min_size=1, max_size=50))
def test_reduced_run_against_numpy(latencies: list[float]) -> None:
    measured = Measurement(20.0, 500.0, 502.0, tuple(latencies), 100, 7, 256, Memory(9, 8, 7), "fake")
    run = reduce_run("after", 3, measured)
    assert (run.side, run.pair, run.load_time_ms, run.time_to_first_token_ms) == ("after", 3, 20.0, 502.0)
    assert run.prompt_tokens_per_second == pytest.approx(200.0)
    assert run.decode_tokens_per_second == pytest.approx(1000 / float(np.mean(latencies)))
    found = (run.inter_token_latency_p50_ms, run.inter_token_latency_p90_ms, run.inter_token_latency_p99_ms)
    assert found == pytest.approx(tuple(np.percentile(latencies, [50, 90, 99])))
    assert (run.peak_memory_bytes, run.maxrss_bytes, run.pss_bytes) == (9, 8, 7)


def test_spread_is_the_range_over_the_median() -> None:
    assert spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)
