"""The HTTP application: OpenAI's routes in front of one backend."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serve.api.errors import ApiError
from serve.api.events import MEDIA_TYPE
from serve.api.requests import CHAT, COMPLETIONS, read
from serve.front.backend import Backend, Stream
from serve.front.counters import LEFT, Counters, Seen
from serve.front.hosts import is_loopback
from serve.front.settings import FrontSettings


def build_app(front: Front) -> FastAPI:
    """Return the application; everything but ``/health`` wants a key when there are keys."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    router = APIRouter(dependencies=[Depends(front.require_origin), Depends(front.require_key)])
    router.add_api_route(CHAT, front.generate, methods=["POST"])
    router.add_api_route(COMPLETIONS, front.generate, methods=["POST"])
    router.add_api_route("/v1/models", front.models, methods=["GET"])
    router.add_api_route("/v1/models/{name:path}", front.model, methods=["GET"])
    router.add_api_route("/metrics", front.metrics, methods=["GET"])
    app.add_api_route("/health", front.health, methods=["GET"])
    app.include_router(router)
    add_error_handlers(app)
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Give every refusal and failure of an application OpenAI's shape."""
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _unexpected)


class Front:
    """The routes of one backend, the requests that are under way, and whether new ones are taken."""

    def __init__(self, backend: Backend, settings: FrontSettings) -> None:
        self._backend = backend
        self._settings = settings
        self._keys = tuple(key.encode() for key in settings.keys)
        self._created = int(time.time())
        self._counters = Counters()
        self._is_draining = False

    @property
    def num_under_way(self) -> int:
        """Requests whose answers are not finished."""
        return self._counters.num_under_way

    def failure(self) -> str | None:
        """Return why the engine has ended; None while it lives."""
        return self._backend.failure()

    async def close(self) -> None:
        """Let go of the backend's connections and unfinished work."""
        await self._backend.close()

    def drain(self) -> None:
        """Refuse new requests from here on."""
        self._is_draining = True

    async def require_origin(self, http: HttpRequest) -> None:
        """Refuse pages of other sites, and names of other hosts for a server on loopback.

        A browser lets any page post to loopback, and a page whose host name is made to mean 127.0.0.1 read
        the answers as well.
        """
        host = http.headers.get("host", "")
        origin = http.headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            raise ApiError(403, "requests of web pages of other hosts are refused (CORS is off)")
        if self._settings.is_loopback and not is_loopback(_split(f"//{host}").hostname or ""):
            raise ApiError(403, f"the host {host[:100]!r} is not this machine's loopback")

    async def require_key(self, http: HttpRequest) -> None:
        """Refuse a request without one of the keys; all are compared, in a time that tells nothing."""
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if self._keys and (
            scheme.lower() != "bearer"
            or not sum(hmac.compare_digest(given.strip().encode(), key) for key in self._keys)
        ):
            raise ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def generate(self, http: HttpRequest) -> Response:
        """Answer a chat or a completion, whole or as a stream."""
        with self._counters.request() as seen:
            if self._is_draining:
                raise ApiError(503, "the server is shutting down")
            if self._counters.num_under_way > self._settings.max_requests:
                raise ApiError(429, f"{self._settings.max_requests} requests are under way; try again later")
            try:
                body = await self._body(http)
            except ClientDisconnect:
                return Response(status_code=LEFT)  # nobody reads it
            request = read(http.scope["route"].path, body, default_model=self._settings.model)
            answer = await _while_connected(http, self._backend.answer(request))
            if answer is None:
                return Response(status_code=LEFT)  # nobody reads it
            if not isinstance(answer, Stream):
                seen.done(200)
                return Response(answer.body, media_type="application/json")
            seen.go_on()
        return _Streamed(answer, seen)

    async def models(self) -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [self.description()]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the model; 404 for another name."""
        if name != self._settings.model:
            raise ApiError(404, f"the model {name[:100]!r} is not served here", code="model_not_found")
        return self.description()

    async def metrics(self) -> PlainTextResponse:
        """Return the front's counters and the engine's own metrics."""
        text = self._counters.text() + await self._backend.metrics()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def health(self) -> JSONResponse:
        """Say whether the engine lives."""
        status = "ended" if self.failure() else "draining" if self._is_draining else "ok"
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    def description(self) -> dict[str, Any]:
        """Return what is said of the model."""
        return {
            "id": self._settings.model,
            "object": "model",
            "created": self._created,
            "owned_by": "cusprun",
            "max_model_len": self._settings.context_tokens,
        }

    async def _body(self, http: HttpRequest) -> bytes:
        limit, patience_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        stated = http.headers.get("content-length", "")
        if stated.isdigit() and int(stated) > limit:
            raise ApiError(413, f"the body has {int(stated):,} bytes; {limit:,} are taken")
        try:
            return await asyncio.wait_for(_read_body(http, limit), patience_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {patience_s:g} s") from None


class _Streamed(StreamingResponse):
    """A stream whose end is counted and whose work ends, also when the client leaves before it begins."""

    def __init__(self, answer: Stream, seen: Seen) -> None:
        super().__init__(seen.through(answer.events), media_type=MEDIA_TYPE)
        self._answer = answer
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._seen.done(LEFT)
            self._answer.close()


async def _read_body(http: HttpRequest, limit: int) -> bytes:
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"the body has more than {limit:,} bytes, which are taken")
    return bytes(body)


async def _while_connected(http: HttpRequest, work: Any) -> Any:
    """Return what ``work`` returns, or None, with the work cancelled, when the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _left(http: HttpRequest) -> None:
    """Return when the client has closed its connection; the body was read, so nothing else is to come."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _split(url: str) -> SplitResult:
    """Return the parts of a URL, none of one that is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _answer(error: ApiError) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.status == 429:
        headers["Retry-After"] = "1"
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _refused(_http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _no_route(http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = {404: f"there is no {http.url.path[:100]!r} here", 405: f"{http.method} is not for this route"}
    return _answer(ApiError(error.status_code, known.get(error.status_code, str(error.detail))))


async def _unexpected(_http: HttpRequest, error: Exception) -> JSONResponse:
    return _answer(ApiError(500, f"unexpected {type(error).__name__}; the server's log says more"))
