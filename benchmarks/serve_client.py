"""The client of the serving benchmarks: one connection a request, timed as a user sees it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_target import NAME

from cusprun.errors import MeasurementError

_ROUTE = "/v1/completions"
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Answer:
    """What came back, and when, in seconds since the request was begun.

    ``num_tokens`` is the server's own count, 0 where it gives none; ``first_s`` is when the first text of a
    stream came; ``timings`` are what llama.cpp measured; ``is_left`` where the client did not wait for the
    end.
    """

    status: int
    text: str = ""
    num_tokens: int = 0
    seconds: float = 0.0
    first_s: float | None = None
    is_left: bool = False
    timings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time after the first."""
        assert self.first_s is not None
        return (self.num_tokens - 1) / (self.seconds - self.first_s)


def ask(port: int, prompt: str | list[int], max_tokens: int, **fields: Any) -> Answer:
    """Ask for a greedy completion and wait for all of it; a status other than 200 is returned as it is."""
    started = time.perf_counter()
    connection, response = _post(port, prompt, max_tokens, fields)
    try:
        body = response.read()
        seconds = time.perf_counter() - started
    finally:
        connection.close()
    if response.status != 200:
        return Answer(response.status, body.decode("utf-8", "replace"), seconds=seconds)
    plain = json.loads(body)
    return Answer(
        200,
        plain["choices"][0]["text"],
        plain["usage"]["completion_tokens"],
        seconds,
        timings=plain.get("timings", {}),
    )


def stream(port: int, prompt: str | list[int], max_tokens: int, *, leave_after: int | None = None) -> Answer:
    """Ask for a greedy completion as a stream; leave after so many events with text, if given.

    Raises:
        MeasurementError: the stream ends before the answer does.
    """
    started = time.perf_counter()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    connection, response = _post(port, prompt, max_tokens, options)
    texts: list[str] = []
    first_s = end_s = None
    num_tokens = 0
    try:
        if response.status != 200:
            text = response.read().decode("utf-8", "replace")
            return Answer(response.status, text, seconds=time.perf_counter() - started)
        for event in _events(response):
            now_s = time.perf_counter() - started
            if "error" in event:
                raise MeasurementError(f"a stream ended in an error: {event['error']}")
            for choice in event.get("choices", ()):
                if choice.get("text"):
                    texts.append(choice["text"])
                    first_s = now_s if first_s is None else first_s
                end_s = now_s if choice.get("finish_reason") else end_s
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
            if leave_after is not None and len(texts) >= leave_after:
                return Answer(200, "".join(texts), seconds=now_s, first_s=first_s, is_left=True)
    finally:
        connection.close()
    if end_s is None:
        raise MeasurementError("a stream ended before its answer did")
    return Answer(200, "".join(texts), num_tokens, end_s, first_s)


def _post(
    port: int, prompt: str | list[int], max_tokens: int, fields: Mapping[str, Any]
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    try:
        connection.request("POST", _ROUTE, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return connection, connection.getresponse()
    except BaseException:
        connection.close()
        raise


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline():
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)
