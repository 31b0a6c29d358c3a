"""Starts a worker for each job and turns whatever becomes of it into a reply."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cusprun.codec import from_plain, to_plain
from cusprun.errors import CusprunError
from serve.bench.measurement import Fault, Job, Reply

Launch = Callable[[Job], Reply]
"""Runs one job in a process of its own; never raises for what the worker did."""

WORKER = (sys.executable, "-m", "serve.bench.worker")


def subprocess_launch(run_limit_s: float, command: Sequence[str] = WORKER) -> Launch:
    """Return the launcher that starts ``command`` for each job and stops it after ``run_limit_s``.

    The command's last argument is the current folder of this process; it starts in another one.
    """
    root = Path(__file__).resolve().parents[2]  # so that -m finds the package wherever it is installed

    def launch(job: Job) -> Reply:
        try:
            done = subprocess.run(
                [*command, str(Path.cwd())],  # what the environment names may be named from there
                input=json.dumps(to_plain(job)),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=run_limit_s,
                cwd=root,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _crash(f"the worker had not finished after {run_limit_s:g} seconds")
        except OSError as error:
            return _crash(f"the worker could not be started ({error.strerror})")
        if done.returncode:
            return _crash(_ending(done.returncode, done.stderr))
        try:
            reply: Reply = from_plain(Reply, json.loads(done.stdout))
        except (ValueError, CusprunError):
            return _crash(f"the worker answered {done.stdout[:80]!r} where a result was expected")
        return reply

    return launch


def _crash(reason: str) -> Reply:
    return Reply(fault=Fault("crash", reason))


def _ending(code: int, stderr: str) -> str:
    """Say how a worker ended, with the last line it printed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = f", saying {lines[-1][:300]!r}" if lines else ""
    if code >= 0:
        return f"the worker ended with exit code {code}{said}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (killed from outside, perhaps for want of memory)" if name == "SIGKILL" else ""
    return f"the worker was ended by {name}{hint}{said}"
