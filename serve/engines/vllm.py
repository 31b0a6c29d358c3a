"""Model folders on unmodified vLLM, in the environment that has it."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from cusprun.errors import UserError
from serve.api.errors import ApiError
from serve.api.requests import Request
from serve.child_server import ChildServer, free_port
from serve.engines.options import drop_output, refuse_reserved
from serve.engines.protocol import EngineSettings, Running
from serve.front.proxy import Proxy, Refusal, Upstream
from serve.front.stop_mender import StopMender
from serve.runtimes.vllm_process import NOISE, SERVER_MODULE, environment, find_python

_OURS = (
    "--model", "--served-model-name", "--host", "--port", "--api-key", "--uds", "--trust-remote-code",
    "--max-model-len", "--max-num-seqs", "--ssl-keyfile", "--ssl-certfile", "--root-path",
    "--allowed-origins", "--config",
)  # fmt: skip
"""Options that ``cusprun serve`` makes itself, or that would go round its front."""

_DRAFT_TOKENS = 4


def require() -> None:
    """Raise ``MissingDependencyError`` with the command that adds vLLM when no interpreter has it."""
    find_python()


def start(settings: EngineSettings) -> Running:
    """Start vLLM's server on a folder and return when it answers."""
    python = find_python()
    config = _config(settings.artifact)
    refuse_reserved(settings.options, _OURS, "vLLM")
    key = secrets.token_urlsafe(16)
    port = free_port()
    context = settings.context_tokens or config.get("max_position_embeddings")
    command = [
        str(python), *SERVER_MODULE, "--model", str(settings.artifact.absolute()),
        "--served-model-name", settings.model, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", str(config.get("dtype") or config.get("torch_dtype") or "auto"),
        "--disable-uvicorn-access-log",
    ]  # fmt: skip
    command += ["--max-model-len", str(context)] if context else []
    command += ["--max-num-seqs", str(settings.parallel)] if settings.parallel else []
    command += ["--trust-remote-code"] if settings.trust_remote_code else []
    command += _draft(settings.draft) if settings.draft else []
    server = ChildServer(
        "vLLM",
        settings.artifact,
        [*command, *settings.options],
        url=f"http://127.0.0.1:{port}",
        env=environment(key, settings.num_threads),
        start_timeout_s=settings.start_timeout_s,
        noise=NOISE,
        echo=settings.echo or drop_output,
        waiting=settings.waiting,
    )
    refusals = _WITH_A_DRAFT if settings.draft else ()
    upstream = Upstream(server.url, key, server.failure, refusals, _mender)
    return Running("vLLM", Proxy(upstream), context, server.close)


_WITH_A_DRAFT = tuple(
    Refusal(
        param,
        lambda request, param=param: bool(request.fields.get(param)),  # type: ignore[misc]
        f"vLLM ignores {param} when a draft model is used; leave it out, or serve without --draft",
    )
    for param in ("min_p", "logit_bias")
)


def _mender(request: Request) -> StopMender | None:
    """vLLM 0.32 looks for stops in the order of the list: where a token completes two, the text before the
    one it finds first can hold the other. Logprobs come with the events of the tokens, of which the mender
    leaves some out."""
    if len(request.stops) < 2:
        return None
    if request.is_stream and request.fields.get("logprobs") not in (None, False):
        raise ApiError(400, "a stream with logprobs takes one stop text at most", param="logprobs")
    return StopMender(request)


def _draft(draft: Path) -> list[str]:
    settings = {
        "method": "draft_model",
        "model": str(draft.absolute()),
        "num_speculative_tokens": _DRAFT_TOKENS,
    }
    return ["--speculative-config", json.dumps(settings)]


def _config(folder: Path) -> dict[str, Any]:
    try:
        plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        plain = None
    if not isinstance(plain, dict):
        raise UserError(f"{folder} has no readable config.json; give a folder that was exported for vLLM")
    return plain
