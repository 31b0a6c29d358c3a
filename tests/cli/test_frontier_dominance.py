"""Which points nobody should choose: against brute force, and properties that must hold for any points."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations

from hypothesis import given
from hypothesis import strategies as st

from cusprun.pipeline.curve_quality import CurveQuality
from cusprun.pipeline.dominance import Axis, Candidate, dominates, dominators
from cusprun.pipeline.frontier import FrontierPoint, Speed, SpeedOptions, judged, merged
from cusprun.quality.report import Estimate
from serve.bench.records import Interval

NUM_AXES = 3
SMALL = st.integers(0, 4).map(float)
WIDTHS = st.integers(0, 2).map(lambda number: number / 2)


@st.composite
def axes(draw: st.DrawFn, exact: bool = False) -> Axis:
    value = draw(SMALL)
    return Axis.exact(value) if exact else Axis(value, value - draw(WIDTHS), value + draw(WIDTHS))


def points(exact: bool = False, most: int = 7) -> st.SearchStrategy[list[Candidate]]:
    rows = st.lists(st.tuples(*[axes(exact)] * NUM_AXES), min_size=1, max_size=most)
    return rows.map(lambda found: [Candidate(f"point {n}", row) for n, row in enumerate(found)])


def greyed(candidates: list[Candidate]) -> set[str]:
    return {name for name, judge in dominators(candidates).items() if judge is not None}


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

    def apart(better: Axis, worse: Axis) -> bool:
        return better.high < worse.low

    def beats(one: Candidate, other: Candidate) -> bool:
        pairs = list(zip(one.axes, other.axes, strict=True))
        return not any(b.value < a.value for a, b in pairs) and any(apart(a, b) for a, b in pairs)

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
    assert None in verdicts.values()
    for name, judge in verdicts.items():
        if judge is not None:
            assert verdicts[judge] is None
            assert dominates(by_name[judge], by_name[name])
            assert not dominates(by_name[name], by_name[judge])


@given(points(), st.data())
def test_a_dominated_point_more_changes_nothing_else(
    candidates: list[Candidate], data: st.DataObject
) -> None:
    before = dominators(candidates)
    best = data.draw(st.sampled_from([point for point in candidates if before[point.name] is None]))
    worse = [data.draw(st.integers(0, 3)) for _ in best.axes]
    far = data.draw(st.integers(0, NUM_AXES - 1))

    def moved(axis: Axis, number: int) -> Axis:
        value = axis.value + worse[number]
        return Axis.exact(axis.high + 1) if number == far else Axis(value, value - 1, value + 1)

    more = Candidate("more", tuple(moved(axis, number) for number, axis in enumerate(best.axes)))
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
def test_the_order_of_the_points_does_not_matter(candidates, random) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert dominators(shuffled) == dominators(candidates)


def test_noise_greys_nothing_out() -> None:
    """Better everywhere, and each time by less than the intervals."""
    better = Candidate("better", (Axis(1.0, 0.9, 1.1), Axis(50.0, 45.0, 55.0)))
    worse = Candidate("worse", (Axis(1.05, 1.0, 1.2), Axis(51.0, 46.0, 58.0)))
    assert greyed([better, worse]) == set()
    # ... and one interval that is clear of the other is enough.
    clear = replace(worse, axes=(Axis(1.3, 1.2, 1.4), worse.axes[1]))
    assert dominators([better, clear]) == {"better": None, "worse": "better"}


def test_a_wide_interval_is_no_tie() -> None:
    """Smaller beyond doubt, but measured worse: nobody knows that the quality is the same."""
    small = Candidate("small", (Axis.exact(10.0), Axis(1.2, 0.9, 1.6)))
    large = Candidate("large", (Axis.exact(20.0), Axis(1.1, 0.8, 1.5)))
    assert greyed([small, large]) == set()


def test_an_axis_turned_round() -> None:
    slow, fast = Axis.more_is_better(10, 9, 11), Axis.more_is_better(20, 15, 25)
    assert fast.is_beyond(slow)
    assert not slow.is_beyond(fast)
    assert slow.low <= slow.value <= slow.high


def frontier_point(ratio: float, size: int, quality: float, rate: float | None = None) -> FrontierPoint:
    speed = None
    if rate is not None:
        interval = Interval(rate, rate - 1, rate + 1)
        speed = Speed(interval, interval, interval, interval, 1e6, 10, "library 1", "machine")
    row = CurveQuality(9, 99, Estimate(5, 4, 6), Estimate(quality, quality - 0.01, quality + 0.01))
    return FrontierPoint(ratio, "gguf", "q8_0", 1000, "hash", size, 8.0, {"held_out": row}, speed)


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
