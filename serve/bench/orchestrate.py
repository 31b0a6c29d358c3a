"""Before against after: fresh processes, interleaved, within a time limit."""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cusprun.codec import from_plain, to_plain
from cusprun.errors import CusprunError, MeasurementError, MissingDependencyError, ModelError
from cusprun.progress import SILENT, Progress
from serve.bench import environment
from serve.bench.records import (
    SIDES,
    Artifact,
    BenchOptions,
    BenchReport,
    Fault,
    Job,
    LostRun,
    Measurement,
    Reply,
    Run,
)
from serve.bench.statistics import compare_runs, reduce_run, spread

Launch = Callable[[Job], Reply]
"""Runs one job in a process of its own; never raises for what the worker did."""

_MAX_LOST = 2  # a worker that dies three times will die again
_FOREIGN_SHARE_LIMIT = 0.10
_SPREAD_LIMIT = 0.20  # runs on a quiet machine stay within 0.12 of each other
_CHUNK_BYTES = 1 << 24


def bench(
    before: Path,
    after: Path,
    options: BenchOptions | None = None,
    progress: Progress = SILENT,
    *,
    launch: Launch | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> BenchReport:
    """Measure two GGUF files against each other in llama.cpp on the CPU.

    Every run is a fresh process that loads, warms up and measures; the files take turns, in an order drawn
    from the seed for each pair, so that drift of the machine meets both alike. Both files are read once
    beforehand, so load times are those of a file in the page cache.

    Raises:
        ConfigError: an option cannot be.
        ModelError: a file is missing, or llama.cpp refuses it.
        MissingDependencyError: llama-cpp-python is not installed.
        MeasurementError: a worker died, hung or answered nonsense more than twice, or no pair was complete.
    """
    options = options or BenchOptions()
    options.check()
    paths = dict(zip(SIDES, (before, after), strict=True))
    sizes = {side: _read_through(path) for side, path in paths.items()}
    num_threads = options.num_threads or environment.physical_cores()
    jobs = {side: _job(path, options, num_threads) for side, path in paths.items()}
    load_average = environment.load_average()
    cpu_start, start = environment.cpu_seconds(), clock()
    pairs, lost = _run_pairs(jobs, options, progress, launch or subprocess_launch(options.run_limit_s), clock)
    elapsed_s = clock() - start
    foreign = environment.foreign_share(
        cpu_start, environment.cpu_seconds(), max(elapsed_s, 1e-9), os.cpu_count() or 1
    )
    runs = tuple(reduce_run(side, i, pair[side]) for i, pair in enumerate(pairs) for side in SIDES)
    first = pairs[0]
    return BenchReport(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        before=Artifact(before.name, sizes["before"], first["before"].num_parameters),
        after=Artifact(after.name, sizes["after"], first["after"].num_parameters),
        options=options,
        environment=environment.describe(num_threads, first["before"].runtime, load_average),
        context_length=first["before"].context_length,
        comparisons=compare_runs(runs, options.seed),
        runs=runs,
        lost_runs=tuple(lost),
        noise=noise(foreign, runs),
        elapsed_s=elapsed_s,
    )


def _job(path: Path, options: BenchOptions, num_threads: int) -> Job:
    return Job(
        path=str(path.absolute()),
        num_prompt_tokens=options.num_prompt_tokens,
        num_decode_tokens=options.num_decode_tokens,
        decode_depth=options.decode_depth,
        prompt_text=options.prompt_text,
        num_threads=num_threads,
        seed=options.seed,
    )


def _read_through(path: Path) -> int:
    """Read a file once, which puts it into the page cache, and return its bytes."""
    size = 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                size += len(chunk)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); give a GGUF file") from None
    return size


