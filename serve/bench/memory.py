"""Memory of the running process, as the kernel counts it."""

from __future__ import annotations

import sys
from pathlib import Path

from serve.bench.records import Memory

_STATUS = Path("/proc/self/status")
_SMAPS = Path("/proc/self/smaps_rollup")


def own_memory() -> Memory:
    """Read the peak and the proportional memory of this process, in bytes.

    The peak is VmHWM where there is one. ru_maxrss is kept beside it and only stands in for it: Linux
    carries the parent's resident set over ``exec`` into ru_maxrss, so a small worker that was started from
    a process with a model in memory would report that process's size.
    """
    maxrss = _maxrss_bytes()
    return Memory(
        peak_bytes=_kilobyte_field(_STATUS, "VmHWM") or maxrss,
        maxrss_bytes=maxrss,
        pss_bytes=_kilobyte_field(_SMAPS, "Pss"),
    )


def _maxrss_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _kilobyte_field(path: Path, name: str) -> int | None:
    """Return a ``Name:   123 kB`` field in bytes, or None where the file or the field is absent."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return parse_kilobyte_field(text, name)


def parse_kilobyte_field(text: str, name: str) -> int | None:
    """Find ``name`` in the text of a /proc file; kB there means 1024 bytes."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    return None
