"""Two models against each other in one or several runtimes; what a runtime needs is exported first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import cached
from cusprun.codec import key_of
from cusprun.errors import ExportError, UserError, require_known
from cusprun.pipeline.bench_work import work_of
from cusprun.pipeline.proof import RUNTIMES
from cusprun.progress import SILENT, Progress
from cusprun.resolve import StrPath, locate, resolve
from cusprun.version import __version__

if TYPE_CHECKING:
    from exporters.registry import Format
    from serve.bench.orchestrate import Target
    from serve.bench.records import BenchOptions, BenchReport

DEFAULT_RUNTIMES = ("llamacpp",)
_VLLM_QUANTISED = ("fp8", "int8", "int4")


@dataclass(frozen=True)
class Wanted:
    """What a runtime of the benchmark runs: an export format, None for a folder as it is, in a precision."""

    format: str | None
    quant: str | None = None


WANTED: Mapping[str, Wanted] = {
    "llamacpp": Wanted("gguf", "q8_0"),
    "onnx": Wanted("onnx", "int4"),
    "vllm": Wanted("vllm", "bfloat16"),
    "torch": Wanted(None),
}
"""By runtime; the precisions are what people run, where none is asked for."""

RUNTIME_OF = {wanted.format: runtime for runtime, wanted in WANTED.items() if wanted.format}
"""The runtime that measures each export format."""


def bench(
    before: StrPath,
    after: StrPath,
    *,
    runtimes: Sequence[str] = DEFAULT_RUNTIMES,
    quants: Mapping[str, str] | None = None,
    options: BenchOptions | None = None,
    progress: Progress = SILENT,
) -> BenchReport:
    """Measure two models against each other: load time, latency, speed, memory and energy.

    ``runtimes`` are of ``llamacpp``, ``onnx``, ``vllm`` and ``torch``. An artifact of a runtime's format is
    measured as it is; anything else is exported first, once, into the cache, in the precision that ``quants``
    names for its format. A runtime that fails leaves a suite that says why, unless it is the only one.

    Raises:
        UserError: a runtime or format is unknown, or none is named.
        ConfigError: an option cannot be.
        ExportError: a precision is unknown, or a model cannot be exported.
        ModelError: a model is missing or damaged.
        MissingDependencyError: a runtime is not installed.
        MeasurementError: nothing could be measured.
    """
    from serve.bench.orchestrate import bench as run

    chosen = _chosen(runtimes, quants or {})
    if options is not None:
        options.check()
    targets = [_target(runtime, wanted, before, after, progress) for runtime, wanted in chosen.items()]
    return run(targets, options, progress)


def parse_quants(texts: Iterable[str]) -> dict[str, str]:
    """Return precisions by format from texts like ``onnx:int4``; one without a format is that of gguf."""
    found: dict[str, str] = {}
    for text in texts:
        name, colon, quant = text.rpartition(":")
        key = name if colon else "gguf"
        if key in found:
            raise UserError(f"the precision of {key} is given twice, {found[key]} and {quant}; give one")
        found[key] = quant
    return found


def target_of(
    runtime: str,
    before: Path,
    after: Path,
    precision: str | None,
    parameters: Mapping[str, int] | None = None,
) -> Target:
    """Return what the benchmark takes for two artifacts, with the work of a token where headers tell it.

    ``parameters`` are by side, for runtimes that do not count them.
    """
    from serve.bench.orchestrate import Target

    works = {"before": work_of(runtime, before), "after": work_of(runtime, after)}
    known = {side: work for side, work in works.items() if work is not None}
    return Target(runtime, before, after, precision, known, parameters or {})


def _chosen(runtimes: Sequence[str], quants: Mapping[str, str]) -> dict[str, Wanted]:
    """Check what is asked for and return it, before any work is done."""
    from exporters.registry import FORMATS

    if not runtimes:
        raise UserError(f"no runtime was named; name some of {', '.join(WANTED)}")
    for runtime in runtimes:
        require_known(runtime, WANTED, "runtime")
    for name, quant in quants.items():
        require_known(name, FORMATS, "export format")
        require_known(quant, FORMATS[name].quants, f"{name} precision", ExportError)
        if name not in {WANTED[runtime].format for runtime in runtimes}:
            raise UserError(
                f"a precision of {name} is given and --runtime does not name {RUNTIME_OF[name]}; add it"
            )
    chosen = {}
    for runtime in dict.fromkeys(runtimes):
        wanted = WANTED[runtime]
        if wanted.format is not None:
            RUNTIMES[wanted.format].require()
            wanted = Wanted(wanted.format, quants.get(wanted.format, wanted.quant))
        chosen[runtime] = wanted
    return chosen


def _precision(chosen: Format, path: Path) -> str | None:
    """Return the precision of an artifact of a format, None for another; one without a name counts too."""
    try:
        return chosen.quant_of(path)
    except ExportError:
        return "unnamed precision"


def _target(runtime: str, wanted: Wanted, before: StrPath, after: StrPath, progress: Progress) -> Target:
    one, other = (_measurable(model, wanted, progress) for model in (before, after))
    same = one.precision == other.precision
    precision = one.precision if same else f"{one.precision} before, {other.precision} after"
    counts = {"before": one.num_parameters, "after": other.num_parameters}
    known = {side: count for side, count in counts.items() if count is not None}
    return target_of(runtime, one.path, other.path, precision, known)


@dataclass(frozen=True)
class _Measurable:
    """What a runtime takes; ``num_parameters`` None where it was not made from a folder here."""

    path: Path
    precision: str | None
    num_parameters: int | None = None


def _measurable(model: StrPath, wanted: Wanted, progress: Progress) -> _Measurable:
    """Return the artifact of a model that a runtime takes."""
    from cusprun.checkpoint.index import model_hash, open_checkpoint
    from exporters.registry import format_of

    if wanted.format is None:
        return _Measurable(resolve(model, progress).path, None)
    chosen = format_of(wanted.format)
    quant = wanted.quant or chosen.default_quant
    located = locate(model, progress)
    found = _precision(chosen, located.path)
    # A folder of full precision is what others are exported from, so it is one for vLLM only as asked for.
    is_artifact = wanted.format != "vllm" or found == quant or found in _VLLM_QUANTISED
    if found is not None and is_artifact:
        return _Measurable(located.path, found)
    folder = resolve(model, progress).path
    index = open_checkpoint(folder)
    key = key_of(wanted.format, model_hash(index), quant, __version__)
    path, _ = cached(
        "artifacts",
        f"{folder.name}-{quant}-{key}{chosen.suffix}",
        lambda out: chosen.export(folder, out, quant=quant, progress=progress),
    )
    return _Measurable(path, quant, index.num_parameters)
