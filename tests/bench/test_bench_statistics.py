from __future__ import annotations

import itertools
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.bench.measurement import Job, Measurement, Memory, Timing
from serve.bench.metrics import FIRST_TOKEN, PEAK_MEMORY, Metric, metrics_of
from serve.bench.records import NO_DIFFERENCE, TOO_FEW_PAIRS, BenchOptions, Comparison, Interval, Run
from serve.bench.statistics import (
    bootstrap_interval,
    compare_runs,
    corrected,
    is_precise,
    least_pairs,
    median_interval,
    order_statistic_rank,
    quantile,
    reduce_run,
    signed_rank_p_value,
    spread,
    verdict,
)

OPTIONS = BenchOptions(prompt_lengths=(100,), context_depths=(100,))
LATENCY = FIRST_TOKEN.at(100)
SPEED = next(metric for metric in metrics_of(OPTIONS) if metric.name == "decode_tokens_per_second@100")
JOB = Job("vllm", "m", (100,), (100,), 1, None, 1, 0)
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


def compare(metric: Metric, before: list[float], after: list[float], seed: int) -> Comparison:
    sides = {"before": before, "after": after}
    runs = [Run(side, i, {metric.name: v}) for side, values in sides.items() for i, v in enumerate(values)]
    (found,) = compare_runs(runs, [metric], seed)
    return found


@given(st.lists(st.sampled_from([0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0]), min_size=1, max_size=9))
def test_signed_rank_p_value_by_counting_every_sign_pattern(ratios: list[float]) -> None:
    """0.5 and 2, 0.8 and 1.25 are ties in size; 1 is dropped."""
    sizes = [abs(math.log(ratio)) for ratio in ratios if ratio != 1]
    ranks = [
        statistics.mean(i + 1 for i, other in enumerate(sorted(sizes)) if abs(other - size) < 1e-12)
        for size in sizes
    ]
    found = sum(r for r, ratio in zip(ranks, (x for x in ratios if x != 1), strict=True) if ratio > 1)
    far = abs(found - sum(ranks) / 2)
    patterns = list(itertools.product((0, 1), repeat=len(ranks)))
    sums = [sum(sign * rank for sign, rank in zip(signs, ranks, strict=True)) for signs in patterns]
    expected = sum(abs(total - sum(ranks) / 2) >= far - 1e-9 for total in sums) / len(patterns)
    assert signed_rank_p_value(ratios) == pytest.approx(expected)


def test_signed_rank_p_value_of_a_published_example() -> None:
    """Differences of n = 8, positive rank sum 3 or less in 5 of 256 patterns: p = 10 / 256."""
    logs = [-0.3, 0.1, 0.2, -0.4, -0.5, -0.6, -0.7, -0.8]  # positive ranks 1 and 2
    assert signed_rank_p_value([math.exp(x) for x in logs]) == pytest.approx(10 / 256)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_corrected_p_values_follow_holms_steps(p_values: list[float]) -> None:
    """Holm rejects hypotheses from the smallest on while p <= 0.05 / (how many are left)."""
    rejected = set()
    for left, number in zip(
        range(len(p_values), 0, -1), sorted(range(len(p_values)), key=p_values.__getitem__), strict=True
    ):
        if left * p_values[number] > 0.05:
            break
        rejected.add(number)
    assert {i for i, p in enumerate(corrected(p_values)) if p <= 0.05} == rejected


@pytest.mark.parametrize("num_tests", range(1, 60))
def test_least_pairs_by_trying(num_tests: int) -> None:
    pairs = least_pairs(num_tests)
    assert corrected([signed_rank_p_value([1.1 + i for i in range(pairs)])] * num_tests)[0] <= 0.05
    assert corrected([signed_rank_p_value([1.1 + i for i in range(pairs - 1)])] * num_tests)[0] > 0.05


def test_equal_models_show_a_difference_in_at_most_one_benchmark_of_twenty() -> None:
    """All metrics of a run share its noise, half of their variance, as on a real machine."""
    generator, metrics = random.Random(7), metrics_of(BenchOptions())[:13]
    wrong = 0
    for trial in range(200):
        runs = []
        for pair in range(10):
            for side in ("before", "after"):
                shared = generator.gauss(0, 0.03)
                values = {m.name: math.exp(shared + generator.gauss(0, 0.03)) for m in metrics}
                runs.append(Run(side, pair, values))
        wrong += any(entry.verdict != NO_DIFFERENCE for entry in compare_runs(runs, metrics, trial))
    assert wrong <= 16  # 10 in the mean at most; more than 16 has a chance of 2.4 %, and the seed is fixed


