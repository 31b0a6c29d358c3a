"""The front alone: what it reads, and what it does with a backend that never answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api.errors import ApiError, from_engine
from serve.api.events import EventReader
from serve.api.requests import COMPLETIONS, FIELDS, Request, read
from serve.front.app import Front, build_app
from serve.front.backend import Stream, Whole
from serve.front.settings import FrontSettings
from serve.front.stop_mender import StopMender

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
requests = st.dictionaries(st.sampled_from([*FIELDS, "top_k"]), json_values, max_size=6)


class TestRead:
    @given(requests)
    def test_whatever_is_sent_is_read_or_refused(self, plain: dict[str, Any]) -> None:
        with suppress(ApiError):
            self.check(plain, read(COMPLETIONS, json.dumps(plain).encode(), default_model="m"))

    def check(self, plain: dict[str, Any], request: Request) -> None:
        assert json.loads(request.body.decode()) == request.fields
        assert {**request.fields, **{k: v for k, v in plain.items() if v is not None}} == request.fields
        assert all(len(stop) > 0 for stop in request.stops)

    @given(st.binary(max_size=200))
    def test_whatever_bytes_are_sent(self, body: bytes) -> None:
        with pytest.raises(ApiError) as refusal:
            read(COMPLETIONS, body)
        assert refusal.value.status == 400


@given(st.lists(st.text(alphabet="ab:\r ", max_size=5), max_size=8), st.data())
def test_events_are_found_however_they_are_cut(texts: list[str], data: st.DataObject) -> None:
    wire = "".join(f"data: {text}\n\n: comment\n" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    reader = EventReader()
    found = [
        event
        for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)
        for event in reader.push(wire[start:end])
    ]
    assert found == [text.strip().encode() for text in texts]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no", "code": 400}}, "no"),
        ({"error": "no"}, "no"),
        ({"detail": "no"}, "no"),
        ("no", "no"),
        ({"detail": [{"loc": ["a"]}]}, "[{'loc': ['a']}]"),
    ],
)
def test_refusals_of_engines_get_one_shape(body: Any, message: str) -> None:
    error = from_engine(422, body)
    assert (error.status, error.message, error.body()["error"]["code"]) == (422, message, None)


class Never:
    """A backend whose answers never come."""

    def __init__(self) -> None:
        self.is_cancelled = False

    async def answer(self, request: Request) -> Whole | Stream:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        raise AssertionError

    async def metrics(self) -> str:
        return ""

    def failure(self) -> str | None:
        return None

    async def close(self) -> None:
        pass


class Client:
    """One request to an application: ``send`` gives it what a connection gives, answers are kept."""

    def __init__(self, app: Any, receive: Any = None) -> None:
        self._app = app
        self._receive = receive or self._keep
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.status: int | None = None
        self.body = b""

    def send(self, **message: Any) -> None:
        self._incoming.put_nowait(message)

    async def post(self, **headers: str) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in {"host": "localhost", **headers}.items()],
        }  # fmt: skip

        await self._app(scope, self._incoming.get, self._receive)

    async def _keep(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.body += message.get("body", b"")


def front_of(**settings: Any) -> tuple[Never, Front, Any]:
    backend = Never()
    front = Front(backend, FrontSettings("m", **settings))
    return backend, front, build_app(front)


def test_body_that_does_not_come_is_given_up() -> None:
    async def run() -> Client:
        client = Client(front_of(body_timeout_s=0.01)[2])
        client.send(type="http.request", body=b"{", more_body=True)
        await client.post()
        return client

    assert asyncio.run(run()).status == 408


@pytest.mark.parametrize("is_chunked", [True, False])
def test_body_over_the_limit_is_refused(is_chunked: bool) -> None:
    async def run() -> Client:
        client = Client(front_of(max_body_bytes=10)[2])
        client.send(type="http.request", body=b"x" * 11, more_body=True)
        await client.post(**({} if is_chunked else {"content-length": "11"}))
        return client

    assert asyncio.run(run()).status == 413


def test_requests_over_the_limit_are_refused_and_those_that_leave_are_cancelled() -> None:
    async def run() -> None:
        backend, front, app = front_of(max_requests=1)
        first, second = Client(app), Client(app)
        first.send(type="http.request", body=b'{"prompt": "a"}', more_body=False)
        waiting = asyncio.ensure_future(first.post())
        while front.num_under_way == 0:
            await asyncio.sleep(0)
        second.send(type="http.request", body=b'{"prompt": "a"}', more_body=False)
        await second.post()
        assert second.status == 429
        assert json.loads(second.body)["error"]["type"] == "rate_limit_error"
        first.send(type="http.disconnect")
        await waiting
        assert backend.is_cancelled
        assert front.num_under_way == 0

    asyncio.run(run())


def test_stream_that_nobody_begins_to_read_ends() -> None:
    """The client is gone when the first byte is written: the iterator of the answer is never begun."""
    closed: list[bool] = []

    class Streams(Never):
        async def answer(self, request: Request) -> Stream:
            async def events() -> AsyncIterator[bytes]:
                yield b"data: {}\n\n"

            return Stream(events(), lambda: closed.append(True))

    async def gone(_message: dict[str, Any]) -> None:
        raise OSError

    async def run() -> int:
        front = Front(Streams(), FrontSettings("m"))
        client = Client(build_app(front), gone)
        client.send(type="http.request", body=b'{"prompt": "a", "stream": true}', more_body=False)
        with suppress(BaseException):
            await client.post()
        return front.num_under_way

    assert asyncio.run(run()) == 0
    assert closed


def test_draining_front_takes_no_request() -> None:
    async def run() -> Client:
        _, front, app = front_of()
        front.drain()
        client = Client(app)
        await client.post()
        return client

    assert asyncio.run(run()).status == 503


class TestStopMender:
    """Two choices of one stream are cut apart from each other."""

    def test_choices_are_cut_apart(self) -> None:
        async def engine() -> AsyncIterator[bytes]:
            for index, text in ((0, "one st"), (1, "two"), (0, "op more"), (1, " st"), (1, "ay")):
                choice = {"index": index, "text": text, "finish_reason": None}
                yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
            for index in (0, 1):
                choice = {"index": index, "text": "", "finish_reason": "length"}
                yield b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"

        async def run() -> list[Any]:
            request = read(COMPLETIONS, b'{"prompt": "a", "stop": ["stop", "stopp"], "stream": true}')
            pieces = [piece async for piece in StopMender(request).stream(engine())]
            assert pieces.pop() == b"data: [DONE]\n\n"
            return [json.loads(piece[6:])["choices"][0] for piece in pieces]

        choices = asyncio.run(run())
        texts = ["".join(c["text"] for c in choices if c["index"] == index) for index in (0, 1)]
        assert texts == ["one ", "two stay"]
        ends = {c["index"]: c["finish_reason"] for c in choices if c["finish_reason"]}
        assert ends == {0: "stop", 1: "length"}
