"""A child process that listens on a loopback port, waited for until it answers."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cusprun.errors import ModelError
from serve.child_process import ChildProcess

_POLL_S = 0.2
# `python -m` imports from its current folder first: other users may put modules into a temporary one.
_FOLDER = Path("/")
_STOP_S = 15.0
_GET_S = 30.0
_REASON_CHARACTERS = 600
_REASON_LINES = 3
_EXCEPTION = re.compile(r"\w*(?:Error|Exception): .+")

Echo = Callable[[bytes], None]
"""Gets what a child prints, piece by piece."""


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def import_path() -> str:
    """Return this interpreter's import path as ``PYTHONPATH`` for a child that runs in another folder.

    An empty or relative entry would mean the child's folder there.
    """
    return os.pathsep.join(map(os.path.abspath, sys.path))


class ChildServer:
    """The server ``name`` on the artifact ``path``, ended by ``close`` or with this process.

    It runs in ``/`` unless ``cwd`` says otherwise.

    ``noise`` are texts of lines that name an error but not its reason; ``waiting`` is called about once a
    second with the seconds that the start has taken.

    Raises:
        ModelError: the server ends or does not answer ``ready`` within ``start_timeout_s``; the text ends
            with the reason in its log.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        command: Sequence[str],
        *,
        url: str,
        env: Mapping[str, str],
        cwd: Path | None = None,
        ready: str = "/health",
        start_timeout_s: float = 600.0,
        noise: Sequence[str] = (),
        echo: Echo | None = None,
        waiting: Callable[[float], None] | None = None,
    ) -> None:
        self.url = url
        self._name = name
        self._path = path
        self._noise = tuple(noise)
        # No proxy of the environment may see loopback requests.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._process = ChildProcess(command, env=env, cwd=cwd or _FOLDER, patience_s=_STOP_S, echo=echo)
        try:
            self._wait(ready, start_timeout_s, waiting)
        except BaseException:
            self.close()
            raise

    def failure(self) -> str | None:
        """Return why the server has ended; None while it runs."""
        code = self._process.exit_code
        return None if code is None else f"{self._name} ended with exit code {code}; {self.last_words()}"

    def last_words(self) -> str:
        """Return the reason in the log: its last exceptions, lines that name an error, or its end."""
        lines = self._process.log_tail().splitlines()
        telling = [line for line in lines if not any(noise in line for noise in self._noise)]
        # Without what stands before it: time and process make the same exception another line.
        raised = dict.fromkeys(match[0] for line in telling if (match := _EXCEPTION.search(line)))
        named = [*raised] or [line for line in telling if "error" in line.lower()] or lines
        text = " / ".join(line.strip() for line in named[-_REASON_LINES:])
        return f"it says: {text[-_REASON_CHARACTERS:]}" if text else "it says nothing"

    def get(self, route: str, key: str) -> bytes:
        """Return the body of a GET with a key.

        Raises:
            ModelError: the server refuses, or does not answer any more.
        """
        wanted = urllib.request.Request(f"{self.url}{route}", headers={"Authorization": f"Bearer {key}"})
        try:
            with self.opener.open(wanted, timeout=_GET_S) as answer:
                body: bytes = answer.read()
        except OSError as error:
            raise ModelError(
                f"{self._path}: {self._name} does not answer {route} ({error}); {self.last_words()}"
            ) from None
        return body

    def pids(self) -> tuple[int, ...]:
        """Return the processes of the server and all that it started."""
        return tuple(process.pid for process in self._process.processes())

    def memory_bytes(self) -> int:
        """Return the memory of the server and all that it started, pages that several share counted once.

        The proportional set size where the system tells it (Linux), else the resident.
        """
        import psutil

        total = 0
        for process in self._process.processes():
            with suppress(psutil.Error):
                found = process.memory_full_info()
                total += getattr(found, "pss", 0) or found.rss
        return total

    def close(self) -> None:
        """End the server and every process that it started."""
        self._process.stop()

    def _wait(self, ready: str, timeout_s: float, waiting: Callable[[float], None] | None) -> None:
        started = time.monotonic()
        shown = 0.0
        while (passed := time.monotonic() - started) < timeout_s:
            if self._process.exit_code is not None:
                raise ModelError(
                    f"{self._path} cannot be served: {self._name} ended with exit code "
                    f"{self._process.exit_code}; {self.last_words()}"
                )
            if waiting is not None and passed - shown >= 1:
                shown = passed
                waiting(passed)
            try:
                with self.opener.open(f"{self.url}{ready}", timeout=5):
                    return
            except OSError:
                time.sleep(_POLL_S)
        raise ModelError(
            f"{self._path}: {self._name} did not answer within {timeout_s:.0f} s; {self.last_words()}; "
            "give it more time or memory"
        )
