"""The program between a process and its child: it ends the child's group as soon as its own stdin ends.

Run as ``python -I -S child_guard.py PATIENCE_S COMMAND...``. The kernel closes the writing end of stdin when
the process that holds it ends in whatever way, so the child outlives neither its SIGTERM nor its SIGKILL. A
parent-death signal would not do: it reaches one process of the group only, and it is sent when the *thread*
that started the child ends.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

_STDIN = 0
_SIGNALLED = 128  # what shells add to the number of the signal that ended a command
_NO_COMMAND = 127
_HAS_GROUPS = hasattr(os, "killpg")
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def _signal_group(child: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal a group of zombies
        if _HAS_GROUPS:
            os.killpg(child.pid, number)
        else:  # Windows, where ending is the only signal
            child.kill()


def _end(child: "subprocess.Popen[bytes]", patience_s: float) -> None:
    """Ask the group to end; end what is left after ``patience_s``."""
    _signal_group(child, signal.SIGTERM)
    timer = threading.Timer(patience_s, _signal_group, (child, _KILL))
    timer.daemon = True
    timer.start()


def _end_with_stdin(child: "subprocess.Popen[bytes]", patience_s: float) -> None:
    while os.read(_STDIN, 1):
        pass
    _end(child, patience_s)


def main(arguments: list[str]) -> int:
    """Run the command in a session of its own until it ends or stdin does; return its exit code."""
    patience_s, command = float(arguments[0]), arguments[1:]
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)  # noqa: T201
        return _NO_COMMAND
    for number in _ENDING:
        signal.signal(number, lambda *_: _end(child, patience_s))
    threading.Thread(target=_end_with_stdin, args=(child, patience_s), daemon=True).start()
    code = child.wait()
    _signal_group(child, _KILL)  # what the command started and did not end
    return code if code >= 0 else _SIGNALLED - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
