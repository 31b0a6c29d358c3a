"""Before against after: fresh processes, interleaved, until the ratios are known well enough."""

from __future__ import annotations

import datetime
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cusprun.errors import (
    CusprunError,
    MeasurementError,
    MissingDependencyError,
    ModelError,
    UserError,
    require_known,
)
from cusprun.progress import SILENT, Progress
from serve.bench import environment
from serve.bench.engines import ENGINES
from serve.bench.hardware import measure_hardware
from serve.bench.launch import Launch, subprocess_launch
from serve.bench.measurement import Fault, Job, Measurement
from serve.bench.metrics import DECODE_SPEED, Metric, at, metrics_of
from serve.bench.records import (
    MAX_LOST_RUNS,
    SIDES,
    Artifact,
    BenchOptions,
    BenchReport,
    LostRun,
    Roofline,
    Run,
    Suite,
)
from serve.bench.roofline import Speeds, Work, roofline
from serve.bench.statistics import (
    compare_runs,
    is_precise,
    least_pairs,
    measured_metrics,
    reduce_run,
    spread,
    tested,
)

Clock = Callable[[], float]
Hardware = Callable[[Sequence[int], int], Mapping[int, Speeds] | None]

_FOREIGN_SHARE_LIMIT = 0.10
_SPREAD_LIMIT = 0.20  # runs on a quiet machine stay within 0.12 of each other
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Target:
    """Two artifacts, files or folders, for one runtime; ``works`` are by side, for the roofline.

    ``precision`` is how both are quantised, for people; ``parameters``, by side, count where the runtime does
    not.
    """

    runtime: str
    before: Path
    after: Path
    precision: str | None = None
    works: Mapping[str, Work] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)

    def path(self, side: str) -> Path:
        """Return the artifact of a side, absolute."""
        return (self.before if side == SIDES[0] else self.after).absolute()

    def without_folders(self, text: str) -> str:
        """Return text with the bare names of the artifacts: a report must not tell a user's folders."""
        for path in map(self.path, SIDES):
            for spelled in (path, path.resolve()):
                text = text.replace(str(spelled), path.name)
        return text


def bench(
    targets: Sequence[Target],
    options: BenchOptions | None = None,
    progress: Progress = SILENT,
    *,
    launch: Launch | None = None,
    clock: Clock = time.monotonic,
    hardware: Hardware = measure_hardware,
    must_measure: bool = True,
) -> BenchReport:
    """Measure two models against each other in each target's runtime.

    Every run is a fresh process that loads, warms up and measures; the models take turns, in an order drawn
    from the seed for each pair, so that drift of the machine meets both alike. All files are read once
    beforehand, so load times are those of files in the page cache. A runtime that cannot be measured leaves
    a suite that says why, unless none can and ``must_measure`` says so. One that stops working in the middle
    leaves the pairs that it gave.

    Raises:
        ConfigError: an option cannot be.
        UserError: a runtime is unknown.
        ModelError: a file is missing, or the only runtime refuses it.
        MissingDependencyError: the only runtime is not installed.
        MeasurementError: no runtime could be measured: before the first complete pair a worker died, hung or
            answered nonsense more than twice.
    """
    options = options or BenchOptions()
    options.check()
    for target in targets:
        require_known(target.runtime, ENGINES, "runtime")
    num_threads = options.num_threads or environment.physical_cores()
    load_average, start = environment.load_average(), clock()
    suites: list[Suite] = []
    errors: list[CusprunError] = []
    for target in targets:
        try:
            suites.append(_suite(target, options, num_threads, progress, launch, clock, hardware))
        except (MeasurementError, ModelError, MissingDependencyError) as error:
            errors.append(error)
            suites.append(_failed_suite(target, error))
    if not targets:
        raise UserError("no runtime was named; name at least one, like llamacpp")
    if must_measure and len(errors) == len(targets):
        raise errors[0]
    return BenchReport(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        options=options,
        environment=environment.describe(num_threads, load_average),
        suites=tuple(suites),
        elapsed_s=clock() - start,
    )


