"""The memory of a tree of processes, against what its processes are known to hold."""

from __future__ import annotations

import subprocess
import sys

import psutil

from benchmarks.processes import anonymous_bytes, tree_bytes

HELD_BYTES = 48 << 20
_HOLD = f"held = bytearray({HELD_BYTES}); held[::4096] = b'x' * len(held[::4096]); print('ready', flush=True)"
# The parent hands its own stdin and stdout on, and ends with its child, which waits for the end of stdin.
_CHILD = f"import sys; {_HOLD}; sys.stdin.read()"
_PARENT = f"import subprocess, sys; {_HOLD}; subprocess.run([sys.executable, '-c', {_CHILD!r}])"


def test_all_that_a_process_started_counts() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        found = tree_bytes([psutil.Process(process.pid)])
        alone = anonymous_bytes(process.pid)
        assert process.stdin is not None
        process.stdin.close()
    # Both hold what they made; an interpreter takes some 10 MB beside it.
    assert HELD_BYTES < alone < 2 * HELD_BYTES
    assert 2 * HELD_BYTES < found["anonymous_bytes"] <= found["resident_bytes"]
    assert tree_bytes([]) == {"resident_bytes": 0, "anonymous_bytes": 0}
