from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from cusprun.codec import to_plain
from cusprun.errors import MissingDependencyError, ModelError
from serve.bench.measurement import Job, Memory, Timing
from serve.bench.stepping import Gauges, run_in_steps
from serve.bench.worker import WARM_UP_DECODE_TOKENS, job_tokens, measure, reply_to

TICK = 1 / 1024  # a power of two, so that sums of delays are exact
JOB = Job("llamacpp", "m.gguf", (6,), (6,), 20, None, 2, 0)
MEMORY = Memory(123, 122, 121, 120)


class FakeEngine:
    """Every call moves the fake clock by a delay of its own and is written down."""

    num_vocabulary, num_parameters, context_length, library = 50, 77, 256, "fake 1.0"
    pids = (4, 5)

    def __init__(self, step_ticks: Sequence[int] = (4,), prompt_ticks: int = 30) -> None:
        self.now = 100.0
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.step_ticks, self.prompt_ticks = step_ticks, prompt_ticks
        self._steps_since_clear = 0
        self.num_clears = 0
        self.closed = False

    @property
    def warm(self) -> bool:
        return self.num_clears > 1

    @property
    def gauges(self) -> Gauges:
        return Gauges(self.clock, lambda: 1024 * (self.now - 100))  # a joule each tick

    def clock(self) -> float:
        return self.now

    def _wait(self, ticks: int) -> None:
        self.now += ticks * TICK

    def load(self, job: Job) -> None:
        self._wait(200)

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def run(self, prompt: Sequence[int], continuation: Sequence[int], gauges: Gauges) -> Timing:
        return run_in_steps(self, prompt, continuation, gauges)

    def forward(self, tokens: Sequence[int]) -> None:
        self.calls.append(("forward", tuple(tokens)))
        if len(tokens) > 1:
            self._wait(self.prompt_ticks if self.warm else 1000)
            return
        self._wait(self.step_ticks[self._steps_since_clear % len(self.step_ticks)] if self.warm else 500)
        self._steps_since_clear += 1

    def choose(self) -> int:
        self._wait(1)
        return 3

    def clear(self) -> None:
        self.calls.append(("clear", ()))
        self._steps_since_clear = 0
        self.num_clears += 1
        self._wait(9)

    def close(self) -> None:
        self.closed = True


def measured_by(engine: FakeEngine, job: Job = JOB):
    return measure(engine, job, engine.gauges, lambda path, pids: MEMORY)


def test_every_latency_is_exactly_the_delay_that_was_set() -> None:
    engine = FakeEngine(step_ticks=(4, 7, 5, 40))
    measured = measured_by(engine)
    (timing,) = measured.timings
    assert measured.load_time_ms == 1000 * 200 * TICK
    assert timing.prefill_s == 30 * TICK
    assert timing.first_token_s == 31 * TICK
    assert timing.latencies_s == tuple(t * TICK for t in (5, 8, 6, 41) * 5)
    assert (timing.prompt_joules, timing.decode_joules) == (31.0, 5 * (5 + 8 + 6 + 41))
    assert (timing.num_prompt_tokens, measured.num_parameters, measured.context_length) == (6, 77, 256)
    assert measured.memory == MEMORY
    assert measured.library == "fake 1.0"
    assert engine.closed


def test_memory_is_read_of_the_model_and_of_what_the_engine_started() -> None:
    seen = []
    engine = FakeEngine()
    measure(engine, JOB, engine.gauges, lambda path, pids: seen.append((str(path), pids)) or MEMORY)
    assert seen == [("m.gguf", (4, 5))]


def test_warm_up_runs_the_prompt_and_some_steps_and_is_cleared_away() -> None:
    engine = FakeEngine()
    measured_by(engine)
    clears = [number for number, call in enumerate(engine.calls) if call[0] == "clear"]
    assert clears == [0, 2 + WARM_UP_DECODE_TOKENS]
    warm_up, timed = engine.calls[: clears[1]], engine.calls[clears[1] :]
    assert timed[: len(warm_up)] == warm_up


def test_every_point_starts_from_an_empty_cache_and_decodes_only_at_depths() -> None:
    job = Job("llamacpp", "m.gguf", (16, 6), (16, 10), 3, None, 2, 0)
    engine = FakeEngine()
    measured = measured_by(engine, job)
    timed = engine.calls[next(i for i, call in enumerate(engine.calls[1:], 1) if call[0] == "clear") :]
    assert [len(tokens) for _, tokens in timed] == [0, 6, 0, 10, 1, 1, 1, 0, 16, 1, 1, 1]
    assert [timing.num_prompt_tokens for timing in measured.timings] == [6, 10, 16]
    assert [len(timing.latencies_s) for timing in measured.timings] == [0, 3, 3]
    assert job.num_context_tokens == 20


def test_tokens_come_from_the_seed_and_the_vocabulary() -> None:
    prompt, continuation = job_tokens(JOB, FakeEngine())
    assert (len(prompt), len(continuation)) == (6, 20)
    assert all(0 <= token < 50 for token in prompt + continuation)
    assert job_tokens(JOB, FakeEngine()) == (prompt, continuation)
    other = Job("llamacpp", "m.gguf", (6,), (6,), 20, None, 2, 1)
    assert job_tokens(other, FakeEngine()) != (prompt, continuation)


def test_a_text_is_repeated_and_cut_to_the_length() -> None:
    job = Job("llamacpp", "m.gguf", (4,), (6,), 3, "abc", 2, 0)
    assert job_tokens(job, FakeEngine()) == ([1, 2, 3, 1, 2, 3], [1, 2, 3])


def test_the_engine_is_closed_when_a_run_fails() -> None:
    engine = FakeEngine()

    def fail(*_arguments: object) -> Memory:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        measure(engine, JOB, engine.gauges, fail)
    assert engine.closed


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ModelError("the file is damaged"), "model"), (MissingDependencyError("add it"), "dependency")],
)
def test_what_the_input_is_to_blame_for_becomes_a_fault(error: Exception, kind: str) -> None:
    def refuse(_runtime: str) -> FakeEngine:
        raise error

    reply = reply_to(json.dumps(to_plain(JOB)), refuse)
    assert reply.measurement is None
    assert reply.fault is not None
    assert (reply.fault.kind, reply.fault.reason) == (kind, str(error))


def test_a_good_job_is_answered_with_a_measurement() -> None:
    reply = reply_to(json.dumps(to_plain(JOB)), lambda _runtime: FakeEngine())
    assert reply.fault is None
    assert reply.measurement is not None
    assert len(reply.measurement.timings[0].latencies_s) == JOB.num_decode_tokens
