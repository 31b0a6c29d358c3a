"""Two artifacts side by side: a server of each, and a page that asks both the same."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.pipeline.serving import (
    ServeOptions,
    Waiting,
    address_of,
    front_settings,
    kind_of,
    raise_unless_served,
    refuse_open_door,
    show_output,
)
from cusprun.progress import SILENT, Progress
from cusprun.resolve import StrPath, locate

if TYPE_CHECKING:
    from serve.child_server import ChildServer

log = logging.getLogger(__name__)

_FRONT_S = 60.0  # that the child may take beyond its engine

# Runs in the user's folder, which may be one that was downloaded: nothing is imported from there.
_PROGRAM = (
    sys.executable,
    "-c",
    "import sys; sys.path[:] = filter(None, sys.path); from cusprun.cli import main; main()",
)

KEY_VARIABLE = "CUSPRUN_API_KEY"
"""Environment variable with a key of ``cusprun serve``."""


def serve_side_by_side(
    before: StrPath,
    after: StrPath,
    options: ServeOptions | None = None,
    *,
    engine: str | None = None,
    ready: Callable[[str], None] = log.info,
    progress: Progress = SILENT,
) -> None:
    """Serve two artifacts and a page with both answers to one prompt, until SIGINT or SIGTERM.

    Each has a ``cusprun serve`` of its own with the same options; OpenAI's interface of each is below
    ``/before/v1`` and ``/after/v1``. ``engine`` is chosen by the kind of each artifact when None.

    Raises:
        UserError: an option cannot be, or the port is in use.
        ModelError: an artifact is missing or damaged, or its server does not start.
        ServingError: a server ended by itself, or answers were cut off at the end of the drain.
    """
    asked = options or ServeOptions()
    paths = {"before": locate(before, progress).path, "after": locate(after, progress).path}
    for path in paths.values():
        kind_of(path)
    refuse_open_door(asked)
    from serve.front.app import Front
    from serve.front.proxy import Proxy, Upstream
    from serve.front.run import bind, serve_until_signal
    from serve.side_by_side.app import build_page

    with ExitStack() as stack:
        taken = stack.enter_context(bind(asked.host, asked.port))
        fronts, memory_bytes = {}, {}
        for side, path in paths.items():
            with progress.stage(f"starting {side}", 1) as advance:
                key = secrets.token_urlsafe(16)
                server = _start(path, asked, engine, key)
                stack.callback(server.close)
                advance(1)
            model, context_tokens = _served(server, key)
            settings = front_settings(asked, model, context_tokens)
            fronts[side] = Front(Proxy(Upstream(server.url, key, server.failure)), settings)
            memory_bytes[side] = server.memory_bytes
        names = " and ".join(path.name for path in paths.values())
        address = address_of(asked.host, taken.getsockname()[1])
        outcome = serve_until_signal(
            build_page(fronts, memory_bytes, needs_key=bool(asked.keys)),
            tuple(fronts.values()),
            taken,
            asked.drain_s,
            lambda: ready(f"serving {names} side by side on {address}/"),
        )
    raise_unless_served(outcome, "side by side", asked)


def _start(path: Path, options: ServeOptions, engine: str | None, key: str) -> ChildServer:
    """Start ``cusprun serve`` on one artifact, on a port of loopback."""
    from serve.child_server import ChildServer, free_port, import_path
    from serve.engines.options import drop_output
    from serve.engines.protocol import START_TIMEOUT_S

    port = free_port()
    wishes = {
        "--engine": engine,
        "--context": options.context_tokens,
        "--parallel": options.parallel,
        "--threads": options.num_threads,
        "--drain": options.drain_s,
    }
    command = [
        *_PROGRAM, "serve", str(path.absolute()), "--port", str(port),
        *(word for name, value in wishes.items() if value is not None for word in (name, str(value))),
        *(["--trust-remote-code"] if options.trust_remote_code else []),
        *(["--engine-log"] if options.show_engine_log else []),
        *(["--", *options.engine_options] if options.engine_options else []),
    ]  # fmt: skip
    return ChildServer(
        "cusprun serve",
        path,
        command,
        url=f"http://127.0.0.1:{port}",
        env={**os.environ, "PYTHONPATH": import_path(), KEY_VARIABLE: key},
        cwd=Path.cwd(),
        start_timeout_s=START_TIMEOUT_S + _FRONT_S,
        echo=show_output if options.show_engine_log else drop_output,
        waiting=Waiting(f"the server of {path.name}"),
    )


def _served(server: ChildServer, key: str) -> tuple[str, int | None]:
    """Return the name and the context of what a server serves."""
    (model,) = json.loads(server.get("/v1/models", key))["data"]
    return model["id"], model["max_model_len"]
