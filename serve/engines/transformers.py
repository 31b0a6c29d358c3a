"""Model folders on ``transformers serve``, where vLLM is not at hand; the front mends what it lacks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cusprun.errors import MissingDependencyError, UserError
from serve.api.requests import COMPLETIONS, Request
from serve.child_server import ChildServer, free_port, import_path
from serve.engines.options import drop_output, refuse_reserved
from serve.engines.protocol import EngineSettings, Running
from serve.engines.transformers_mender import PromptCounter, TransformersMender, prompt_of, sampling_of
from serve.front.proxy import Proxy, Refusal, Upstream

_NEEDED = ("transformers", "fastapi", "uvicorn", "openai", "accelerate")
_OURS = (
    "--host", "--port", "--trust-remote-code", "--enable-cors", "--continuous-batching", "--model-timeout",
)  # fmt: skip
"""Options that ``cusprun serve`` makes itself, would go round its front, or break its contract.

With continuous batching transformers 5.24 uses one request's sampling parameters for all.
"""


def require() -> None:
    """Raise ``MissingDependencyError`` when a library of ``transformers serve`` is not installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"transformers serve needs {', '.join(missing)}; run: pip install 'cusprun[serve]'"
        )


def start(settings: EngineSettings) -> Running:
    """Start ``transformers serve`` on a folder and return when the model is loaded."""
    require()
    if settings.parallel not in (None, 1):
        raise UserError("transformers serve answers one request at a time; leave --parallel out, or use vLLM")
    refuse_reserved(settings.options, _OURS, "transformers serve")
    folder = settings.artifact.absolute()
    counter = PromptCounter(folder)
    counter.load()
    sampling = sampling_of(folder)
    limit = _context_of(folder)
    context = min(settings.context_tokens or limit, limit)
    port = free_port()
    command = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder),
        "--host", "127.0.0.1", "--port", str(port),
        *(["--trust-remote-code"] if settings.trust_remote_code else []),
        *settings.options,
    ]  # fmt: skip
    server = ChildServer(
        "transformers serve",
        settings.artifact,
        command,
        url=f"http://127.0.0.1:{port}",
        env=_environment(settings.num_threads),
        start_timeout_s=settings.start_timeout_s,
        echo=settings.echo or drop_output,
        waiting=settings.waiting,
    )

    def mender(request: Request) -> TransformersMender:
        return TransformersMender(request, str(folder), counter, context, sampling)

    upstream = Upstream(server.url, "", server.failure, REFUSALS, mender, has_metrics=False)
    return Running("transformers serve", Proxy(upstream), context, server.close)


def _given(param: str, neutral: tuple[Any, ...] = ()) -> Refusal:
    return Refusal(
        param,
        lambda request: param in request.fields and request.fields[param] not in neutral,
        f"transformers serve does not know {param}; leave it out, or serve the folder with vLLM",
    )


REFUSALS = (
    _given("n", (1,)),
    _given("best_of", (1,)),
    _given("echo", (False,)),
    _given("logprobs", (False, 0)),
    _given("top_logprobs", (0,)),
    _given("presence_penalty", (0,)),
    _given("frequency_penalty", (0,)),
    _given("response_format", ({"type": "text"},)),
    _given("tool_choice", ("auto", "none")),
    _given("parallel_tool_calls"),
    _given("logit_bias", ({},)),
    _given("generation_config"),
    Refusal(
        "prompt",
        lambda request: request.route == COMPLETIONS and prompt_of(request) is None,
        "transformers serve takes one text as the prompt; send one, or serve the folder with vLLM",
    ),
)
"""What transformers 5.24 ignores silently, answers with 500 or means otherwise.

It takes a frequency penalty for a repetition penalty.
"""


def _environment(num_threads: int | None) -> Mapping[str, str]:
    threads = {"OMP_NUM_THREADS": str(num_threads)} if num_threads else {}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": import_path(), **offline, **threads}


def _context_of(folder: Path) -> int:
    try:
        return int(
            json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} has no config.json with max_position_embeddings; give a model folder"
        ) from None
