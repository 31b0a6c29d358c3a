"""Memory of the running process and of those that it started, as the kernel counts it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from serve.bench.measurement import Memory

_PROC = Path("/proc")


def memory_of(pids: Sequence[int], model: Path, proc: Path = _PROC) -> Memory:
    """Return the memory of processes that map the file or folder ``model``, added up.

    The peak is VmHWM where there is one. ru_maxrss only stands in for it: Linux carries the parent's resident
    set over ``exec`` into ru_maxrss, so a small worker that was started from a process with a model in memory
    would report that process's size. Processes that have ended count nothing, since they hold nothing.
    """
    pids = _living(pids, proc)
    peaks = [_kilobyte_field(proc / str(pid) / "status", "VmHWM") for pid in pids]
    shares = [_kilobyte_field(proc / str(pid) / "smaps_rollup", "Pss") for pid in pids]
    resident = [_kilobyte_field(proc / str(pid) / "smaps_rollup", "Rss") for pid in pids]
    mapped = [_mapped_bytes(proc / str(pid) / "smaps", model) for pid in pids]
    return Memory(
        peak_bytes=_sum(peaks) or maxrss_bytes() + _resident_bytes(set(pids) - {os.getpid()}),
        rss_bytes=_sum(resident) or _resident_bytes(pids),
        pss_bytes=_sum(shares),
        mapped_file_bytes=_sum(mapped),
    )


def own_memory(model: Path = Path("/nonexistent"), others: Sequence[int] = ()) -> Memory:
    """Return the memory of this process and of ``others``."""
    return memory_of((os.getpid(), *others), model)


def maxrss_bytes() -> int:
    """Return the largest resident set of this process by ``getrusage``."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _living(pids: Sequence[int], proc: Path) -> Sequence[int]:
    """Return the processes that have memory, which zombies have not; all where there is no /proc to tell."""
    return [pid for pid in pids if _kilobyte_field(proc / str(pid) / "status", "VmHWM") is not None] or pids


def _sum(parts: Sequence[int | None]) -> int | None:
    """Return the sum, or None when a part is not known: half a sum would look like a small model."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _resident_bytes(pids: Iterable[int]) -> int:
    import psutil

    total = 0
    for pid in pids:
        with suppress(psutil.Error):  # it has ended meanwhile
            total += int(psutil.Process(pid).memory_info().rss)
    return total


def _kilobyte_field(path: Path, name: str) -> int | None:
    """Return a ``Name:   123 kB`` field in bytes, or None where the file or the field is absent."""
    text = _text(path)
    return None if text is None else parse_kilobyte_field(text, name)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def parse_kilobyte_field(text: str, name: str) -> int | None:
    """Find ``name`` in the text of a /proc file; kB there means 1024 bytes."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    return None


def _mapped_bytes(smaps: Path, model: Path) -> int | None:
    text = _text(smaps)
    return None if text is None else parse_mapped_bytes(text, model)


def parse_mapped_bytes(text: str, model: Path) -> int:
    """Add up the resident parts of the mappings of a file, or of the files in a folder, in an ``smaps``."""
    wanted, total, is_wanted = str(model.resolve()), 0, False
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if is_wanted and key == "Rss":
            total += int(value.split()[0]) * 1024
        fields = line.split(maxsplit=5)
        if "-" in fields[0] and not fields[0].endswith(":"):  # the line that opens a mapping
            path = fields[5].strip() if len(fields) == 6 else ""
            is_wanted = path == wanted or path.startswith(f"{wanted}/")
    return total
