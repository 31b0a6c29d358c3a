"""A backend that hands requests to an engine's own HTTP server on loopback, and its answers back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from serve.api.errors import ApiError, from_engine
from serve.api.events import event
from serve.api.requests import Request, encode
from serve.front.backend import Stream, Whole

if TYPE_CHECKING:
    import aiohttp

_CONNECT_S = 10.0


@dataclass(frozen=True)
class Refusal:
    """What an engine does not do, or does silently otherwise: such requests are refused with ``why``."""

    param: str
    applies: Callable[[Request], bool]
    why: str


class Mender(Protocol):
    """Makes an engine's requests and answers what the contract wants; one object per request."""

    def request(self) -> Mapping[str, Any]:
        """Return the fields that the engine is to get."""
        ...

    def whole(self, body: bytes) -> bytes:
        """Return the contract's answer for the engine's."""
        ...

    def stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Return the contract's events for the engine's bytes."""
        ...


@dataclass(frozen=True)
class Upstream:
    """Where an engine listens, the key it was given, and what the front does for it.

    ``mender`` makes the object that mends one request, None for one that needs none, or refuses it with
    ``ApiError``; ``failure`` says why
    the engine has ended.
    """

    url: str
    key: str
    failure: Callable[[], str | None]
    refusals: tuple[Refusal, ...] = ()
    mender: Callable[[Request], Mender | None] | None = None
    has_metrics: bool = True


class Proxy:
    """The backend of one upstream engine."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._session: aiohttp.ClientSession | None = None

    async def answer(self, request: Request) -> Whole | Stream:
        """Hand a request on; raises ``ApiError`` for the engine's refusals and when it is gone."""
        for refusal in self._upstream.refusals:
            if refusal.applies(request):
                raise ApiError(400, refusal.why, param=refusal.param)
        mender = self._upstream.mender(request) if self._upstream.mender else None
        body = encode(mender.request()) if mender else request.body
        answer = await self._post(request.route, body)
        try:
            with self._reached():
                if answer.status >= 400:
                    raise from_engine(answer.status, _plain(await answer.read()))
                if request.is_stream:
                    events = self._events(answer)
                    return Stream(mender.stream(events) if mender else events, answer.close)
                whole = await answer.read()
        except BaseException:
            answer.close()
            raise
        return Whole(mender.whole(whole) if mender else whole)

    async def metrics(self) -> str:
        """Return the engine's metrics."""
        if not self._upstream.has_metrics:
            return ""
        with suppress(ApiError), self._reached():
            async with self._client().get(f"{self._upstream.url}/metrics", headers=self._headers()) as answer:
                return await answer.text() if answer.status == 200 else ""
        return ""

    def failure(self) -> str | None:
        """Return why the engine has ended; None while it lives."""
        return self._upstream.failure()

    async def close(self) -> None:
        """Close the connections to the engine."""
        if self._session is not None:
            await self._session.close()

    async def _post(self, route: str, body: bytes) -> aiohttp.ClientResponse:
        with self._reached():
            return await self._client().post(
                f"{self._upstream.url}{route}", data=body, headers=self._headers(), allow_redirects=False
            )

    async def _events(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield the engine's bytes, no part of a line, so that an error may follow wherever the engine ends.

        Closing this closes the connection, at which engines stop their work.
        """
        rest = b""
        try:
            with self._reached():
                async for chunk in answer.content.iter_any():
                    whole, end, rest = (rest + chunk).rpartition(b"\n")
                    if end:
                        yield whole + end
            if rest:
                yield rest
        except ApiError as error:
            yield b"\n" + event(error.body())  # the blank line ends an event that the engine began
        finally:
            answer.close()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Raise ``ApiError`` for an engine that cannot be reached, or ends in the middle of an answer."""
        import aiohttp

        try:
            yield
        except (OSError, aiohttp.ClientError):
            raise ApiError(
                503, "the engine does not answer; the server's log says why", code="engine_gone"
            ) from None

    def _client(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
                # A connection for each request, 0.2 ms on loopback: an engine that closes one it kept alive
                # just as the next request is written to it would lose that request.
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                trust_env=False,
            )
        return self._session

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._upstream.key}", "Content-Type": "application/json"}


def _plain(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip()
