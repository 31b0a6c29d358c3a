"""``--processes N``: this command again in several processes of this machine, which share its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer

from cusprun.cli.shared import SharedProcess
from cusprun.errors import UserError

MOST = 256
_LOOPBACK = "127.0.0.1"
_THREADS = "OMP_NUM_THREADS"
_GRACE_S = 30.0
"""How long the others may take to end when one has failed, as with torchrun."""
_PAUSE_S = 0.05


def share_work(context: typer.Context, processes: int) -> None:
    """Do this command in so many processes and end with the first one's exit code; return where it is one.

    A process that a launcher, this one or another, has started does its own part.

    Raises:
        UserError: the number cannot be, or is not the launcher's.
    """
    own = context.obj
    if not 1 <= processes <= MOST:
        raise UserError(f"--processes must be 1 to {MOST}, not {processes}")
    if not isinstance(own, SharedProcess):
        return
    if not own.is_alone:
        if processes not in (1, own.size):
            raise UserError(
                f"the launcher started {own.size} processes and --processes says {processes}; leave it "
                "out, or start the command without torchrun"
            )
        return
    if processes > 1:
        code, own.has_spoken = _run([sys.executable, "-m", "cusprun", *own.arguments], processes)
        raise typer.Exit(code)


def _run(command: Sequence[str], processes: int) -> tuple[int, bool]:
    """Run a command in so many processes; return the exit code, and whether the first could say why.

    The code is the first's, which speaks for all.
    """
    import torch.distributed

    dist: Any = torch.distributed
    if not dist.is_available():
        raise UserError("this build of torch cannot join processes; install another build, or start one")
    # Held here, so that a process that fails before all have met can still tell the others.
    store = dist.TCPStore(_LOOPBACK, 0, is_master=True, wait_for_workers=False)
    with _passed_on() as children:
        for rank in range(processes):
            children.start(command, environment_of(os.environ, rank, processes, store.port, _num_cores()))
        codes = _codes_of(children.started)
    first = codes[0] or next((code for code in codes if code), 0)
    if first and children.told:  # in the midst of loading libraries a signal ends a process in several ways
        return 128 + children.told[0], codes[0] > 0
    return first if first >= 0 else 128 - first, codes[0] > 0


def _codes_of(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; where one fails, tell the others to end, and end those that do not."""
    while any(child.poll() is None for child in children):
        if any(child.poll() for child in children):
            for child in children:
                child.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + _GRACE_S
            for child in children:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
            break
        time.sleep(_PAUSE_S)
    for child in children:
        child.kill()
    return [child.wait() for child in children]


def environment_of(
    environment: Mapping[str, str], rank: int, processes: int, port: int, num_cores: int
) -> dict[str, str]:
    """Return what a process of several finds in its environment: its place, and its share of the cores."""
    own = str(max(1, num_cores // processes))
    return {
        _THREADS: own,
        **environment,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _num_cores() -> int:
    """Return the physical cores that this process may use, as torch counts them."""
    import psutil

    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(may_use, psutil.cpu_count(logical=False) or may_use)


class _Children:
    """Processes that hear each signal that this one is told, whether it comes before or after their start.

    ``started`` are those processes, ``told`` the signals' numbers.
    """

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []
        self.told: list[int] = []

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start one more."""
        # A session of its own: what the terminal sends comes once, from here.
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        self.started.append(child)
        for number in self.told:
            child.send_signal(number)

    def tell(self, number: int, _frame: Any = None) -> None:
        """Pass a signal on; made to be a signal's handler."""
        self.told.append(number)
        for child in self.started:
            child.send_signal(number)


@contextmanager
def _passed_on() -> Iterator[_Children]:
    """Yield children, to be started, told of SIGINT and SIGTERM; none outlives the block."""
    children = _Children()
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    # What whoever started this one had it ignore, as shells do for work in the background, stays ignored.
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, children.tell) for number in heard}
    try:
        yield children
    finally:
        for child in children.started:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
