"""The memory of a server: from a benchmark's peak where there is one, else from the artifact's headers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.errors import ConfigError, ModelError, UserError
from cusprun.pipeline.bench_work import work_of

if TYPE_CHECKING:
    from deploy.facts import Sizing
    from serve.bench.records import BenchReport, Suite

_MIB = 2**20
_PEAK = "peak_memory_bytes"

FRONT_BYTES = 80 * _MIB
"""What ``cusprun serve`` holds itself, once it has answered: 68 MiB, and 10 of the guard of its engine."""

ENGINE_BYTES: Mapping[str, int] = {"llamacpp": 40 * _MIB, "onnx": 30 * _MIB, "vllm": 2500 * _MIB}
"""What an engine holds beside model and cache, measured as the resident memory of its processes with models
of 2 MB (xllamacpp 2026.10, onnxruntime-genai 0.18), and a small one in vLLM 0.32 (3.5 GB, 1 of them cache).
"""

COPIES: Mapping[str, int] = {"llamacpp": 1, "onnx": 3, "vllm": 1}
"""How often weights are in memory at most: onnxruntime has the file, its tensors, and these laid out anew for
its kernels, while it starts (2.6 times the file, measured with 140 MB; embeddings are not laid out anew)."""

_BATCH_TOKENS = 512  # llama.cpp works on so many tokens of a prompt at once
_F32_BYTES = 4


@dataclass(frozen=True)
class Request:
    """What is asked of the size: the memory that may be used, and what is held in it.

    ``beside_bytes`` is what counts as the server's memory besides its own, where it is put.
    """

    memory_bytes: int | None = None
    context_tokens: int | None = None
    parallel: int | None = None
    results: Path | None = None
    beside_bytes: int = 0


def size(artifact: Path, engine: str, context_limit: int, request: Request) -> Sizing:
    """Return what a server of ``artifact`` needs.

    Raises:
        ModelError: the artifact's headers do not tell its sizes.
        UserError: the memory is too little, a number cannot be, or the results do not measure the artifact.
    """
    from deploy.sizing import plan

    work = work_of(engine, artifact)
    if work is None:
        raise ModelError(f"{artifact} does not tell the size of its cache; export the model again")
    weights = artifact.stat().st_size if artifact.is_file() else _folder_bytes(artifact)
    cache = work.cache_bytes_per_position
    measured = None if request.results is None else _measured(request.results, engine, artifact)
    buffers = _Buffers() if engine != "llamacpp" else _llamacpp_buffers(artifact)
    if measured is None:
        overhead = FRONT_BYTES + ENGINE_BYTES[engine] + weights * (COPIES[engine] - 1) + buffers.fixed_bytes
    else:
        held = weights + cache * (measured.context_tokens or 0)
        overhead = FRONT_BYTES + max(0, measured.peak_bytes - held)
    return plan(
        weights,
        cache,
        overhead + request.beside_bytes,
        context_limit,
        budget_bytes=request.memory_bytes,
        context_tokens=request.context_tokens,
        parallel=request.parallel,
        num_threads=measured.num_threads if measured else None,
        buffer_bytes_per_token=buffers.bytes_per_token,
        source="measured" if measured else "planned",
        measured_in=measured.library if measured else None,
    )


@dataclass(frozen=True)
class _Buffers:
    """Work buffers of an engine: a fixed part, and what each token of the context adds."""

    fixed_bytes: int = 0
    bytes_per_token: int = 0


def _llamacpp_buffers(path: Path) -> _Buffers:
    """Return llama.cpp's for one batch of a prompt: the stream, its norm, its sums and the output of a block,
    gate and up of the FFN; of the attention the mask, since its scores are never stored."""
    from cusprun.checkpoint.gguf_header import read_gguf

    file = read_gguf(path)
    prefix = file.text("general.architecture")
    hidden, ffn = (file.integer(f"{prefix}.{name}") for name in ("embedding_length", "feed_forward_length"))
    row_bytes = _BATCH_TOKENS * _F32_BYTES
    return _Buffers(row_bytes * (4 * hidden + 2 * ffn), row_bytes)


_WEIGHT_FILES = ("*.safetensors", "*.onnx", "*.onnx.data", "*.onnx_data")


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in _WEIGHT_FILES for file in folder.glob(pattern))


@dataclass(frozen=True)
class _Measured:
    peak_bytes: int
    context_tokens: int | None
    num_threads: int
    library: str


def _measured(results: Path, engine: str, artifact: Path) -> _Measured:
    """Return what a benchmark measured of an artifact; raises ``UserError`` when it measured others."""
    report = read_report(results)
    suites = [suite for suite in report.suites if suite.runtime == engine and suite.failure is None]
    for suite in suites:
        peak = _peak_of(suite, artifact.name)
        if peak is not None:
            library = " ".join(suite.library.split())
            return _Measured(peak, suite.context_length, report.environment.num_threads, library)
    found = sorted({side.file_name for suite in suites for side in (suite.after, suite.before)})
    raise UserError(
        f"{results} has no peak memory of {artifact.name} in {engine}, but of: {', '.join(found) or 'none'}; "
        "measure it with cusprun bench, or leave out --results"
    )


def _peak_of(suite: Suite, name: str) -> int | None:
    try:
        comparison = suite.comparison(_PEAK)
    except KeyError:
        return None
    for artifact, interval in ((suite.after, comparison.after), (suite.before, comparison.before)):
        if artifact.file_name == name:
            return round(interval.median)
    return None


def read_report(path: Path) -> BenchReport:
    """Read what ``cusprun bench --json`` wrote, or the benchmark in a recipe's ``results.json``.

    Raises:
        ConfigError: the file is missing or holds no benchmark.
    """
    from cusprun.codec import from_plain, load_json
    from serve.bench.records import BenchReport

    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        part = plain["bench"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return load_json(BenchReport, path)
    if part is None:
        raise ConfigError(str(path), ["it holds no benchmark; measure with cusprun bench"])
    try:
        report: BenchReport = from_plain(BenchReport, part)
    except UserError as error:
        raise ConfigError(str(path), [str(error)]) from None
    return report
