"""Memory that is free, handed back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc).

    Caches of texts of different lengths leave holes: after 180 prompts of 5 to 290 tokens, eight at a time, a
    server of a model of 100 MB held 382 MB, and 201 MB after this.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