def _suite(
    target: Target,
    options: BenchOptions,
    num_threads: int,
    progress: Progress,
    launch: Launch | None,
    clock: Clock,
    hardware: Hardware,
) -> Suite:
    kind = ENGINES[target.runtime]
    sizes = {side: _read_through(target.path(side)) for side in SIDES}
    jobs = {side: Job.of(target.runtime, str(target.path(side)), options, num_threads) for side in SIDES}
    series = _Series(
        jobs=jobs,
        options=options,
        metrics=metrics_of(options),
        launch=launch or subprocess_launch(options.run_limit_s or kind.run_limit_s),
        clock=clock,
        time_limit_s=options.time_limit_s or kind.time_limit_s,
    )
    cpu_start, start = environment.cpu_seconds(), clock()
    series.measure(progress)
    elapsed_s = clock() - start
    foreign = environment.foreign_share(
        cpu_start, environment.cpu_seconds(), max(elapsed_s, 1e-9), os.cpu_count() or 1
    )
    comparisons = compare_runs(series.runs, series.metrics, options.seed)
    first = series.first
    return Suite(
        runtime=target.runtime,
        library=first["before"].library,
        before=_artifact(target, "before", sizes, first),
        after=_artifact(target, "after", sizes, first),
        context_length=first["before"].context_length,
        comparisons=comparisons,
        runs=tuple(series.runs),
        lost_runs=tuple(replace(one, reason=target.without_folders(one.reason)) for one in series.lost),
        noise=noise(foreign, series.runs, options),
        stopped=series.stopped,
        roofline=_roofline(target, options, comparisons, num_threads, hardware),
        elapsed_s=elapsed_s,
    )


def _failed_suite(target: Target, error: CusprunError) -> Suite:
    before, after = (Artifact(target.path(side).name, 0, None, None, target.precision) for side in SIDES)
    return Suite(
        runtime=target.runtime,
        library=ENGINES[target.runtime].label,
        before=before,
        after=after,
        context_length=None,
        comparisons=(),
        runs=(),
        lost_runs=(),
        noise=(),
        stopped="not measured",
        roofline=None,
        elapsed_s=0.0,
        failure=target.without_folders(str(error)),
    )


def _artifact(
    target: Target, side: str, sizes: Mapping[str, int], first: Mapping[str, Measurement]
) -> Artifact:
    num_parameters = first[side].num_parameters or target.parameters.get(side)
    return Artifact(
        file_name=target.path(side).name,
        file_bytes=sizes[side],
        num_parameters=num_parameters,
        bits_per_weight=8 * sizes[side] / num_parameters if num_parameters else None,
        precision=target.precision,
    )


def _roofline(
    target: Target, options: BenchOptions, comparisons: Sequence[object], num_threads: int, hardware: Hardware
) -> Roofline | None:
    if set(target.works) != set(SIDES):
        return None
    sizes = {side: target.works[side].weight_bytes for side in SIDES}
    measured = hardware(tuple(sizes.values()), num_threads)
    if measured is None:
        return None
    speeds = {side: measured[size] for side, size in sizes.items()}
    return roofline(options, comparisons, target.works, speeds)  # type: ignore[arg-type]


