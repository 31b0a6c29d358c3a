"""The server's life: a socket taken first, answers until a signal, a drain with a limit."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cusprun.errors import UserError
from serve.front.app import Front
from serve.front.protocol import BoundedProtocol

_WATCH_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048


@dataclass(frozen=True)
class Outcome:
    """How serving ended: ``failure`` is why the engine ended by itself, ``num_cut_off`` the answers that the
    drain's limit cut off."""

    failure: str | None = None
    num_cut_off: int = 0


def bind(host: str, port: int) -> socket.socket:
    """Take an address without listening yet, so that a port in use shows before an engine is started.

    Raises:
        UserError: the port is in use or not allowed, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(
            f"the host {host!r} cannot be used ({error}); give an address of this machine"
        ) from None
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        taken.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "is in use" if in_use else f"cannot be taken ({error})"
        raise UserError(f"port {port} of {host} {reason}; give another --port") from None
    return taken


def serve_until_signal(
    app: FastAPI, fronts: Sequence[Front], taken: socket.socket, drain_s: float, ready: Callable[[], None]
) -> Outcome:
    """Answer requests to ``app`` on ``taken`` until SIGINT or SIGTERM, or until an engine ends by itself.

    After a signal, requests under way in the ``fronts`` are finished, for at most ``drain_s``; further ones
    get 503. A second signal ends at once. ``ready`` is called once the server answers.
    """
    _listen(taken)
    return asyncio.run(_serve(app, fronts, taken, drain_s, ready))


def _listen(taken: socket.socket) -> None:
    """Begin to listen; raises ``UserError`` where another process that has bound the address was first."""
    try:
        taken.listen(_BACKLOG)
    except OSError as error:
        port = taken.getsockname()[1]
        raise UserError(
            f"port {port} cannot be listened on ({error.strerror}); give another --port"
        ) from None


async def _serve(
    app: FastAPI, fronts: Sequence[Front], taken: socket.socket, drain_s: float, ready: Callable[[], None]
) -> Outcome:
    server = _Server(
        uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=1,
        )
    )
    watch = asyncio.ensure_future(_watch(server, fronts, drain_s, ready))
    try:
        await server.serve(sockets=[taken])
        return await watch
    finally:
        watch.cancel()
        for front in fronts:
            await front.close()


async def _watch(
    server: _Server, fronts: Sequence[Front], drain_s: float, ready: Callable[[], None]
) -> Outcome:
    """Wait for what ends the server, drain, and let it end."""
    try:
        while not server.started and not server.should_exit:
            await asyncio.sleep(_WATCH_S / 50)
        ready()
        failure = None
        while server.num_signals == 0 and failure is None:
            await asyncio.sleep(_WATCH_S)
            failure = next((front.failure() for front in fronts if front.failure()), None)
        if server.num_signals:
            failure = None
            await _drain(server, fronts, drain_s)
    finally:
        server.should_exit = True  # also where ready fails: nobody else heeds signals
    return Outcome(failure, sum(front.num_under_way for front in fronts))


async def _drain(server: _Server, fronts: Sequence[Front], drain_s: float) -> None:
    for front in fronts:
        front.drain()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + drain_s
    while any(front.num_under_way for front in fronts) and server.num_signals == 1:
        if loop.time() >= deadline:
            return
        await asyncio.sleep(_WATCH_S / 10)


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals begin the drain of :func:`_watch` in the place of its own."""

    num_signals = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Count signals while the server runs; the handlers of before come back afterwards."""

        def count(_number: int, _frame: FrameType | None) -> None:
            self.num_signals += 1

        before = {number: signal.signal(number, count) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
