"""How fast an export is beside the original in the same export: the one place that asks the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.errors import MeasurementError
from cusprun.pipeline.frontier import Speed, SpeedOptions
from cusprun.progress import SILENT, Progress

if TYPE_CHECKING:
    from serve.bench.records import Environment, Suite

MeasureSpeed = Callable[[Path, Path, str, SpeedOptions, Progress], Speed]
"""Measures ``after`` beside ``before`` in a runtime of the benchmark; :func:`measure_speed` is one."""


def measure_speed(
    before: Path, after: Path, runtime: str, options: SpeedOptions, progress: Progress = SILENT
) -> Speed:
    """Measure two artifacts in turns with ``cusprun bench`` and return the speed of ``after``.

    Raises:
        MeasurementError: the runtime could not be measured.
        CusprunError: whatever the benchmark raises.
    """
    from serve.bench.orchestrate import Target, bench
    from serve.bench.records import BenchOptions

    report = bench(
        (Target(runtime, before, after),),
        BenchOptions(
            prompt_lengths=(options.prompt_tokens,),
            context_depths=(options.context_depth,),
            num_decode_tokens=options.decode_tokens,
            num_pairs=options.num_pairs,
            time_limit_s=options.time_limit_s,
            num_threads=options.num_threads,
        ),
        progress,
    )
    return speed_of(report.suites[0], report.environment, options)


def speed_of(suite: Suite, environment: Environment, options: SpeedOptions) -> Speed:
    """Take the speed of ``after`` from what the benchmark found; raises ``MeasurementError`` on a failure."""
    failure = suite.failure or suite.given_up
    if failure is not None:
        raise MeasurementError(f"its speed could not be measured: {failure}")
    decode = suite.comparison(f"decode_tokens_per_second@{options.context_depth}")
    prompt = suite.comparison(f"prompt_tokens_per_second@{options.prompt_tokens}")
    return Speed(
        decode_tokens_per_second=decode.after,
        decode_ratio=decode.ratio,
        prompt_tokens_per_second=prompt.after,
        prompt_ratio=prompt.ratio,
        peak_memory_bytes=suite.comparison("peak_memory_bytes").after.median,
        num_pairs=suite.num_pairs,
        library=suite.library,
        machine=f"{environment.cpu_model}, {environment.num_threads} threads",
        noise=suite.noise,
    )