def _read_through(path: Path) -> int:
    """Read a file, or the files of a folder, which puts them into the page cache, and return their bytes."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    size = 0
    try:
        for file in files:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    size += len(chunk)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); give an exported model") from None
    return size


@dataclass
class _Series:
    """Pairs of runs of one runtime, one after the other."""

    jobs: Mapping[str, Job]
    options: BenchOptions
    metrics: Sequence[Metric]
    launch: Launch
    clock: Clock
    time_limit_s: float
    runs: list[Run] = field(default_factory=list)
    lost: list[LostRun] = field(default_factory=list)
    first: dict[str, Measurement] = field(default_factory=dict)
    stopped: str = ""

    @property
    def num_pairs(self) -> int:
        """Pairs in which both models were measured."""
        return len(self.runs) // 2

    def measure(self, progress: Progress) -> None:
        """Measure pairs until there are enough; raises what makes a first pair impossible."""
        most = self.options.num_pairs or self.options.max_pairs
        generator = random.Random(self.options.seed)
        start, longest, pair = self.clock(), 0.0, 0
        with progress.stage(
            f"benchmark, {ENGINES[self.jobs['before'].runtime].label}", 2 * most, "run"
        ) as advance:
            while not self._is_enough(most):
                begun = self.clock()
                over = begun - start + longest > self.time_limit_s
                if over and self.num_pairs:
                    self.stopped = f"the time limit of {self.time_limit_s:g} seconds"
                    return
                measured = self._pair(pair, generator)
                if len(self.lost) > MAX_LOST_RUNS or (over and self.lost and not self.num_pairs):
                    if not self.num_pairs:
                        raise self._given_up()
                    self.stopped = f"{len(self.lost)} runs were lost"
                    return
                if len(measured) == len(SIDES):
                    self.first = self.first or measured
                    self.runs += [reduce_run(side, pair, measured[side], self.jobs[side]) for side in SIDES]
                    advance(2)
                pair += 1
                longest = max(longest, self.clock() - begun)

    def _given_up(self) -> MeasurementError:
        last = self.lost[-1]
        return MeasurementError(
            f"the benchmark of {self.jobs[last.side].path} failed {len(self.lost)} times, the last time "
            f"because {last.reason}; see that the file runs and that there is memory for it"
        )

    def _is_enough(self, most: int) -> bool:
        if self.num_pairs >= most:
            asked = "as asked" if self.options.num_pairs else "the most that are made"
            self.stopped = f"{most} {'pair' if most == 1 else 'pairs'}, {asked}"
            return True
        if self.options.num_pairs or not self.num_pairs:
            return False
        if self.num_pairs < least_pairs(len(tested(measured_metrics(self.runs, self.metrics)))):
            return False
        speeds = [metric for metric in self.metrics if metric.is_speed]
        if not is_precise(compare_runs(self.runs, speeds, self.options.seed), self.options.precision):
            return False
        self.stopped = f"the ratios of the speeds are known within {self.options.precision:.1%}"
        return True

    def _pair(self, pair: int, generator: random.Random) -> dict[str, Measurement]:
        """Measure one pair, in an order drawn for it; what was measured of it when a run is lost."""
        measured: dict[str, Measurement] = {}
        for side in generator.sample(SIDES, k=2):
            reply = self.launch(self.jobs[side])
            if reply.measurement is None:
                fault = reply.fault or Fault("crash", "the worker gave neither a measurement nor a fault")
                if not self.num_pairs:
                    _raise_if_hopeless(fault)
                self.lost.append(LostRun(side, pair, _lost_reason(fault, self.jobs[side])))
                break
            measured[side] = reply.measurement
        return measured


def _raise_if_hopeless(fault: Fault) -> None:
    """Raise a fault that trying again cannot help, as long as nothing was measured: then it can."""
    if fault.kind == "model":
        raise ModelError(fault.reason)
    if fault.kind == "dependency":
        raise MissingDependencyError(fault.reason)


def _lost_reason(fault: Fault, job: Job) -> str:
    return f"{fault.reason} (while measuring {Path(job.path).name})"


def noise(foreign_share: float, runs: Sequence[Run], options: BenchOptions) -> tuple[str, ...]:
    """Say what made the machine noisy, one sentence each; ``foreign_share`` is of the machine's CPU time."""
    found = []
    if foreign_share > _FOREIGN_SHARE_LIMIT:
        found.append(f"other processes took {foreign_share:.0%} of the CPU time during the benchmark")
    name = at(DECODE_SPEED.name, min(options.context_depths))
    for side in SIDES:
        speeds = [run.values[name] for run in runs if run.side == side]
        if spread(speeds) > _SPREAD_LIMIT:
            found.append(
                f"the decode speed {side} pruning ran from {min(speeds):.1f} to {max(speeds):.1f} "
                f"tokens/s (median {statistics.median(speeds):.1f})"
            )
    return tuple(found)
