"""Server-sent events, as OpenAI streams are made of: ``data: {...}`` and, at the end, ``data: [DONE]``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

DONE = b"data: [DONE]\n\n"
MEDIA_TYPE = "text/event-stream"


def event(payload: Mapping[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventReader:
    """Cuts bytes into the texts of their ``data:`` lines, however the bytes were chunked."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the data of every line that ``chunk`` completes; comments and blank lines are dropped."""
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