def _run_pairs(
    jobs: dict[str, Job],
    options: BenchOptions,
    progress: Progress,
    launch: Launch,
    clock: Callable[[], float],
) -> tuple[list[dict[str, Measurement]], list[LostRun]]:
    generator = random.Random(options.seed)
    complete: list[dict[str, Measurement]] = []
    lost: list[LostRun] = []
    start, longest = clock(), 0.0
    with progress.stage("benchmark", 2 * options.num_pairs, "run") as advance:
        pair = 0
        while len(complete) < options.num_pairs:
            begun = clock()
            over = begun - start + longest > options.time_limit_s
            if over and complete:
                break
            measured: dict[str, Measurement] = {}
            for side in generator.sample(SIDES, k=2):
                reply = launch(jobs[side])
                if reply.measurement is None:
                    lost.append(_lost_run(reply, side, pair, jobs[side]))
                    break
                measured[side] = reply.measurement
            if len(lost) > _MAX_LOST or (over and lost and not complete):
                raise MeasurementError(
                    f"the benchmark of {jobs[lost[-1].side].path} failed {len(lost)} times, the last time "
                    f"because {lost[-1].reason}; see that the file runs and that there is memory for it"
                )
            if len(measured) == len(SIDES):
                complete.append(measured)
                advance(2)
            pair += 1
            longest = max(longest, clock() - begun)
    return complete, lost


def _lost_run(reply: Reply, side: str, pair: int, job: Job) -> LostRun:
    """Turn a fault into a lost run, or raise it when trying again cannot help."""
    fault = reply.fault or Fault("crash", "the worker gave neither a measurement nor a fault")
    if fault.kind == "model":
        raise ModelError(fault.reason)
    if fault.kind == "dependency":
        raise MissingDependencyError(fault.reason)
    return LostRun(side, pair, f"{fault.reason} (while measuring {Path(job.path).name})")


def noise(foreign_share: float, runs: Sequence[Run]) -> tuple[str, ...]:
    """Say what made the machine noisy, one sentence each; ``foreign_share`` is of the machine's CPU time."""
    found = []
    if foreign_share > _FOREIGN_SHARE_LIMIT:
        found.append(f"other processes took {foreign_share:.0%} of the CPU time during the benchmark")
    for side in SIDES:
        speeds = [run.decode_tokens_per_second for run in runs if run.side == side]
        if spread(speeds) > _SPREAD_LIMIT:
            found.append(
                f"the decode speed of the file {side} ran from {min(speeds):.1f} to {max(speeds):.1f} "
                f"tokens/s (median {statistics.median(speeds):.1f})"
            )
    return tuple(found)


def subprocess_launch(
    run_limit_s: float, command: Sequence[str] = (sys.executable, "-m", "serve.bench.worker")
) -> Launch:
    """Return the launcher that starts ``command`` for each job and stops it after ``run_limit_s``."""
    root = Path(__file__).resolve().parents[2]  # so that -m finds the package wherever it is installed

    def launch(job: Job) -> Reply:
        try:
            done = subprocess.run(
                list(command),
                input=json.dumps(to_plain(job)),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=run_limit_s,
                cwd=root,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _crash(f"the worker had not finished after {run_limit_s:g} seconds")
        except OSError as error:
            return _crash(f"the worker could not be started ({error.strerror})")
        if done.returncode:
            return _crash(_ending(done.returncode, done.stderr))
        try:
            reply: Reply = from_plain(Reply, json.loads(done.stdout))
        except (ValueError, CusprunError):
            return _crash(f"the worker answered {done.stdout[:80]!r} where a result was expected")
        return reply

    return launch


def _crash(reason: str) -> Reply:
    return Reply(fault=Fault("crash", reason))


def _ending(code: int, stderr: str) -> str:
    """Say how a worker ended, with the last line it printed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = f", saying {lines[-1][:300]!r}" if lines else ""
    if code >= 0:
        return f"the worker ended with exit code {code}{said}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (killed from outside, perhaps for want of memory)" if name == "SIGKILL" else ""
    return f"the worker was ended by {name}{hint}{said}"
