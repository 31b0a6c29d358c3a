"""What a walk may use beside its device: a folder, an amount of memory, other processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cusprun.walk.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Workspace:
    """Where spilled streams lie and unfinished work is kept, and what may be taken.

    ``folder`` is the system's temporary folder when not given. ``memory_bytes`` bounds the memory that no
    file stands behind (the kernel's ``RssAnon``); None takes what is fastest.
    """

    folder: Path | None = None
    memory_bytes: int | None = None
    ranks: Ranks = ALONE


DEFAULT_WORKSPACE = Workspace()
