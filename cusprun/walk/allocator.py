"""The C library's allocator, told to keep nothing that was freed."""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD = -3
"""glibc's ``M_MMAP_THRESHOLD`` (mallopt(3))."""

_BYTES = 1 << 20


def give_back_when_freed() -> None:
    """Let every tensor of 1 MB or more have pages of its own, which go back to the system with it.

    For the rest of the process. By itself glibc raises that threshold up to 32 MB as it sees large blocks
    freed, and then keeps holes between them: half as much again as was ever in use at one time. Does nothing
    where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _BYTES)
