"""Stop texts cut in the front, for engines that let part of one through."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from serve.api.errors import from_engine
from serve.api.events import DONE, EventReader, event
from serve.api.requests import CHAT, Request
from serve.api.stops import StopFilter


class StopMender:
    """Cuts the answers to one request at the first stop text; see ``serve.front.proxy.Mender``.

    The engine gets the stops too, so that it ends its work about where the text is cut.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_chat = request.route == CHAT
        self._filters: dict[int, StopFilter] = {}

    def request(self) -> Mapping[str, Any]:
        """Return the fields that the engine is to get."""
        return self._request.fields

    def whole(self, body: bytes) -> bytes:
        """Return the answer with every choice cut."""
        plain = json.loads(body)
        for choice in plain["choices"]:
            holder, key = (choice["message"], "content") if self._is_chat else (choice, "text")
            self._cut(choice, holder, key, is_last=True)
        return json.dumps(plain, ensure_ascii=False).encode()

    async def stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the events with every choice cut; one whose text is held back or cut off is left out."""
        reader = EventReader()
        async for chunk in chunks:
            for data in reader.push(chunk):
                if data == b"[DONE]":
                    continue
                plain = json.loads(data)
                if "error" in plain:
                    yield event(from_engine(500, plain).body())
                    return
                for part in self._mended(plain):
                    yield event(part)
        yield DONE

    def _mended(self, plain: dict[str, Any]) -> Iterator[dict[str, Any]]:
        says = not plain["choices"]
        for choice in plain["choices"]:
            holder, key = (choice["delta"], "content") if self._is_chat else (choice, "text")
            says |= self._cut(choice, holder, key, is_last=bool(choice.get("finish_reason")))
        if says:
            yield plain

    def _cut(self, choice: dict[str, Any], holder: dict[str, Any], key: str, *, is_last: bool) -> bool:
        """Cut one choice in place; returns whether anything is left that a client needs."""
        stops = self._filters.setdefault(choice.get("index", 0), StopFilter(self._request.stops))
        text = holder.get(key)
        shown = stops.push(text) if isinstance(text, str) else ""
        if is_last and not stops.is_stopped:
            shown += stops.finish()
        if isinstance(text, str) or shown:
            holder[key] = shown
        if is_last and stops.is_stopped:
            choice["finish_reason"] = "stop"
        return is_last or bool(shown) or not isinstance(text, str)
