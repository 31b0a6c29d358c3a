"""Which points nobody should choose: against brute force, and properties that must hold for any points."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, combinations, pairwise

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from cusprun.pipeline.curve_quality import CurveQuality
from cusprun.pipeline.dominance import Candidate, Measured, Resampled, dominates, dominators
from cusprun.pipeline.frontier import DocumentSums, FrontierPoint, Speed, SpeedOptions, judged, merged
from cusprun.quality.report import Estimate
from serve.bench.records import Interval

NUM_AXES = 3
SMALL = st.integers(0, 4).map(float)
WIDTHS = st.integers(0, 2).map(lambda number: number / 2)


@st.composite
def axes(draw: st.DrawFn, exact: bool = False) -> Measured:
    value = draw(SMALL)
    return Measured.exact(value) if exact else Measured(value, value - draw(WIDTHS), value + draw(WIDTHS))


def points(exact: bool = False, most: int = 7) -> st.SearchStrategy[list[Candidate]]:
    rows = st.lists(st.tuples(*[axes(exact)] * NUM_AXES), min_size=1, max_size=most)
    return rows.map(lambda found: [Candidate(f"point {n}", row) for n, row in enumerate(found)])


def greyed(candidates: list[Candidate]) -> set[str]:
    return {name for name, judge in dominators(candidates).items() if judge is not None}


def beats(one: Candidate, other: Candidate) -> bool:
    """The rule, written down once more."""
    pairs = list(zip(one.axes, other.axes, strict=True))
    worse = [b.high < a.low for a, b in pairs]
    better = [a.high < b.low for a, b in pairs]
    return any(better) and not any(worse)


def has_ring(candidates: list[Candidate]) -> bool:
    """Whether points beat one another in a ring: taking away whom nobody beats does not end with nobody."""
    left = list(candidates)
    while left:
        free = [point for point in left if not any(beats(other, point) for other in left)]
        if not free:
            return True
        left = [point for point in left if point not in free]
    return False


@given(points(exact=True))
def test_with_exact_values_the_rest_is_the_pareto_front(candidates: list[Candidate]) -> None:
    def values(point: Candidate) -> list[float]:
        return [axis.value for axis in point.axes]

    beaten = {
        point.name
        for point in candidates
        for other in candidates
        if values(other) != values(point)
        and all(mine <= theirs for mine, theirs in zip(values(other), values(point), strict=True))
    }
    assert greyed(candidates) == beaten


@given(points(most=6))
def test_with_intervals_it_is_the_one_set_that_judges_all_others_and_none_of_itself(
    candidates: list[Candidate],
) -> None:
    """Brute force over every set of points that might be the undominated ones."""
    assume(not has_ring(candidates))
    subsets = chain.from_iterable(combinations(candidates, size) for size in range(len(candidates) + 1))
    fitting = [
        {point.name for point in chosen}
        for chosen in subsets
        if all((point in chosen) != any(beats(judge, point) for judge in chosen) for point in candidates)
    ]
    assert fitting == [{point.name for point in candidates} - greyed(candidates)]


@given(points())
def test_some_point_is_left_and_every_judge_is_one_of_those(candidates: list[Candidate]) -> None:
    verdicts = dominators(candidates)
    by_name = {point.name: point for point in candidates}
    assert verdicts.keys() == by_name.keys()
    assert None in verdicts.values()
    for name, judge in verdicts.items():
        if judge is not None:
            assert verdicts[judge] is None
            assert beats(by_name[judge], by_name[name])
        for other in candidates:
            if verdicts[other.name] is None and not has_ring(candidates):
                assert judge is not None or not beats(other, by_name[name])


@given(points(), st.data())
def test_a_dominated_point_more_changes_nothing_else(
    candidates: list[Candidate], data: st.DataObject
) -> None:
    before = dominators(candidates)
    more = Candidate("more", data.draw(st.tuples(*[axes()] * NUM_AXES)))
    kept = [point for point in candidates if before[point.name] is None]
    assume(any(beats(point, more) for point in kept))
    assume(not has_ring([*candidates, more]))
    after = dominators([*candidates, more])
    assert after.pop("more") is not None
    assert after == before


@given(points(exact=True))
def test_with_exact_values_domination_is_transitive(candidates: list[Candidate]) -> None:
    for one in candidates:
        for other in candidates:
            for third in candidates:
                if dominates(one, other) and dominates(other, third):
                    assert dominates(one, third)


@given(points(), st.randoms(use_true_random=False))
def test_who_is_greyed_does_not_depend_on_the_order(candidates, random) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert greyed(shuffled) == greyed(candidates)


def test_a_ring_that_noise_has_made_stays_whole() -> None:
    """Each is beyond the next on one axis, and too wide on the other to be told from it."""
    ring = [
        Candidate("a", (Measured(1, 0.9, 1.1), Measured(4, 3.9, 4.1))),
        Candidate("b", (Measured(2, 1.9, 2.1), Measured(3, 1.0, 5.0))),
        Candidate("c", (Measured(3, 2.9, 3.1), Measured(2, 1.9, 2.1))),
        Candidate("d", (Measured(2, 0.0, 4.0), Measured(3, 2.9, 3.1))),
    ]
    assert all(dominates(one, other) for one, other in pairwise([*ring, ring[0]]))
    assert greyed(ring) == set()
    best = Candidate("best", (Measured.exact(-1), Measured.exact(-1)))
    assert dominators([*ring, best]) == dict.fromkeys("abcd", "best") | {"best": None}


def test_noise_greys_nothing_out() -> None:
    """Better everywhere, and each time by less than the intervals."""
    better = Candidate("better", (Measured(1.0, 0.9, 1.1), Measured(50.0, 45.0, 55.0)))
    worse = Candidate("worse", (Measured(1.05, 1.0, 1.2), Measured(51.0, 46.0, 58.0)))
    assert greyed([better, worse]) == set()
    # ... and one interval that is clear of the other is enough.
    clear = replace(worse, axes=(Measured(1.3, 1.2, 1.4), worse.axes[1]))
    assert dominators([better, clear]) == {"better": None, "worse": "better"}


def test_the_same_documents_are_compared_draw_by_draw() -> None:
    """Hard and easy documents make wide intervals; a loss that all of them share is seen all the same."""
    means = np.random.default_rng(0).normal(3, 1, 2001)
    one, other = Resampled(means), Resampled(means + 0.01)
    assert one.is_beyond(other)
    assert not other.is_beyond(one)
    assert not one.is_beyond(one)
    noisy = Resampled(means + np.random.default_rng(1).normal(0.01, 0.1, 2001))
    assert not one.is_beyond(noisy)
    assert not noisy.is_beyond(one)


def test_an_axis_turned_round() -> None:
    slow, fast = Measured.more_is_better(10, 9, 11), Measured.more_is_better(20, 15, 25)
    assert fast.is_beyond(slow)
    assert not slow.is_beyond(fast)
    assert slow.low <= slow.value <= slow.high


def frontier_point(ratio: float, size: int, quality: float, rate: float | None = None) -> FrontierPoint:
    speed = None
    if rate is not None:
        interval = Interval(rate, rate - 1, rate + 1)
        speed = Speed(interval, interval, interval, interval, 1e6, 10, "library 1", "machine")
    row = CurveQuality(9, 99, Estimate(5 * quality, 4, 6), Estimate(quality, 0.5, 1.5))
    tokens = (11,) * 9
    hard = (1.0, 2.0, 3.0) * 3  # documents differ by far more than points do
    nats = tuple(11 * (hardness + math.log(quality)) for hardness in hard)
    sums = DocumentSums(tokens, nats)
    return FrontierPoint(ratio, "gguf", "q8_0", 1000, "hash", size, 8.0, {"held_out": row}, sums, speed)


def test_points_are_judged_by_size_quality_and_speed() -> None:
    original, small, bad = (
        frontier_point(0.0, 100, 1.0, 50),
        frontier_point(0.25, 70, 1.1, 60),
        frontier_point(0.5, 90, 1.3, 55),
    )
    verdicts = [point.dominated_by for point in judged([original, small, bad])]
    assert verdicts == [None, None, "0.25 gguf:q8_0"]
    fast = replace(bad, speed=frontier_point(0, 1, 1, 65).speed)
    assert [point.dominated_by for point in judged([original, small, fast])] == [None, None, None]
    without = [replace(point, speed=None) for point in (original, small, fast)]
    assert [point.dominated_by for point in judged(without)] == [None, None, "0.25 gguf:q8_0"]


def test_a_speed_from_too_few_pairs_greys_nothing_out() -> None:
    fast, slow = frontier_point(0.25, 90, 1.0, 60), frontier_point(0.5, 90, 1.0, 20)
    assert [point.dominated_by for point in judged([fast, slow])] == [None, "0.25 gguf:q8_0"]
    assert fast.speed is not None
    once = replace(fast, speed=replace(fast.speed, num_pairs=5))
    assert [point.dominated_by for point in judged([once, slow])] == [None, None]


def test_failed_points_and_other_machines_judge_nobody() -> None:
    good, bad = frontier_point(0.25, 70, 1.1, 60), frontier_point(0.5, 90, 1.3, 55)
    failed = replace(good, failure="it broke")
    assert [point.dominated_by for point in judged([failed, bad])] == [None, None]
    assert bad.speed is not None
    elsewhere = replace(bad, speed=replace(bad.speed, machine="another"))
    assert [point.dominated_by for point in judged([good, elsewhere])] == [None, None]


def test_merging_judges_anew_and_what_was_measured_counts() -> None:
    bad, good = frontier_point(0.5, 90, 1.3), frontier_point(0.25, 70, 1.1)
    alone = merged([bad])
    assert alone[0].dominated_by is None
    both = merged(alone, [good])
    assert [(point.ratio, point.dominated_by) for point in both] == [(0.25, None), (0.5, "0.25 gguf:q8_0")]
    failed = replace(good, failure="it broke")
    assert merged(both, [failed]) == both
    assert [point.dominated_by for point in merged([bad], [failed])] == [None, None]
    assert merged([failed], both) == both


def test_default_speed_options_are_small() -> None:
    options = SpeedOptions()
    options.check()
    assert (options.prompt_tokens, options.context_depth, options.decode_tokens) == (128, 128, 32)
    assert (options.num_pairs, options.time_limit_s) == (10, 60)
