"""What the serving benchmarks start: `cusprun serve` as its users do, on artifacts of one model."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import psutil
from measuring import Row
from processes import tree_bytes

from cusprun.pipeline.opening import OpenModel, open_model
from cusprun.resolve import locate
from exporters.registry import format_of
from serve.bench.statistics import median_interval
from serve.child_server import ChildServer, free_port
from serve.runtimes.vllm_process import find_python

NAME = "measured"
"""What the model is called in requests."""
SEED = 20_251
_ROOT = Path(__file__).parent.parent
_ENGINES = ("xllamacpp", "llama-cpp-python", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class Subject:
    """The model that is served: its checkpoint folder, the GGUF file it comes from, and exports of it."""

    opened: OpenModel
    gguf: Path
    scratch: Path

    @classmethod
    def of(cls, source: str, scratch: Path) -> Subject:
        """Find the model; ``source`` is one that comes as a GGUF file."""
        return cls(open_model(source), locate(source).path, scratch)

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return self.opened.index.folder

    @cached_property
    def onnx(self) -> Path:
        """The checkpoint as an ONNX folder in 4 bits, made when it is first asked for."""
        return export(self.folder, "onnx", "int4", self.scratch)


def export(folder: Path, to: str, quant: str, scratch: Path) -> Path:
    """Export a folder into ``scratch``, without importance matrix and proof."""
    chosen = format_of(to)
    scratch.mkdir(parents=True, exist_ok=True)
    out = scratch / f"{folder.name}-{quant}{chosen.suffix}"
    return chosen.export(folder, out, quant=quant)


@dataclass(frozen=True)
class Served:
    """A server that answers on a loopback port."""

    port: int
    processes: tuple[psutil.Process, ...]

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def memory(self) -> dict[str, int]:
        """Return the memory of the server and of all that it started."""
        return tree_bytes(self.processes)


@contextmanager
def serving(artifact: Path, *options: str) -> Iterator[Served]:
    """Run ``cusprun serve`` on an artifact for as long as the context lasts, with all cores."""
    command = [sys.executable, "-m", "cusprun", "serve", str(artifact), "--name", NAME]
    # What follows -- are the engine's own options.
    ours = ["--threads", str(num_threads()), "--port", "{port}"]
    with running("cusprun serve", artifact, [*command, *ours, *options], ready="/health") as served:
        yield served


@contextmanager
def running(name: str, artifact: Path, command: Sequence[str], *, ready: str) -> Iterator[Served]:
    """Run a server whose command says ``{port}`` where its port goes.

    Raises:
        ModelError: it ends or does not answer ``GET`` of the route ``ready``; the text has its own reason.
    """
    port = free_port()
    before = set(psutil.Process().children())
    server = ChildServer(
        name,
        artifact,
        [word.replace("{port}", str(port)) for word in command],
        url=f"http://127.0.0.1:{port}",
        env=os.environ,
        cwd=_ROOT,  # where .venv-vllm is
        ready=ready,
        start_timeout_s=900,
    )
    try:
        yield Served(port, tuple(set(psutil.Process().children()) - before))
    finally:
        server.close()


def num_threads() -> int:
    """Return how many cores this process may use; all servers are given so many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engine_versions() -> Row:
    """Return the versions of the engines that are installed beside cusprun."""
    found: Row = {}
    for name in _ENGINES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def vllm_version() -> Row:
    """Return the version of the vLLM that is served with, which has an environment of its own."""
    code = (
        "from importlib.metadata import packages_distributions as p, version as v;"
        "n = p()['vllm'][0]; print(n, v(n))"
    )
    done = subprocess.run([find_python(), "-c", code], capture_output=True, text=True, check=True, cwd=_ROOT)
    name, version = done.stdout.split()
    return {name: version}


def spread(values: Sequence[float]) -> Row:
    """Return the median of paired values with its 95 % interval, and the smallest and largest."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0], "values": [values[0]]}
    return {**asdict(median_interval(values, SEED)), "values": [round(value, 5) for value in values]}


def median(values: Sequence[float]) -> float:
    """Return the median, for numbers that are shown without a spread."""
    return round(statistics.median(values), 3)


def verdict(is_met: bool) -> str:
    """Say whether a target is met."""
    return "met" if is_met else "missed"
