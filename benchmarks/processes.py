"""What processes take, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil


def anonymous_bytes(pid: int) -> int:
    """Return the memory of a process that no file holds; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def tree_bytes(roots: Sequence[psutil.Process]) -> dict[str, int]:
    """Return the memory of processes with all that they started: resident, and the part that no file holds.

    A page that several of them share counts in each.
    """
    resident = anonymous = 0
    for root in roots:
        for process in (root, *root.children(recursive=True)):
            try:
                resident += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            anonymous += anonymous_bytes(process.pid)
    return {"resident_bytes": resident, "anonymous_bytes": anonymous}
