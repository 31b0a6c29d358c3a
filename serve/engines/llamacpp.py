"""GGUF files on llama.cpp's own server, in a process of its own (``serve/engines/llamacpp_child.py``)."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from cusprun.errors import MissingDependencyError, ModelError, UserError, require_known
from serve.api.requests import Request
from serve.child_server import ChildServer, free_port, import_path
from serve.engines.llamacpp_child import VARIABLE
from serve.engines.llamacpp_limits import limits
from serve.engines.options import drop_output
from serve.engines.protocol import DEFAULT_PARALLEL, EngineSettings, Running
from serve.front.proxy import Proxy, Refusal, Upstream

_FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}
"""glibc gives each of the server's HTTP threads an arena, whose free memory no other thread uses.

Over 2,700 small requests of 32 clients its memory grew by 0.7 MB with the usual 16 arenas, by none with 2.
"""

DEFAULT_CONTEXT_TOKENS = 4096
"""Tokens of each slot's KV cache unless told otherwise; the model's own limit can be 131,072, in GB."""

_OURS = frozenset(
    {"model", "model_alias", "hostnames", "port", "api_keys", "n_ctx", "n_parallel", "public_path", "ui"}
)
"""Settings that ``cusprun serve`` makes itself."""

_NEEDED_MODULE = "serve.engines.llamacpp_child"


def require() -> None:
    """Raise ``MissingDependencyError`` when the xllamacpp wheel is not installed."""
    if find_spec("xllamacpp") is None:
        raise MissingDependencyError(
            "llama.cpp's server (xllamacpp) is not installed; run: pip install 'cusprun[serve]'"
        )


def start(settings: EngineSettings) -> Running:
    """Start llama.cpp's server on a GGUF file and return when it answers."""
    require()
    key = secrets.token_urlsafe(16)
    port = free_port()
    context = settings.context_tokens or DEFAULT_CONTEXT_TOKENS
    parallel = settings.parallel or DEFAULT_PARALLEL
    plain = {
        "path": str(settings.artifact.absolute()),
        "model": settings.model,
        "port": port,
        "key": key,
        "context_tokens": context,
        "parallel": parallel,
        "num_threads": settings.num_threads,
        "draft": str(settings.draft.absolute()) if settings.draft else None,
        "options": parse_options(settings.options),
    }
    server = ChildServer(
        "llama.cpp",
        settings.artifact,
        [sys.executable, "-m", _NEEDED_MODULE],
        url=f"http://127.0.0.1:{port}",
        # The key and the rest travel in the environment: command lines are read by every user of a machine.
        env={**_FEW_ARENAS, **os.environ, "PYTHONPATH": import_path(), VARIABLE: json.dumps(plain)},
        start_timeout_s=settings.start_timeout_s,
        echo=settings.echo or drop_output,
        waiting=settings.waiting,
    )
    upstream = Upstream(server.url, key, server.failure, refusals=(SEVERAL_STREAMS, *limits(context)))
    return Running("llama.cpp", Proxy(upstream), _context_of(server, key), server.close)


SEVERAL_STREAMS = Refusal(
    "prompt",
    lambda request: request.is_stream and _num_prompts(request) > 1,
    "llama.cpp streams the answer to one prompt at a time; send one prompt, or leave stream out",
)
"""llama.cpp sends an event ``null`` and mixes the usage of several prompts up when it streams them."""


def _num_prompts(request: Request) -> int:
    prompt = request.fields.get("prompt")
    return len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1


def _context_of(server: ChildServer, key: str) -> int:
    """Return the tokens that one slot really has."""
    try:
        return int(json.loads(server.get("/v1/models", key))["data"][0]["meta"]["n_ctx"])
    except (ModelError, ValueError, KeyError) as error:
        server.close()
        raise ModelError(f"llama.cpp does not say what it serves ({error}); update xllamacpp") from None


def parse_options(words: Sequence[str]) -> Mapping[str, Any]:
    """Return options written ``--name value`` or ``--name=value``: the settings of xllamacpp's CommonParams.

    A name may have dots (``--speculative.draft.n_max 4``) and hyphens for underscores. A truth value may be
    left out.

    Raises:
        UserError: a name is unknown or is one that cusprun sets itself, or a value is of another type.
    """
    import xllamacpp

    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"llama.cpp options are written --name value, not {word!r}")
        text, equals, value = word[2:].partition("=")
        name = text.replace("-", "_")
        holder = _holder_of(xllamacpp.CommonParams(), name)
        current = getattr(holder, name.rpartition(".")[2])
        if not equals and isinstance(current, bool) and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not equals:
            if not rest:
                raise UserError(f"the llama.cpp option --{text} needs a value")
            value = rest.pop(0)
        found[name] = _value(text, value, current)
    return found


def _holder_of(parameters: Any, name: str) -> Any:
    """Return the object of which ``name``, of dotted parts, is a setting."""
    *path, last = name.split(".")
    if (path or [last])[0] in _OURS:
        raise UserError(f"cusprun serve sets llama.cpp's {name} itself; see cusprun serve --help")
    for part in path:
        require_known(part, _names(parameters), "llama.cpp option", UserError)
        parameters = getattr(parameters, part)
    require_known(last, _names(parameters), "llama.cpp option", UserError)
    return parameters


def _names(parameters: Any) -> list[str]:
    return [name for name in dir(parameters) if not name.startswith("_")]


def _value(name: str, text: str, current: Any) -> Any:
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, int | float | str):
            return type(current)(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number"}.get(type(current), "a number")
        raise UserError(f"the llama.cpp option --{name} must be {kind}, not {text!r}") from None
    raise UserError(f"the llama.cpp option --{name} cannot be given on a command line")
