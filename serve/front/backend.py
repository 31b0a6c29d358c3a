"""What the front asks of an engine, whether it is a process of its own or lives in this one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from serve.api.requests import Request


@dataclass(frozen=True)
class Whole:
    """An answer in one piece: the bytes of its JSON."""

    body: bytes


@dataclass(frozen=True)
class Stream:
    """An answer as server-sent events, the closing ``data: [DONE]`` with them.

    ``close`` is called once nobody reads any more, also when nobody ever began to: an iterator that was never
    begun does not get to its own end.
    """

    events: AsyncIterator[bytes]
    close: Callable[[], None] = lambda: None


class Backend(Protocol):
    """Answers requests that were read and checked.

    ``answer`` may be cancelled while it runs, and the iterator of a :class:`Stream` may be closed before its
    end: the client has left, and what works for it must stop. Both raise ``ApiError`` for what is refused;
    a stream does so before its first event.
    """

    async def answer(self, request: Request) -> Whole | Stream:
        """Answer one request."""
        ...

    async def metrics(self) -> str:
        """Return the engine's own metrics in Prometheus' text format, empty when it has none."""
        ...

    def failure(self) -> str | None:
        """Return why the engine has ended, in its own last words; None while it lives."""
        ...

    async def close(self) -> None:
        """Let go of connections and of unfinished work."""
        ...
