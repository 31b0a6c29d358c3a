"""The machine that a benchmark ran on, and how busy others kept it meanwhile."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cusprun.codec import Indices
from serve.bench.records import Environment

_PACKAGES = (
    "cusprun", "llama-cpp-python", "numpy", "onnxruntime", "onnxruntime-genai", "torch", "transformers",
)  # fmt: skip
_CPU_FOLDER = Path("/sys/devices/system/cpu")
_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
_NVIDIA_FOLDER = Path("/proc/driver/nvidia/gpus")


def describe(num_threads: int, load_average: float | None) -> Environment:
    """Describe machine and libraries."""
    import psutil

    return Environment(
        cpu_model=_cpu_model(),
        physical_cores=physical_cores(),
        num_threads=num_threads,
        memory_bytes=int(psutil.virtual_memory().total),
        load_average=load_average,
        usable_cpus=_usable_cpus(),
        governor=_text(_CPU_FOLDER / "cpu0" / "cpufreq" / "scaling_governor"),
        gpus=gpu_models(),
        operating_system=platform.platform(terse=True),
        versions={"python": platform.python_version(), **_versions(_PACKAGES)},
    )


def gpu_models(folder: Path = _NVIDIA_FOLDER) -> tuple[str, ...]:
    """Return the models of NVIDIA GPUs as their driver lists them; none without that driver."""
    found = []
    for path in sorted(folder.glob("*/information")):
        for line in (_text(path) or "").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                found.append(value.strip())
    return tuple(found)


def _usable_cpus() -> str | None:
    """Return the numbers of the CPUs that this process may use, as ranges."""
    return Indices(os.sched_getaffinity(0)).to_text() if hasattr(os, "sched_getaffinity") else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def load_average() -> float | None:
    """Return the load average of the last minute, or None where the system keeps none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def physical_cores() -> int:
    """Return the number of physical cores that this process may use (affinity and quota heeded)."""
    import psutil

    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    siblings = []
    for cpu in sorted(os.sched_getaffinity(0)):
        path = _CPU_FOLDER / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            siblings.append(path.read_text(encoding="ascii").strip())
        except OSError:
            siblings.append(str(cpu))
    return count_cores(siblings, _quota())


def count_cores(sibling_lists: Iterable[str], quota: float | None) -> int:
    """Count distinct cores from the sibling list of each usable CPU, at most the quota rounded up."""
    cores = max(1, len(set(sibling_lists)))
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota() -> float | None:
    try:
        limit, period = _QUOTA_FILE.read_text(encoding="ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class CpuSeconds:
    """CPU seconds so far: ``busy`` of the whole machine, ``own`` of this process and its ended children."""

    busy: float
    own: float


def cpu_seconds() -> CpuSeconds:
    """Read the clocks that ``foreign_share`` compares."""
    import psutil

    machine = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    own = os.times()
    return CpuSeconds(
        busy=sum(getattr(machine, name, 0.0) for name in names),
        own=own.user + own.system + own.children_user + own.children_system,
    )


def foreign_share(start: CpuSeconds, end: CpuSeconds, elapsed_s: float, num_cpus: int) -> float:
    """Return the share of the machine's CPU time, 0 to 1, that went to other processes in between."""
    foreign = (end.busy - start.busy) - (end.own - start.own)
    return min(1.0, max(0.0, foreign / (elapsed_s * num_cpus)))
