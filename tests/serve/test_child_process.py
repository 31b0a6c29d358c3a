"""A child and its own children end with the process that started it, however that ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.child_process import ChildProcess

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 60  # a failing test ends; a passing one waits for events only

# A command, and a process that it starts, hold the writing end of a FIFO for as long as they live.
BUSY = 'exec 3> "$0"; {trap} sleep 1000 & echo ready >&3; {then}'
WAITS = BUSY.format(trap="", then="wait")
STUBBORN = BUSY.format(trap="trap '' TERM;", then="while :; do wait; done")
LEAVES = BUSY.format(trap="", then="echo bye; exit 7")
SHELL = ("/bin/sh", "-c")

PARENT = """
import signal, sys, threading
from serve.child_process import ChildProcess
# A run in the background inherits ignored signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
child = ChildProcess(sys.argv[1:])
threading.Event().wait()
"""


class Fifo:
    """The reading end of a FIFO; at its end no process holds the other one."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read(self) -> bytes:
        assert select.select([self.descriptor], [], [], LIMIT_S)[0], "a process still lives"
        return os.read(self.descriptor, 100)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    opened = Fifo(tmp_path / "alive")
    yield opened
    os.close(opened.descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_child_ends_with_a_parent_that_a_signal_ends(fifo: Fifo, number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *SHELL, WAITS, fifo.path], cwd=ROOT)
    try:
        assert fifo.read() == b"ready\n"
        parent.send_signal(number)
        assert fifo.read() == b""
    finally:
        parent.kill()
        parent.wait()


def test_child_that_ignores_sigterm_is_killed_when_its_parent_is(fifo: Fifo) -> None:
    body = PARENT.replace("argv[1:]", "argv[1:], patience_s=0.1")
    parent = subprocess.Popen([sys.executable, "-c", body, *SHELL, STUBBORN, fifo.path], cwd=ROOT)
    try:
        assert fifo.read() == b"ready\n"
    finally:
        parent.kill()
        parent.wait()
    assert fifo.read() == b""


@pytest.mark.parametrize("body", [WAITS, STUBBORN])
def test_stop_ends_the_whole_group(fifo: Fifo, body: str) -> None:
    child = ChildProcess([*SHELL, body, fifo.path], patience_s=0.1)
    assert fifo.read() == b"ready\n"
    assert child.exit_code is None
    child.stop()
    assert fifo.read() == b""
    assert child.exit_code == 128 + (signal.SIGTERM if body == WAITS else signal.SIGKILL)
    child.stop()


def test_what_a_command_leaves_running_is_ended(fifo: Fifo) -> None:
    with ChildProcess([*SHELL, LEAVES, fifo.path]) as child:
        assert fifo.read() == b"ready\n"
        assert fifo.read() == b""
    assert child.exit_code == 7
    assert child.log_tail() == "bye\n"


def test_child_outlives_the_thread_that_started_it(fifo: Fifo, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    command = [*SHELL, 'read word < "$1"; exec 3> "$0"; echo $word >&3', fifo.path, str(tmp_path / "go")]
    children: list[ChildProcess] = []
    thread = threading.Thread(target=lambda: children.append(ChildProcess(command)))
    thread.start()
    thread.join()
    (tmp_path / "go").write_text("lives\n")
    assert fifo.read() == b"lives\n"
    children[0].stop()


def test_log_has_both_streams_and_its_tail_moves_nothing() -> None:
    with ChildProcess([*SHELL, "echo one; echo zwei €; read none || echo three >&2"]) as child:
        child._guard.wait(LIMIT_S)
        assert child.log_tail() == "one\nzwei €\nthree\n"
        assert child.log_tail(6) == "three\n"


def test_environment_and_folder_are_those_given(tmp_path: Path) -> None:
    with ChildProcess([*SHELL, "pwd; echo $WORD"], env={"WORD": "here"}, cwd=tmp_path) as child:
        child._guard.wait(LIMIT_S)
        assert child.log_tail() == f"{tmp_path}\nhere\n"


def test_command_that_does_not_exist() -> None:
    with ChildProcess(["/no/such/program"]) as child:
        child._guard.wait(LIMIT_S)
    assert child.exit_code == 127
    assert child.log_tail() == "/no/such/program cannot be started: No such file or directory\n"
