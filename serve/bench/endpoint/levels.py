"""Keeping a load: so many requests under way, or so many beginning per second."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from serve.bench.endpoint.client import Clock
from serve.bench.endpoint.records import STALLED, TIMEOUT
from serve.bench.endpoint.timeline import Timeline

T = TypeVar("T")

Ask = Callable[[str, float], Awaitable[Timeline]]
"""Sends a prompt that is due at a moment of the clock and returns what was seen."""

MAX_HANGING = 3
"""A closed loop gives up after so many requests in a row that hung: the others would, each for its limit."""

_HANGING = (STALLED, TIMEOUT)


async def closed_loop(ask: Ask, prompts: Sequence[str], concurrency: int, clock: Clock) -> list[Timeline]:
    """Send all prompts, ``concurrency`` at once: each that ends makes way for the next.

    A request is due at the moment at which the one before it in its place has ended. The list is shorter than
    ``prompts`` when the endpoint hangs, and in the order of sending.
    """
    waiting = iter(enumerate(prompts))
    found: dict[int, Timeline] = {}
    hanging = 0
    began_s = clock()

    async def place() -> None:
        nonlocal hanging
        due_s = began_s
        while hanging < MAX_HANGING and (following := next(waiting, None)) is not None:
            number, prompt = following
            found[number] = seen = await ask(prompt, due_s)
            due_s = clock()
            hanging = hanging + 1 if seen.failure in _HANGING else 0

    await together(place() for _ in range(concurrency))
    return [found[number] for number in sorted(found)]


async def open_loop(ask: Ask, prompts: Sequence[str], due: Sequence[float], clock: Clock) -> list[Timeline]:
    """Send each prompt at its moment, in seconds from now, whatever became of the others."""
    began_s = clock()

    async def one(prompt: str, due_s: float) -> Timeline:
        while (left_s := due_s - clock()) > 0:
            await asyncio.sleep(left_s)
        return await ask(prompt, due_s)

    return await together(
        one(prompt, began_s + after_s) for prompt, after_s in zip(prompts, due, strict=True)
    )


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all; when one fails, or this is cancelled, none goes on."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
