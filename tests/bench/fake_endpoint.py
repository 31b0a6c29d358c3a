"""An endpoint with settable delays, and an event loop whose clock moves only when everybody waits."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from serve.bench.endpoint.client import Client, Limits
from serve.bench.endpoint.records import Endpoint
from serve.bench.endpoint.transport import Answer, TransportError

T = TypeVar("T")

Step = tuple[float, bytes]
"""Seconds to wait, and the bytes that come then."""


class _Selector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits for something that never comes"
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Waits by moving its clock, so that an hour takes no time and every delay is exact."""

    def __init__(self) -> None:
        self._moved = _Selector()
        super().__init__(self._moved)

    def time(self) -> float:
        return self._moved.now_s

    def block(self, seconds: float) -> None:
        """Let time pass while nothing else can run, as work of the client's own does."""
        self._moved.now_s += seconds


def in_virtual_time(work: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class FakeTransport:
    """Answers every request with the steps that ``script`` gives for its number and body."""

    def __init__(
        self,
        script: Callable[[int, Mapping[str, Any]], Iterable[Step]],
        *,
        connect_s: float = 0.0,
        status: int = 200,
        before: Callable[[], None] = lambda: None,
        broken: TransportError | None = None,
    ) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self.under_way = 0
        self.most_under_way = 0
        self._script = script
        self._connect_s = connect_s
        self._status = status
        self._before = before
        self._broken = broken

    @asynccontextmanager
    async def post(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Answer]:
        self.bodies.append(body)
        number = len(self.bodies) - 1
        self._before()
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self._connect_s)
            yield Answer(self._status, self._chunks(self._script(number, body)))
        finally:
            self.under_way -= 1

    @asynccontextmanager
    async def get(self, path: str) -> AsyncIterator[Answer]:
        yield Answer(200, self._chunks([(0.0, b'{"data": [{"id": "first"}, {"id": "second"}]}')]))

    async def _chunks(self, steps: Iterable[Step]) -> AsyncGenerator[bytes, None]:
        for delay_s, data in steps:
            await asyncio.sleep(delay_s)
            yield data
        if self._broken is not None:
            raise self._broken


def client_of(
    transport: FakeTransport,
    loop: VirtualLoop,
    *,
    stall_s: float = 60.0,
    limit_s: float = 600.0,
    url: str = "u",
) -> Client:
    endpoint = Endpoint(url, "m", "chat", asks_usage=True, ignores_eos=True)
    return Client(transport, endpoint, Limits(stall_s, limit_s), loop.time)


def data(payload: Any) -> bytes:
    return (
        b"data: " + (payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()) + b"\n\n"
    )


def delta(**fields: Any) -> bytes:
    """One event of a chat with a change of the message."""
    return data({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


ROLE = delta(role="assistant", content="")
EMPTY = delta(content="")
END = data({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
DONE = data("[DONE]")


def usage(tokens: Any, prompt_tokens: int = 7) -> bytes:
    return data({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}})


def answer(gaps_s: Sequence[float], tokens: int | None = None) -> list[Step]:
    """An answer with one token an event, after the gaps, then its end and the usage at once."""
    steps = [(0.0, ROLE), *((gap_s, delta(content=f" {number}")) for number, gap_s in enumerate(gaps_s))]
    return [*steps, (0.0, END + usage(len(gaps_s) if tokens is None else tokens) + DONE)]
