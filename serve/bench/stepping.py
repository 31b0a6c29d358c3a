"""Times a prompt and its continuation in a runtime that is driven step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from serve.bench.measurement import Timing


@dataclass(frozen=True)
class Gauges:
    """What a measurement reads: ``clock`` gives seconds, ``joules`` what was used so far or None."""

    clock: Callable[[], float]
    joules: Callable[[], float | None]


class Stepper(Protocol):
    """A loaded model with a cache; each call returns when its work is really done."""

    def clear(self) -> None:
        """Empty the cache."""

    def forward(self, tokens: Sequence[int]) -> None:
        """Append tokens to the cache and compute the logits of the last one."""

    def choose(self) -> int:
        """Return the most probable next token."""


def run_in_steps(
    engine: Stepper, prompt: Sequence[int], continuation: Sequence[int], gauges: Gauges
) -> Timing:
    """Time the prompt from an empty cache, then each token of the continuation.

    The continuation is given and not the model's own, so that both models do the same work; the choice is
    made all the same, because a user waits for it too.
    """
    engine.clear()

    def step(token: int) -> None:
        engine.forward([token])
        engine.choose()

    return timed(
        len(prompt),
        lambda: engine.forward(prompt),
        engine.choose,
        [partial(step, token) for token in continuation],
        gauges,
    )


def timed(
    num_prompt_tokens: int,
    read: Callable[[], object],
    choose: Callable[[], object],
    steps: Sequence[Callable[[], object]],
    gauges: Gauges,
) -> Timing:
    """Time the reading of a prompt, the choice of its first token, and each step after it."""
    clock = gauges.clock
    energy_start = gauges.joules()
    start = clock()
    read()
    prefill_s = clock() - start
    choose()
    first_s = clock() - start
    energy_first = gauges.joules()
    latencies = []
    for step in steps:
        start = clock()
        step()
        latencies.append(clock() - start)
    return Timing(
        num_prompt_tokens=num_prompt_tokens,
        prefill_s=prefill_s,
        first_token_s=first_s,
        latencies_s=tuple(latencies),
        prompt_joules=difference(energy_start, energy_first),
        decode_joules=difference(energy_first, gauges.joules()),
    )


def difference(before: float | None, after: float | None) -> float | None:
    """Return what was used in between; None where it is not counted."""
    return None if before is None or after is None else after - before
