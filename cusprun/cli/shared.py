"""A command in a run of several processes: the first prints, and all end together, in bounded time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import typer

from cusprun.errors import UserError
from cusprun.walk.launch import Launch, launch_of
from cusprun.walk.ranks import ALONE, Ranks
from cusprun.walk.shared_run import SharedRun
from cusprun.walk.watch import Failure

SHARED_COMMANDS = ("score", "prune")
"""What several processes may run together."""

GRACE_S = 15.0
"""How long a computation may go on once the run has failed elsewhere; torchrun kills after 30 s."""


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``told_to_end`` says that a signal ended it."""

    exit_code: int
    text: str = ""
    told_to_end: bool = False


class SharedProcess:
    """This process and the others of its run, if a launcher started several.

    ``arguments`` are those of the command line; ``has_spoken`` says that processes which this one started
    have told how they ended.
    """

    def __init__(self, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> None:
        self.arguments = tuple(arguments)
        self.has_spoken = False
        self._environment = environment
        self._run: SharedRun | None = None
        self._finished = threading.Event()
        self._stderr = 2

    def silence(self, debug: bool) -> None:
        """Let only the first process speak; with ``debug`` the others still show their tracebacks."""
        launch = self._launch()
        if launch is None or launch.is_first:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        self._stderr = os.dup(2)
        for stream in (1,) if debug else (1, 2):
            os.dup2(nowhere, stream)

    @property
    def is_alone(self) -> bool:
        """Whether no launcher started several processes."""
        return self._launch() is None

    @property
    def size(self) -> int:
        """How many processes a launcher started; 1 where there was none."""
        launch = self._launch()
        return 1 if launch is None else launch.size

    def admit(self, command: str | None) -> None:
        """Refuse commands that are one process' work.

        Raises:
            UserError: the command is, or the launcher's variables contradict one another.
        """
        self._run = SharedRun(self._environment, self._end_soon)
        launch = self._run.launch
        if launch is not None and command is not None and command not in SHARED_COMMANDS:
            raise UserError(
                f"`cusprun {command}` is work for one process, and the launcher started {launch.size}; start "
                f"it without torchrun (several processes share {' and '.join(SHARED_COMMANDS)})"
            )

    def ranks(self) -> Ranks:
        """Return the ranks, once all processes have come."""
        return ALONE if self._run is None else self._run.ranks()

    def finish(self) -> None:
        """Wait for the good end of all processes; raises ``RankError`` when one has none."""
        if self._run is not None:
            self._run.finish()

    def end(self, ended: Ended) -> Ended:
        """Leave the run, and tell the others of a failure; return why it ended, which may be another's."""
        if self._run is None or self._run.launch is None:
            return ended
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, while this process is ending
        try:
            if ended.exit_code:
                cause = self._run.failed(ended.exit_code, ended.text, told_to_end=ended.told_to_end)
                ended = Ended(cause.exit_code, cause.text)
                if cause.is_silent and cause.rank == 0 and self._run.launch.rank == 1:
                    self._say(cause)  # the first cannot
            self._run.close()
        finally:
            self._finished.set()
        return ended

    def leave(self, exit_code: int) -> NoReturn:
        """End the process; one of several at once, whatever collectives still wait in other threads."""
        if self._run is None or self._run.launch is None:
            sys.exit(exit_code)
        with suppress(OSError):  # whoever read the output has seen enough
            sys.stdout.flush()
        os._exit(exit_code)

    def _say(self, failure: Failure) -> None:
        """Print a reason at once, whether or not this process is to be silent."""
        os.write(self._stderr, f"error: {failure.text}\n".encode())

    def _launch(self) -> Launch | None:
        try:
            return launch_of(self._environment)
        except UserError:
            return None

    def _end_soon(self, failure: Failure) -> None:
        """End the main thread by a signal, or the process when a computation does not let it."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        if not self._finished.wait(GRACE_S):
            launch = self._launch()
            if launch is None or launch.is_first:
                self._say(failure)
            os._exit(failure.exit_code)


def ranks_of(context: typer.Context) -> Ranks:
    """Return the ranks of the process that runs a command."""
    process = context.obj
    return process.ranks() if isinstance(process, SharedProcess) else ALONE
