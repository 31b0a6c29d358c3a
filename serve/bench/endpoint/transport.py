"""Requests over HTTP: the one place that knows aiohttp, behind a protocol that a test can stand in for."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from cusprun.errors import MissingDependencyError, UserError, reason_of
from serve.bench.endpoint.events import one_line
from serve.bench.endpoint.records import DROPPED, MALFORMED, REFUSED, ROUTES

if TYPE_CHECKING:
    import aiohttp

INSTALL = "pip install 'cusprun[serve]'"
KEY_VARIABLE = "CUSPRUN_API_KEY"
_MAX_BODY_BYTES = 1 << 20  # of an answer that is no stream


class TransportError(Exception):
    """A request that got no answer, or not all of it; ``status`` is what that makes of it."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """The status of an answer and its bytes as they come."""

    status: int
    chunks: AsyncGenerator[bytes, None]


class Transport(Protocol):
    """A way to an endpoint; both methods raise ``TransportError``, and so may the chunks."""

    def post(self, path: str, body: Mapping[str, Any]) -> AbstractAsyncContextManager[Answer]:
        """Send a request below the base URL; leaving the context gives the answer up."""
        ...

    def get(self, path: str) -> AbstractAsyncContextManager[Answer]:
        """Ask for a resource below the base URL."""
        ...


def base_url(url: str) -> str:
    """Return the URL below which the routes are, such as ``http://127.0.0.1:8000/v1``.

    ``/v1`` is added to a URL without a path; a route at its end is taken off.

    Raises:
        UserError: it is no http or https URL, or it holds credentials or a query, which reports would tell.
    """
    text = url.strip()
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port_is_sound = parts.port is None or parts.port > 0
    except ValueError:
        raise UserError(
            f"the endpoint {_without_secrets(text)!r} is no URL; give one like {_EXAMPLE}"
        ) from None
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"the endpoint {_without_secrets(text)} holds a name or password, which reports would tell; take "
            f"it out and give the key by ${KEY_VARIABLE} or --api-key"
        )
    if parts.query or parts.fragment:
        raise UserError(
            f"the endpoint {_without_secrets(text)} goes on after its path, which reports would tell; take "
            f"that out and give a key by ${KEY_VARIABLE} or --api-key"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_sound:
        raise UserError(f"the endpoint {text!r:.120} is no http or https URL; give one like {_EXAMPLE}")
    path = parts.path.rstrip("/")
    for route in ROUTES.values():
        path = path.removesuffix(route)
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


_EXAMPLE = "http://127.0.0.1:8000/v1"


def _without_secrets(url: str) -> str:
    """Return a URL without what stands before its host and after its path."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    place = rest.partition("?")[0].partition("#")[0]
    return f"{scheme}{separator}{place.rpartition('@')[2]}"[:120]


def check_key(key: str | None) -> str | None:
    """Return a key that fits into a header; None for an empty one.

    Raises:
        UserError: it holds what no header can.
    """
    if key is None or not key.strip():
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("the API key must be printable ASCII without spaces; check what was given")
    return key


def require_aiohttp() -> None:
    """Raise ``MissingDependencyError`` when the HTTP client is not installed."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            f"aiohttp, which sends the requests, is not installed; run: {INSTALL}"
        ) from None


class HttpTransport:
    """An endpoint over HTTP. Each request has a connection of its own, as its latency says.

    A kept connection saves what it costs to connect, and loses the request that is written to it just as the
    endpoint closes it. Proxies and credentials of the environment are not used, redirects not followed: the
    key goes to the URL that was given and nowhere else.
    """

    def __init__(self, session: aiohttp.ClientSession, base: str, key: str | None) -> None:
        self._session = session
        self._base = base
        self._key = key

    @asynccontextmanager
    async def post(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[Answer]:
        """See :class:`Transport`."""
        async with self._ask("POST", path, json.dumps(body).encode()) as answer:
            yield answer

    @asynccontextmanager
    async def get(self, path: str) -> AsyncIterator[Answer]:
        """See :class:`Transport`."""
        async with self._ask("GET", path, None) as answer:
            yield answer

    @asynccontextmanager
    async def _ask(self, method: str, path: str, body: bytes | None) -> AsyncIterator[Answer]:
        with self._failures():
            response = await self._session.request(
                method, f"{self._base}{path}", data=body, headers=self._headers(), allow_redirects=False
            )
        try:
            yield Answer(response.status, self._chunks(response))
        finally:
            response.close()

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        with self._failures():
            async for chunk in response.content.iter_any():
                yield chunk

    def _headers(self) -> dict[str, str]:
        # Compressed events wait for each other in the compressor.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return headers if self._key is None else {**headers, "Authorization": f"Bearer {self._key}"}

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Raise ``TransportError`` for what aiohttp raises."""
        import aiohttp

        try:
            yield
        except aiohttp.ClientConnectorError as error:
            raise TransportError(REFUSED, f"no connection: {self._clean(error)}") from None
        except aiohttp.ClientPayloadError:
            raise TransportError(DROPPED, "the connection ended in the middle of the answer") from None
        except aiohttp.ServerDisconnectedError:
            raise TransportError(DROPPED, "the connection ended before the answer began") from None
        except aiohttp.ClientResponseError as error:
            raise TransportError(MALFORMED, f"the answer is not HTTP: {self._clean(error)}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise TransportError(DROPPED, f"the connection broke: {self._clean(error)}") from None

    def _clean(self, error: Exception) -> str:
        return one_line(hide_key(reason_of(error).encode(), self._key).decode())


def hide_key(data: bytes, key: str | None) -> bytes:
    """Return bytes without the key: endpoints like to repeat what they refuse."""
    return data if key is None else data.replace(key.encode(), b"[key]")


@asynccontextmanager
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    """Open what all transports of a load test share."""
    import aiohttp

    async with aiohttp.ClientSession(
        # Whoever waits for an answer keeps the time.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None),
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        trust_env=False,
    ) as session:
        yield session


async def read_all(answer: Answer) -> bytes:
    """Return the bytes of an answer that is no stream, at most 1 MiB of them."""
    body = b""
    async with aclosing(answer.chunks) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) >= _MAX_BODY_BYTES:
                break
    return body[:_MAX_BODY_BYTES]
