"""Levels of load, against queues that can be reckoned by hand, in virtual time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fake_endpoint import FakeTransport, Step, VirtualLoop, answer, client_of, in_virtual_time

from serve.bench.endpoint.collect import Workload, collect
from serve.bench.endpoint.levels import closed_loop, open_loop
from serve.bench.endpoint.prompts import TextPrompts
from serve.bench.endpoint.records import Level, LevelRun, LoadComparison, LoadOptions
from serve.bench.endpoint.schedule import arrivals, turns
from serve.bench.endpoint.summary import METRICS, compare_endpoints
from serve.bench.endpoint.timeline import Timeline

TEXTS = tuple(f"Sentence {i} is plain. And {i} is another one, somewhat longer!" for i in range(60))


def one_second(number: int, body: Mapping[str, Any]) -> list[Step]:
    return answer([0.5, 0.25, 0.25])


@pytest.mark.parametrize(("concurrency", "seconds"), [(1, 7), (2, 4), (3, 3), (7, 1), (9, 1)])
def test_a_closed_loop_keeps_so_many_requests_under_way(concurrency: int, seconds: int) -> None:
    async def work(loop: VirtualLoop) -> tuple[list[Timeline], FakeTransport]:
        transport = FakeTransport(one_second)
        client = client_of(transport, loop)
        ask = lambda prompt, due_s: client.ask(prompt, 8, due_s)  # noqa: E731
        return await closed_loop(ask, [f"p{i}" for i in range(7)], concurrency, loop.time), transport

    seen, transport = in_virtual_time(work)
    assert len(seen) == 7
    assert transport.most_under_way == min(concurrency, 7)
    assert max(one.end_s for one in seen) == pytest.approx(seconds)
    assert all(one.sent_s == pytest.approx(one.due_s) for one in seen)
    prompts = [body["messages"][0]["content"] for body in transport.bodies]
    assert sorted(prompts) == [f"p{i}" for i in range(7)]


def test_an_open_loop_sends_at_the_moments_that_are_due_whatever_is_under_way() -> None:
    due = [0.1, 0.2, 5.0]

    async def work(loop: VirtualLoop) -> tuple[list[Timeline], FakeTransport]:
        transport = FakeTransport(one_second)
        client = client_of(transport, loop)
        loop.block(100.0)
        ask = lambda prompt, due_s: client.ask(prompt, 8, due_s)  # noqa: E731
        return await open_loop(ask, ["a", "b", "c"], due, loop.time), transport

    seen, transport = in_virtual_time(work)
    assert [one.sent_s for one in seen] == pytest.approx([100.1, 100.2, 105.0])
    assert [one.due_s for one in seen] == pytest.approx([100.1, 100.2, 105.0])
    assert transport.most_under_way == 2


def test_a_closed_loop_gives_up_an_endpoint_that_hangs() -> None:
    async def work(loop: VirtualLoop) -> tuple[list[Timeline], float]:
        client = client_of(FakeTransport(lambda *_: [(1e6, b"")]), loop, stall_s=60)
        ask = lambda prompt, due_s: client.ask(prompt, 8, due_s)  # noqa: E731
        return await closed_loop(ask, ["p"] * 50, 2, loop.time), loop.time()

    seen, took_s = in_virtual_time(work)
    assert {one.failure for one in seen} == {"stalled"}
    assert len(seen) == 4  # two at once, twice: the third in a row ends it
    assert took_s == pytest.approx(120)


class TestCollect:
    @staticmethod
    def runs_of(
        options: LoadOptions,
        scripts: list[Callable[[int, Mapping[str, Any]], list[Step]]],
        *,
        block_s: float = 0.0,
        same_url: bool = False,
    ) -> tuple[list[LevelRun], list[FakeTransport]]:
        async def work(loop: VirtualLoop) -> tuple[list[LevelRun], list[FakeTransport]]:
            transports = [FakeTransport(script, before=lambda: loop.block(block_s)) for script in scripts]
            clients = [
                client_of(transport, loop, url="same" if same_url else f"url{place}")
                for place, transport in enumerate(transports)
            ]
            runs: list[LevelRun] = []
            workload = Workload(options, TextPrompts(TEXTS, options.prompt_tokens, options.seed))
            await collect(clients, workload, runs.append, lambda _: None)
            return runs, transports

        return in_virtual_time(work)

    def test_rates_of_a_level_are_those_of_the_queue(self) -> None:
        options = LoadOptions(concurrency=(1, 4), requests=8, output_tokens=3)
        runs, (transport,) = self.runs_of(options, [one_second])
        assert [run.level for run in runs] == [Level("concurrency", 1.0), Level("concurrency", 4.0)]
        assert [run.summary.requests_per_second for run in runs] == pytest.approx([1, 4])
        assert [run.summary.output_tokens_per_second for run in runs] == pytest.approx([3, 12])
        assert [run.duration_s for run in runs] == pytest.approx([8, 2])
        assert len(transport.bodies) == options.warmup + 16
        assert not any(run.summary.client_was_late for run in runs)

    def test_no_prompt_is_sent_twice(self) -> None:
        options = LoadOptions(concurrency=(2,), requests=8, rounds=3, output_tokens=3, prompt_tokens=40)
        _, transports = self.runs_of(options, [one_second, one_second], same_url=True)
        sent = [body["messages"][0]["content"] for transport in transports for body in transport.bodies]
        assert len(set(sent)) == len(sent) == 2 * (3 * 8 + 4)

    def test_two_endpoints_get_the_same_prompts_at_the_same_moments(self) -> None:
        options = LoadOptions(rates=(3.0,), requests=8, rounds=2, output_tokens=3)
        runs, (one, other) = self.runs_of(options, [one_second, one_second])
        assert one.bodies == other.bodies
        for number in range(2):
            first, later = (run for run in runs if run.round == number)
            due = arrivals(3.0, 8, options.seed, f"{number}/0")
            assert [r.sent_s for r in first.requests] == pytest.approx(due)
            assert [r.sent_s for r in later.requests] == pytest.approx(due)
            assert first.summary.requests_per_second == pytest.approx(8 / (due[-1] + 1))

    def test_a_client_that_keeps_no_schedule_is_said_to_be_the_bottleneck(self) -> None:
        options = LoadOptions(rates=(50.0,), requests=30, output_tokens=3)
        (run,), _ = self.runs_of(options, [one_second], block_s=0.03)
        assert run.summary.client_was_late
        # A queue of one: each sending waits for those before it, 30 ms each, as Lindley's recursion says.
        free_s, waits_ms = 0.0, []
        for due_s in arrivals(50.0, 30, options.seed, "0/0"):
            waits_ms.append(1000 * max(0.0, free_s - due_s))
            free_s = max(free_s, due_s) + 0.03
        assert [r.lateness_ms for r in run.requests] == pytest.approx(waits_ms, abs=0.01)
        (quick,), _ = self.runs_of(options, [one_second], block_s=0.0001)
        assert not quick.summary.client_was_late


def jittery(seed: int, factor: float) -> Callable[[int, Mapping[str, Any]], list[Step]]:
    """An endpoint whose tokens take 10 ms on average, with a spread of 5 %, times ``factor``."""
    generator = random.Random(seed)
    return lambda *_: answer([factor * generator.gauss(0.010, 0.0005) for _ in range(6)])


def ratio_of(seed: int, factor: float) -> LoadComparison:
    options = LoadOptions(concurrency=(2,), requests=6, rounds=6, output_tokens=6, warmup=0, seed=seed)
    runs, _ = TestCollect.runs_of(options, [jittery(2 * seed, 1.0), jittery(2 * seed + 1, factor)])
    metrics = [metric for metric in METRICS if metric.name == "time_per_output_token_p50_ms"]
    (entry,) = compare_endpoints(runs, 2, seed, metrics)
    return entry


def test_an_endpoint_against_its_like_shows_no_difference_and_a_slower_one_does() -> None:
    alike = [ratio_of(seed, 1.0) for seed in range(20)]
    slower = [ratio_of(seed, 1.05) for seed in range(20)]
    assert sum(entry.verdict == "no difference shown" for entry in alike) >= 19
    assert sum(entry.verdict == "slower" for entry in slower) >= 19
    assert statistics.median(entry.ratio.median for entry in slower if entry.ratio) == pytest.approx(
        1.05, abs=0.01
    )


class TestSchedule:
    def test_arrivals_are_those_of_a_poisson_process(self) -> None:
        rate, count = 4.0, 20_000
        moments = arrivals(rate, count, 7, "a")
        gaps = [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]
        # The mean of n exponential gaps has a standard error of 1 / (rate √n).
        assert statistics.fmean(gaps) == pytest.approx(1 / rate, abs=4 / (rate * math.sqrt(count)))
        assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.05)
        assert min(gaps) > 0
        # Counts in windows of one second: mean and variance are both the rate.
        counts = [0] * int(moments[-1])
        for moment in moments:
            if moment < len(counts):
                counts[int(moment)] += 1
        assert statistics.fmean(counts) == pytest.approx(rate, rel=0.05)
        assert statistics.variance(counts) == pytest.approx(rate, rel=0.1)

    def test_a_seed_and_a_key_give_the_same_moments_and_others_do_not(self) -> None:
        assert arrivals(2.0, 9, 1, "a") == arrivals(2.0, 9, 1, "a")
        assert arrivals(2.0, 9, 1, "a") != arrivals(2.0, 9, 1, "b")
        assert arrivals(2.0, 9, 1, "a") != arrivals(2.0, 9, 2, "a")

    def test_turns_are_balanced_and_drawn_from_the_seed(self) -> None:
        levels = LoadOptions(concurrency=(1, 2, 4)).levels
        found = turns(2, levels, 6, 3)
        assert sorted(found) == [(r, level, e) for r in range(6) for level in range(3) for e in range(2)]
        assert [(r, level) for r, level, _ in found] == sorted((r, level) for r, level, _ in found)
        first = found[::2]
        for level in range(3):
            assert sum(endpoint for _, place, endpoint in first if place == level) == 3
        assert found == turns(2, levels, 6, 3)
        assert len({str(turns(2, levels, 6, seed)) for seed in range(20)}) > 5
