from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from cusprun.codec import to_plain
from cusprun.errors import MissingDependencyError, ModelError
from serve.bench.records import Job, Memory
from serve.bench.worker import WARM_UP_DECODE_TOKENS, job_tokens, measure, reply_to

TICK = 1 / 1024  # a power of two, so that sums of delays are exact
JOB = Job("m.gguf", 6, 20, 6, None, 2, 0)
MEMORY = Memory(123, 122, 121)


class FakeEngine:
    """Every call moves the fake clock by a delay of its own and is written down."""

    num_vocabulary, num_parameters, context_length, runtime = 50, 77, 256, "fake 1.0"

    def __init__(self, step_ticks: Sequence[int] = (4,), prompt_ticks: int = 30) -> None:
        self.now = 100.0
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.step_ticks, self.prompt_ticks = step_ticks, prompt_ticks
        self._steps_since_clear = 0
        self.warm = False
        self.closed = False

    def clock(self) -> float:
        return self.now

    def _wait(self, ticks: int) -> None:
        self.now += ticks * TICK

    def load(self, job: Job) -> None:
        self._wait(200)

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

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
        self._steps_since_clear, self.warm = 0, True
        self._wait(9)

    def close(self) -> None:
        self.closed = True


def test_every_latency_is_exactly_the_delay_that_was_set() -> None:
    engine = FakeEngine(step_ticks=(4, 7, 5, 40))
    measured = measure(engine, JOB, engine.clock, lambda: MEMORY)
    milliseconds = 1000 * TICK
    assert measured.load_time_ms == 200 * milliseconds
    assert measured.prefill_ms == 30 * milliseconds
    assert measured.time_to_first_token_ms == 31 * milliseconds
    assert measured.inter_token_latencies_ms == tuple(t * milliseconds for t in (5, 8, 6, 41) * 5)
    assert (measured.num_prompt_tokens, measured.num_parameters, measured.context_length) == (6, 77, 256)
    assert measured.memory == MEMORY
    assert measured.runtime == "fake 1.0"
    assert engine.closed


def test_warm_up_runs_the_prompt_and_some_steps_and_is_cleared_away() -> None:
    engine = FakeEngine()
    measure(engine, JOB, engine.clock, lambda: MEMORY)
    cleared = engine.calls.index(("clear", ()))
    assert cleared == 1 + WARM_UP_DECODE_TOKENS
    assert engine.calls[0] == engine.calls[cleared + 1]
    assert engine.calls[1:cleared] == engine.calls[cleared + 2 :][:WARM_UP_DECODE_TOKENS]


def test_a_deeper_context_is_filled_untimed() -> None:
    job = Job("m.gguf", 6, 5, 16, None, 2, 0)
    engine = FakeEngine()
    measured = measure(engine, job, engine.clock, lambda: MEMORY)
    forwarded = [len(tokens) for name, tokens in engine.calls[engine.calls.index(("clear", ())) :] if tokens]
    assert forwarded == [6, 10, 1, 1, 1, 1, 1]
    assert measured.time_to_first_token_ms == 1000 * 31 * TICK
    assert measured.inter_token_latencies_ms == (1000 * 5 * TICK,) * 5


def test_tokens_come_from_the_seed_and_the_vocabulary() -> None:
    prompt, fill, continuation = job_tokens(JOB, FakeEngine())
    assert (len(prompt), len(fill), len(continuation)) == (6, 0, 20)
    assert all(0 <= token < 50 for token in prompt + continuation)
    assert job_tokens(JOB, FakeEngine()) == (prompt, fill, continuation)
    other = Job("m.gguf", 6, 20, 6, None, 2, 1)
    assert job_tokens(other, FakeEngine()) != (prompt, fill, continuation)


def test_a_text_is_repeated_and_cut_to_the_length() -> None:
    job = Job("m.gguf", 4, 3, 6, "abc", 2, 0)
    assert job_tokens(job, FakeEngine()) == ([1, 2, 3, 1], [2, 3], [1, 2, 3])


def test_the_engine_is_closed_when_a_run_fails() -> None:
    engine = FakeEngine()

    def fail() -> Memory:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        measure(engine, JOB, engine.clock, fail)
    assert engine.closed


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ModelError("the file is damaged"), "model"), (MissingDependencyError("add it"), "dependency")],
)
def test_what_the_input_is_to_blame_for_becomes_a_fault(error: Exception, kind: str) -> None:
    def refuse() -> FakeEngine:
        raise error

    reply = reply_to(json.dumps(to_plain(JOB)), refuse)
    assert reply.measurement is None
    assert reply.fault is not None
    assert (reply.fault.kind, reply.fault.reason) == (kind, str(error))


def test_a_good_job_is_answered_with_a_measurement() -> None:
    reply = reply_to(json.dumps(to_plain(JOB)), FakeEngine)
    assert reply.fault is None
    assert reply.measurement is not None
    assert len(reply.measurement.inter_token_latencies_ms) == JOB.num_decode_tokens
