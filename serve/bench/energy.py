"""Energy as the machine counts it: RAPL of processors, NVML of NVIDIA GPUs. Absent, never zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """A counter of microjoules that starts over behind ``limit`` (0: never does)."""

    read: Callable[[], int | None]
    limit: int = 0


class EnergyMeter:
    """Adds up counters from one reading to the next; ``read`` is None as soon as one cannot be read."""

    def __init__(self, counters: tuple[Counter, ...]) -> None:
        self._counters = counters
        self._last: list[int | None] = [counter.read() for counter in counters]
        self._total = 0

    def read(self) -> float | None:
        """Return the joules since the meter was made, of the whole package and GPU; None if uncounted."""
        if not self._counters or None in self._last:
            return None
        found = [counter.read() for counter in self._counters]
        for counter, before, now in zip(self._counters, self._last, found, strict=True):
            if now is None or before is None or (now < before and not counter.limit):
                self._last = [None]  # unreadable, or set back by its driver: what went meanwhile is lost
                return None
            self._total += now - before if now >= before else now - before + counter.limit
        self._last = found
        return self._total / 1e6


def machine_meter(folder: Path = _POWERCAP) -> EnergyMeter:
    """Return a meter of all processor packages and GPUs that this user may read."""
    return EnergyMeter((*_packages(folder), *_gpus()))


def _packages(folder: Path) -> tuple[Counter, ...]:
    """Return a counter for each package; its cores and caches, which have zones of their own, are in it.

    A zone of the same rank may count the whole platform (``psys``), the packages once more among it.
    """
    found = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        if zone.name.count(":") != 1 or not _name(zone).startswith("package"):
            continue
        counter = zone / "energy_uj"
        if _number(counter) is not None:
            limit = _number(zone / "max_energy_range_uj") or 0
            found.append(Counter(partial(_number, counter), limit))
    return tuple(found)


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _gpus() -> tuple[Counter, ...]:
    """Return a counter for each NVIDIA GPU that counts, where ``nvidia-ml-py`` is installed and finds one."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # no library, no driver, or no GPU: nothing to count
        return ()
    counters = (Counter(partial(_gpu_microjoules, nvml, handle)) for handle in handles)
    return tuple(counter for counter in counters if counter.read() is not None)  # old ones count nothing


def _gpu_microjoules(nvml: Any, handle: Any) -> int | None:
    try:
        return 1000 * int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except nvml.NVMLError:
        return None
