"""Server-sent events as endpoints stream them: bytes to events, however the bytes were cut. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.bench.endpoint.records import CHAT

MAX_EVENT_BYTES = 1 << 24
"""Of one event; an endpoint that sends more without an end is not listened to further."""

DONE = b"[DONE]"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\r|\n")
_FIELDS = frozenset({b"data", b"event", b"id", b"retry"})
_SHOWN_CHARACTERS = 120


class EventReader:
    """Cuts bytes into the data of events, by the rules of the HTML standard for ``text/event-stream``.

    Lines end with LF, CR or CRLF; comments and fields other than ``data`` are passed over; several data lines
    are one text. Lines are cut before they are decoded, so no character is split. ``stray`` is the first line
    that is no field of an event, as of an answer that is no stream.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self.stray: bytes | None = None
        self._max_bytes = max_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._num_data_bytes = 0
        self._after_carriage_return = False
        self._is_first_line = True

    def push(self, chunk: bytes) -> list[bytes]:
        """Return the data of every event that ``chunk`` completes.

        Raises:
            ValueError: an event is longer than the limit.
        """
        if self._after_carriage_return and chunk:
            chunk = chunk.removeprefix(b"\n")  # the second half of a line end that was cut in two
            self._after_carriage_return = False
        text = self._rest + chunk
        *lines, self._rest = _LINE_END.split(text)
        self._after_carriage_return = self._after_carriage_return or text.endswith(b"\r")
        found = [data for line in lines if (data := self._line(line)) is not None]
        if len(self._rest) + self._num_data_bytes > self._max_bytes:
            raise ValueError(f"an event has more than {self._max_bytes} bytes")
        return found

    def finish(self) -> list[bytes]:
        """Return what the end of the stream leaves: the data of an event without the blank line after it."""
        found = [self._line(self._rest), self._line(b"")] if self._rest else [self._line(b"")]
        self._rest = b""
        return [data for data in found if data is not None]

    def _line(self, line: bytes) -> bytes | None:
        """Take one line; return the data of the event that it ends, if it does and there is any."""
        if self._is_first_line:
            line, self._is_first_line = line.removeprefix(_BYTE_ORDER_MARK), False
        if not line:
            data, self._data, self._num_data_bytes = b"\n".join(self._data), [], 0
            return data if data.strip() else None
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
            self._num_data_bytes += len(value)
        elif field and field not in _FIELDS and self.stray is None:
            self.stray = line
        return None


@dataclass(frozen=True)
class Usage:
    """Token counts as an endpoint states them; None where it states none, or none that is a whole number."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Event:
    """What one event says.

    ``text`` is new text of the answer and ``reasoning`` of the thinking before it: either is something to
    read. ``finish_reason`` ends the answer, ``is_done`` the stream. ``error`` is the endpoint's own message,
    ``fault`` says why the event is not one of OpenAI's.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None
    fault: str | None = None
    is_done: bool = False

    @property
    def content(self) -> str:
        """What there is to read."""
        return self.reasoning + self.text

    @property
    def is_last(self) -> bool:
        """Whether nothing after it is worth waiting for."""
        return self.is_done or self.error is not None or self.fault is not None


def read_event(data: bytes, route: str) -> Event:
    """Read the data of one event of a stream of ``route``; what cannot be read is an event with a fault."""
    if data.strip() == DONE:
        return Event(is_done=True)
    try:
        plain = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return Event(fault=f"an event is not JSON: {shown(data)}")
    if not isinstance(plain, dict):
        return Event(fault=f"an event is no JSON object: {shown(data)}")
    error = error_text(plain)
    if error is not None:
        return Event(error=error)
    choices = plain.get("choices")
    usage = _usage(plain.get("usage"))
    if not choices and (choices is None or isinstance(choices, list)):
        return Event(usage=usage)
    try:
        text, reasoning, finish_reason = _choice(choices[0], route)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        return Event(fault=f"an event is not as OpenAI's: {shown(data)}")
    return Event(text, reasoning, finish_reason, usage)


def _choice(choice: Any, route: str) -> tuple[str, str, str | None]:
    """Return text, reasoning and finish reason of a choice; raises for one of another shape."""
    part = (choice.get("delta") or {}) if route == CHAT else choice
    text = _text(part.get("content" if route == CHAT else "text"))
    reasoning = _text(part.get("reasoning_content")) or _text(part.get("reasoning"))
    return text, reasoning, _text(choice.get("finish_reason")) or None


def _text(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise TypeError("not a text")
    return value or ""


def _usage(plain: Any) -> Usage | None:
    if not isinstance(plain, Mapping):
        return None
    counts = [plain.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Usage(*(count if type(count) is int else None for count in counts))


def error_text(plain: Mapping[str, Any]) -> str | None:
    """Return the message of an error in one of the shapes in use, None for what is no error."""
    found = plain.get("error")
    if found is None and plain.get("object") == "error":
        found = plain
    if not found:
        return None
    message = found.get("message") if isinstance(found, Mapping) else None
    return one_line(str(message or found))


def shown(data: bytes) -> str:
    """Return the beginning of some bytes, fit for one line."""
    return one_line(data.decode("utf-8", "replace"))


def one_line(text: str) -> str:
    """Return the beginning of a text in one line of printable characters."""
    whole = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return whole if len(whole) <= _SHOWN_CHARACTERS else f"{whole[:_SHOWN_CHARACTERS]}…"
