"""Memory of a child process that no file stands behind, as the kernel counts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Peak:
    """``before`` is what the child had when it said that it is ready, ``highest`` the most after that."""

    before: int
    highest: int
    said: list[dict[str, object]]

    @property
    def grown(self) -> int:
        """Bytes above the start."""
        return self.highest - self.before


def anonymous_bytes(pid: int | str) -> int:
    """Return ``RssAnon`` of a process, 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


def peak_of(source: str, *arguments: str) -> Peak:
    """Run a script that prints ``ready`` before its work, and lines of JSON after it; watch its memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        if child.stdout.readline() != "ready\n":
            raise AssertionError(child.stderr.read())
        before = highest = anonymous_bytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while child.poll() is None:
            highest = max(highest, anonymous_bytes(child.pid))
            time.sleep(POLL_SECONDS)
        assert child.returncode == 0, child.stderr.read()
        return Peak(before, highest, [json.loads(line) for line in child.stdout])