def test_precision_is_half_the_width_of_the_ratio() -> None:
    steady = compare(SPEED, [100.0] * 9, [98.0, 102.0, *[100.0] * 7], seed=0)
    wide = compare(SPEED, [100.0] * 9, [90.0, 110.0] * 4 + [100.0], seed=0)
    assert is_precise([steady, wide], 0.2)
    assert is_precise([steady], 0.01)
    assert not is_precise([steady, wide], 0.05)
    assert is_precise([], 0.05)


def test_six_pairs_are_the_least_with_an_interval_and_nine_outlive_one() -> None:
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
    assert result.p_value == pytest.approx(2 / 2**9)
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
    ("metric", "ratio", "p_value", "pairs", "said"),
    [
        (LATENCY, Interval(0.8, 0.7, 0.9), 0.01, 9, "faster"),
        (LATENCY, Interval(1.2, 1.1, 1.3), 0.05, 9, "slower"),
        (SPEED, Interval(1.2, 1.1, 1.3), 0.01, 9, "faster"),
        (SPEED, Interval(0.8, 0.7, 0.9), 0.01, 8, "slower"),
        (SPEED, Interval(0.8, 0.7, 1.0), 0.01, 9, NO_DIFFERENCE),
        (SPEED, Interval(1.0, 1.0, 1.0), 1.0, 9, NO_DIFFERENCE),
        (SPEED, Interval(0.8, 0.7, 0.9), 0.06, 9, NO_DIFFERENCE),
        (SPEED, Interval(0.8, 0.7, 0.9), 0.06, 7, TOO_FEW_PAIRS),
        (SPEED, Interval(1.0, 0.7, 1.9), 0.5, 5, NO_DIFFERENCE),
        (PEAK_MEMORY, Interval(0.8, 0.799, 0.801), None, 1, "less"),
        (PEAK_MEMORY, Interval(1.2, 1.2, 1.2), None, 1, "more"),
        (PEAK_MEMORY, Interval(0.996, 0.9955, 0.997), None, 9, NO_DIFFERENCE),
    ],
)
def test_verdict(metric: Metric, ratio: Interval, p_value: float | None, pairs: int, said: str) -> None:
    assert verdict(metric, ratio, p_value, pairs, least=8) == said


@given(st.lists(positive, min_size=1, max_size=50))
def test_reduced_run_against_numpy(latencies: list[float]) -> None:
    timings = (Timing(100, 0.5, 0.502, tuple(latencies), 3.0, 8.0), Timing(200, 1.6, 1.7, (), 6.0, 0.0))
    measured = Measurement(20.0, timings, 7, 256, Memory(9, 8, 7, 6), "fake")
    run = reduce_run("after", 3, measured, Job("llamacpp", "m", (100, 200), (100,), 4, None, 1, 0))
    assert (run.side, run.pair) == ("after", 3)
    expected = {
        "load_time_ms": 20.0,
        "time_to_first_token_ms@100": 502.0,
        "time_to_first_token_ms@200": 1700.0,
        "prompt_tokens_per_second@100": 200.0,
        "prompt_tokens_per_second@200": 125.0,
        "decode_tokens_per_second@100": 1 / float(np.mean(latencies)),
        "peak_memory_bytes": 9,
        "steady_memory_bytes": 8,
        "pss_bytes": 7,
        "mapped_file_resident_bytes": 6,
        "prompt_energy_joules_per_token": 0.03,
        "decode_energy_joules_per_token": 8.0 / len(latencies),
    }
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99)):
        expected[f"inter_token_latency_{name}_ms@100"] = 1000 * float(np.percentile(latencies, share))
    assert run.values == pytest.approx(expected)


def test_what_was_not_counted_is_absent_and_not_zero() -> None:
    memory = Memory(9, 8, None, None)
    measured = Measurement(20.0, (Timing(100, 0.5, 0.6, (0.1,)),), None, None, memory, "fake")
    absent = ("energy", "pss", "mapped")
    values = reduce_run("before", 0, measured, JOB).values
    assert not [name for name in values if any(word in name for word in absent)]
    still = Measurement(20.0, (Timing(100, 0.5, 0.6, (0.1,), 0.0, 0.0),), None, None, memory, "fake")
    assert not [name for name in reduce_run("before", 0, still, JOB).values if "energy" in name]


def test_spread_is_the_range_over_the_median() -> None:
    assert spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)
