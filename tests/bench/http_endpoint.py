"""A real server on loopback that behaves as the name of the model says, well or badly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from fake_endpoint import DONE, END, ROLE, data, delta, usage

KEY = "sk-very-secret"


class HttpEndpoint:
    """What was asked, and where it listens."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self.closing = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def models(self, request: web.Request) -> web.StreamResponse:
        if (request.headers.get("Authorization") or "") == "Bearer wrong":
            return web.json_response({"error": {"message": "bad key wrong"}}, status=401)
        return web.json_response({"data": [{"id": self.model}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        refusal = REFUSALS.get(body["model"], lambda _: None)(body)
        if refusal is not None:
            return web.json_response({"error": {"message": refusal}}, status=400)
        if body["model"] == "teapot":
            return web.json_response({"error": {"message": f"no tea for {KEY}"}}, status=418)
        if body["model"] == "redirect":
            return web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"})
        if body["model"] == "no_stream":
            return web.json_response({"choices": [{"message": {"content": "hi"}}]})
        return await self._stream(request, body)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        response = await _begin(request)
        words = [data({"choices": [{"text": f" {n}"}]}) for n in range(body["max_tokens"])]
        end = data({"choices": [{"text": "", "finish_reason": "length"}]})
        await response.write(b"".join(words) + end + usage(body["max_tokens"]) + DONE)
        return response

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await _begin(request)
        for piece in PIECES.get(body["model"], good)(body):
            if piece is STALL:
                await self.closing.wait()
            elif piece is BREAK:
                assert request.transport is not None
                request.transport.abort()
                return response
            else:
                await response.write(piece)
        return response


async def _begin(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


STALL, BREAK = b"stall", b"break"


def words(body: dict[str, Any]) -> list[bytes]:
    return [ROLE, *(delta(content=f" wörd{n}") for n in range(body["max_tokens"]))]


def tail(body: dict[str, Any], tokens: int | None = None) -> bytes:
    asked = (body.get("stream_options") or {}).get("include_usage")
    return END + (usage(body["max_tokens"] if tokens is None else tokens) if asked else b"") + DONE


def good(body: dict[str, Any]) -> list[bytes]:
    return [*words(body), tail(body)]


def in_bytes(body: dict[str, Any]) -> list[bytes]:
    wire = b"".join([*words(body), tail(body)]).replace(b"\n", b"\r\n")
    return [bytes([byte]) for byte in wire]


PIECES: dict[str, Callable[[dict[str, Any]], list[bytes]]] = {
    "in_bytes": in_bytes,
    "stall": lambda body: [*words(body)[:2], STALL],
    "stall_at_once": lambda _: [STALL],
    "drop": lambda body: words(body)[:3],
    "break": lambda body: [*words(body)[:3], BREAK],
    "malformed": lambda body: [*words(body)[:3], b"data: {oops\n\n", DONE],
    "error": lambda body: [*words(body)[:2], data({"error": {"message": f"out of memory, {KEY}"}})],
    "no_tokens": lambda body: [ROLE, tail(body, 0)],
    "wrong_usage": lambda body: [*words(body), tail(body, 10 * body["max_tokens"])],
    "zero_usage": lambda body: [*words(body), tail(body, 0)],
    "no_usage": lambda body: [*words(body), END + DONE],
    "reasons": lambda body: [ROLE, delta(reasoning_content="Hm"), delta(content="a"), tail(body, 2)],
}

REFUSALS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "strict": lambda body: "unknown field ignore_eos" if "ignore_eos" in body else None,
    "stricter": lambda body: "unknown field" if {"ignore_eos", "stream_options"} & set(body) else None,
    "base": lambda _: "no chat template",
}


@contextmanager
def http_endpoint(model: str = "good") -> Iterator[HttpEndpoint]:
    """Serve on a free port of loopback, in a thread with a loop of its own; list ``model``."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    found: list[HttpEndpoint] = []

    async def serve() -> web.AppRunner:
        endpoint = HttpEndpoint(model)
        app = web.Application()
        app.router.add_get("/v1/models", endpoint.models)
        app.router.add_post("/v1/chat/completions", endpoint.chat)
        app.router.add_post("/v1/completions", endpoint.completions)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        endpoint.port = runner.addresses[0][1]
        found.append(endpoint)
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        ready.set()
        loop.run_forever()
        found[0].closing.set()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
