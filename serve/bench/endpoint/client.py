"""One request to an endpoint, from sending to the last event or a limit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from serve.bench.endpoint.events import Event, EventReader, error_text, one_line, read_event, shown
from serve.bench.endpoint.records import CHAT, MALFORMED, REFUSED, ROUTES, STALLED, TIMEOUT, Endpoint
from serve.bench.endpoint.timeline import Moment, Timeline
from serve.bench.endpoint.transport import Answer, Transport, TransportError, hide_key, read_all

Clock = Callable[[], float]
"""Returns seconds that only grow."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a request may go without an event, and may take in all."""

    stall_s: float
    request_limit_s: float


class _Listening:
    """What is seen of one request while it runs."""

    def __init__(self, now_s: float) -> None:
        self.events: list[Moment] = []
        self.sent_s = self.last_s = now_s
        self.http_status: int | None = None
        self.failure: str | None = None
        self.reason: str | None = None

    def fail(self, status: str, reason: str) -> None:
        self.failure, self.reason = status, reason


class Client:
    """Asks one endpoint; times come from ``clock``, waiting is asyncio's."""

    def __init__(
        self, transport: Transport, endpoint: Endpoint, limits: Limits, clock: Clock, key: str | None = None
    ) -> None:
        self.endpoint = endpoint
        self.clock = clock
        self._transport = transport
        self._limits = limits
        self._key = key

    def asking(self, *, route: str, asks_usage: bool, ignores_eos: bool) -> Client:
        """Return a client that asks the same endpoint another way."""
        endpoint = replace(self.endpoint, route=route, asks_usage=asks_usage, ignores_eos=ignores_eos)
        return Client(self._transport, endpoint, self._limits, self.clock, self._key)

    async def ask(self, prompt: str, max_tokens: int, due_s: float | None = None) -> Timeline:
        """Send a request and listen to its end, or until a limit is met; ``due_s`` defaults to now."""
        seen = _Listening(self.clock())
        await self._within_limits(self._read(self._body(prompt, max_tokens), seen), seen)
        return Timeline(
            due_s=seen.sent_s if due_s is None else due_s,
            sent_s=seen.sent_s,
            events=tuple(seen.events),
            end_s=self.clock(),
            failure=seen.failure,
            reason=seen.reason,
            http_status=seen.http_status,
        )

    async def _within_limits(self, work: Coroutine[Any, Any, None], seen: _Listening) -> None:
        """Run what reads an answer; give it up when a limit is met, and say so.

        One timer a request, not one an event: that would cost more than reading the event.
        """
        reading = asyncio.ensure_future(work)
        try:
            while not reading.done():
                now_s = self.clock()
                stall_left = seen.last_s + self._limits.stall_s - now_s
                total_left = seen.sent_s + self._limits.request_limit_s - now_s
                if min(stall_left, total_left) <= 0:
                    self._give_up(seen, is_stall=stall_left <= 0)
                    return
                await asyncio.wait({reading}, timeout=min(stall_left, total_left))
            reading.result()
        finally:
            if not reading.done():
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    def _give_up(self, seen: _Listening, is_stall: bool) -> None:
        so_far = f"after {len(seen.events)} events"
        if is_stall:
            seen.fail(STALLED, f"no event for {self._limits.stall_s:g} s, {so_far}")
        else:
            seen.fail(TIMEOUT, f"no end within {self._limits.request_limit_s:g} s, {so_far}")

    async def _read(self, body: dict[str, Any], seen: _Listening) -> None:
        """Send a request and note every event."""
        # Not before this turn of the loop: what a busy client takes until then is its lateness, not latency.
        seen.sent_s = seen.last_s = self.clock()
        try:
            async with self._transport.post(ROUTES[self.endpoint.route], body) as answer:
                seen.http_status = answer.status
                if answer.status == 200:
                    await self._read_events(answer, seen)
                else:
                    said = hide_key(await read_all(answer), self._key)
                    seen.fail(REFUSED, refusal_text(answer.status, said))
        except TransportError as error:
            seen.fail(error.status, str(error))

    async def _read_events(self, answer: Answer, seen: _Listening) -> None:
        reader = EventReader()
        async with aclosing(answer.chunks) as chunks:
            async for chunk in chunks:
                now_s = self.clock()
                try:
                    found = reader.push(chunk)
                except ValueError as error:
                    seen.fail(MALFORMED, str(error))
                    return
                if self._note(found, seen, now_s):
                    return
        # Half an event at the end is a stream that was cut off, not one with a malformed event.
        tail = [data for data in reader.finish() if self._event(data).fault is None]
        self._note(tail, seen, self.clock())
        if not seen.events and reader.stray is not None:
            stray = shown(hide_key(reader.stray, self._key))
            seen.fail(MALFORMED, f"the answer is no stream of events: {stray}")

    def _note(self, found: list[bytes], seen: _Listening, now_s: float) -> bool:
        """Note events of one moment; returns whether the last one was among them."""
        for data in found:
            event = self._event(data)
            seen.events.append((now_s, event))
            seen.last_s = now_s
            if event.is_last:
                return True
        return False

    def _event(self, data: bytes) -> Event:
        event = read_event(data, self.endpoint.route)
        if event.error is None and event.fault is None:
            return event
        return read_event(hide_key(data, self._key), self.endpoint.route)

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        is_chat = self.endpoint.route == CHAT
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            **({"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self.endpoint.asks_usage:
            body["stream_options"] = {"include_usage": True}
        if self.endpoint.ignores_eos:
            body["ignore_eos"] = True
        return body


def refusal_text(status: int, body: bytes) -> str:
    """Return what an answer with an error status says, in one line."""
    try:
        plain = json.loads(body)
    except (ValueError, RecursionError):
        plain = None
    message = error_text(plain) if isinstance(plain, dict) else None
    if message is None and isinstance(plain, dict) and plain.get("detail"):
        message = one_line(str(plain["detail"]))
    text = message or shown(body)
    return f"HTTP {status}: {text}" if text else f"HTTP {status}"
