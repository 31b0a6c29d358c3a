"""Times a prompt and its continuation in a runtime that is driven step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    clock = gauges.clock
    engine.clear()
    energy_start = gauges.joules()
    start = clock()
    engine.forward(prompt)
    prefill_s = clock() - start
    engine.choose()
    first_s = clock() - start
    energy_first = gauges.joules()
    latencies = []
    for token in continuation:
        start = clock()
        engine.forward([token])
        engine.choose()
        latencies.append(clock() - start)
    return Timing(
        num_prompt_tokens=len(prompt),
        prefill_s=prefill_s,
        first_token_s=first_s,
        latencies_s=tuple(latencies),
        prompt_joules=difference(energy_start, energy_first),
        decode_joules=difference(energy_first, gauges.joules()),
    )


def difference(before: float | None, after: float | None) -> float | None:
    """Return what was used in between; None where it is not counted."""
    return None if before is None or after is None else after - before
