"""A server or other long-running program as a child that never outlives this process."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_GUARD = Path(__file__).with_name("child_guard.py")
_GUARD_GRACE_S = 10.0  # beyond the patience with the command, for a guard on a busy machine
_TAIL_BYTES = 1 << 18


class ChildProcess:
    """A command in a session of its own: ended by ``stop``, and with this process however that ends.

    The command and everything it started in its process group is sent SIGTERM, and SIGKILL once it has ended
    or after ``patience_s``: by ``stop``, at exit, and where this process is killed (a guard process watches a
    pipe; see ``serve/child_guard.py``; a fork of this process that lives on keeps the pipe open). The command
    reads nothing from stdin; its stdout and stderr go to a log without a name, so no file is left either.
    With ``echo``, for a child that runs for months, they are handed to it instead, from a thread of its own,
    and the last 256 KiB are kept in memory. A command that cannot be started ends with exit code 127 and the
    reason in its log.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        patience_s: float = 15.0,
        echo: Callable[[bytes], None] | None = None,
    ) -> None:
        self._patience_s = patience_s
        self._log = None if echo else tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
        self._tail = bytearray()
        self._guard = subprocess.Popen(
            # -I and -S: the child's PYTHON* variables and site packages are none of the guard's.
            [sys.executable, "-I", "-S", str(_GUARD), str(patience_s), *command],
            stdin=subprocess.PIPE,
            stdout=self._log or subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
            cwd=cwd,
        )
        atexit.register(self.stop)
        if echo is not None:
            self._reader = threading.Thread(target=self._read, args=(echo,), daemon=True)
            self._reader.start()

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def exit_code(self) -> int | None:
        """The exit code (128 + the signal's number after a signal), None while the command runs."""
        return self._guard.poll()

    def processes(self) -> list[psutil.Process]:
        """Return the command's process and all that it started; the guard is not among them."""
        import psutil

        try:
            return psutil.Process(self._guard.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def log_tail(self, max_bytes: int = _TAIL_BYTES) -> str:
        """Return the end of what the command has written to stdout and stderr."""
        if self._log is None:
            if self.exit_code is not None:
                self._reader.join(_GUARD_GRACE_S)
            return bytes(self._tail[-max_bytes:]).decode("utf-8", "replace")
        # The child writes at the offset of the same open file: pread leaves it alone.
        descriptor = self._log.fileno()
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, max_bytes, max(0, size - max_bytes)).decode("utf-8", "replace")

    def stop(self) -> None:
        """End the command and everything in its group, and wait until it has ended; may be called again."""
        atexit.unregister(self.stop)
        if self._guard.stdin is not None:
            with suppress(BrokenPipeError):
                self._guard.stdin.close()
        try:
            self._guard.wait(self._patience_s + _GUARD_GRACE_S)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()

    def _read(self, echo: Callable[[bytes], None]) -> None:
        assert self._guard.stdout is not None
        while piece := os.read(self._guard.stdout.fileno(), 65536):
            self._tail += piece
            del self._tail[:-_TAIL_BYTES]
            # Where nobody hears what the command says, it is read all the same: a full pipe would stop it.
            with suppress(Exception):
                echo(piece)
