"""Hands items from a thread to a task of an event loop; those that wait are handed over together."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Channel(Generic[T]):
    """Made in the task that reads; the loop is woken once for all the items that it has not seen."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[T] = deque()
        self._event = asyncio.Event()
        self._is_waking = False

    def put(self, item: T) -> None:
        """Add an item, from any one thread at a time; nothing happens when the loop has ended."""
        self._items.append(item)
        if not self._is_waking:
            self._is_waking = True
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._event.set)

    async def get(self) -> list[T]:
        """Wait for items and return all there are."""
        found: list[T] = []
        while not found:
            await self._event.wait()
            self._event.clear()
            self._is_waking = False  # before the items are taken: one that comes meanwhile wakes again
            while self._items:
                found.append(self._items.popleft())
        return found
