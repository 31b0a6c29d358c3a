from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from cusprun.codec import dump_json, load_json
from cusprun.errors import ConfigError, MeasurementError, MissingDependencyError, ModelError
from serve.bench.orchestrate import bench, noise, subprocess_launch
from serve.bench.records import (
    METRICS,
    NO_DIFFERENCE,
    TOO_FEW_PAIRS,
    BenchOptions,
    BenchReport,
    Fault,
    Job,
    Reply,
)
from serve.bench.statistics import reduce_run
from serve.bench.table import bench_table, to_text

JOB = Job("m.gguf", 4, 4, 4, None, 1, 0)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    before, after = tmp_path / "before.gguf", tmp_path / "after.gguf"
    before.write_bytes(b"x" * 2000)
    after.write_bytes(b"x" * 1500)
    return before, after


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeLaunch:
    """Measures by a table of decode latencies per file; remembers the order; can fail at given calls."""

    def __init__(self, make, latency_ms: dict[str, float], noise_seed: int | None = None) -> None:
        self.make, self.latency_ms, self.order = make, latency_ms, []
        self.generator = None if noise_seed is None else random.Random(noise_seed)
        self.failures: dict[int, Reply] = {}
        self.clock = FakeClock()

    def __call__(self, job: Job) -> Reply:
        name = Path(job.path).stem
        self.order.append(name)
        self.clock.now += 2.0
        if failure := self.failures.get(len(self.order) - 1):
            return failure
        noise = 1.0 if self.generator is None else self.generator.lognormvariate(0, 0.02)
        return Reply(
            self.make(
                latency_ms=self.latency_ms[name] * noise,
                peak_bytes=int(1_000_000 * noise),
                load_time_ms=50 * noise,
                prefill_ms=400 * noise,
                time_to_first_token_ms=401 * noise,
            )
        )


CRASH = Reply(fault=Fault("crash", "the worker was ended by SIGSEGV"))


def run(files, launch: FakeLaunch, **options) -> BenchReport:
    return bench(*files, BenchOptions(num_threads=1, **options), launch=launch, clock=launch.clock)


@pytest.mark.parametrize("seed", range(5))
def test_a_file_against_itself_shows_no_difference(files, make_measurement, seed: int) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 10.0}, noise_seed=seed)
    report = run(files, launch)
    for metric in METRICS:
        found = report.comparison(metric.name)
        assert found.ratio.low <= 1 <= found.ratio.high
        assert found.verdict == NO_DIFFERENCE


def test_a_difference_is_found_through_noise(files, make_measurement) -> None:
    report = run(files, FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0}, noise_seed=0))
    speed = report.comparison("decode_tokens_per_second")
    assert speed.verdict == "faster"
    assert speed.ratio.low < 1.25 < speed.ratio.high
    assert report.comparison("inter_token_latency_p99_ms").verdict == "faster"
    assert report.comparison("load_time_ms").verdict == NO_DIFFERENCE


def test_runs_are_interleaved_in_a_seeded_random_order(files, make_measurement) -> None:
    orders = {}
    for seed in (0, 0, 1):
        launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
        run(files, launch, seed=seed)
        pairs = [tuple(launch.order[i : i + 2]) for i in range(0, 18, 2)]
        assert len(launch.order) == 18
        assert all(set(pair) == {"before", "after"} for pair in pairs)
        assert len(set(pairs)) == 2  # both orders come up among nine
        assert orders.setdefault(seed, pairs) == pairs
    assert orders[0] != orders[1]


def test_facts_of_the_report(files, make_measurement) -> None:
    report = run(files, FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0}))
    assert (report.before.file_bytes, report.after.file_bytes) == (2000, 1500)
    assert report.num_pairs == 9
    assert report.elapsed_s == 36.0
    assert report.environment.num_threads == 1
    assert report.comparison("decode_tokens_per_second").ratio.median == pytest.approx(1.25)
    assert report.comparison("decode_tokens_per_second").before.median == pytest.approx(100.0)


def test_the_time_limit_stops_before_a_pair_that_would_end_too_late(files, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    report = run(files, launch, time_limit_s=13.0)
    assert report.num_pairs == 3  # pairs take 4 seconds: a fourth would end at 16
    least = run(files, launch, time_limit_s=0.1)
    assert least.num_pairs == 1
    assert least.comparison("decode_tokens_per_second").verdict == TOO_FEW_PAIRS


def test_a_lost_run_is_reported_and_its_pair_measured_again(files, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    launch.failures = {3: CRASH}
    report = run(files, launch)
    (lost,) = report.lost_runs
    assert report.num_pairs == 9
    assert len(report.runs) == 18
    assert lost.pair == 1
    assert lost.side == launch.order[3]
    assert "SIGSEGV" in lost.reason
    assert f"Lost run: pair 2, file {lost.side}, the worker was ended by SIGSEGV" in to_text(
        bench_table(report)
    )


def test_a_worker_that_keeps_crashing_ends_the_benchmark(files, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    launch.failures = dict.fromkeys(range(50), CRASH)
    with pytest.raises(MeasurementError, match=r"failed 3 times, the last time because .*SIGSEGV"):
        run(files, launch)
    assert len(launch.order) == 3


@pytest.mark.parametrize(("kind", "error"), [("model", ModelError), ("dependency", MissingDependencyError)])
def test_a_fault_that_will_not_go_away_is_raised_at_once(files, make_measurement, kind, error) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    launch.failures = {0: Reply(fault=Fault(kind, "it is damaged; copy it again"))}
    with pytest.raises(error, match="it is damaged; copy it again"):
        run(files, launch)
    assert len(launch.order) == 1


def test_a_missing_file_is_refused_before_any_run(files, tmp_path, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {})
    with pytest.raises(ModelError, match=r"none\.gguf cannot be read \(No such file or directory\)"):
        bench(files[0], tmp_path / "none.gguf", launch=launch)
    assert not launch.order


def test_all_wrong_options_are_listed(files) -> None:
    options = BenchOptions(
        num_prompt_tokens=300, num_decode_tokens=0, context_depth=10, time_limit_s=-1.0, prompt_text=" "
    )
    with pytest.raises(ConfigError) as caught:
        bench(*files, options)
    assert len(caught.value.faults) == 4


def test_the_report_survives_json(files, tmp_path, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0}, noise_seed=0)
    launch.failures = {3: CRASH}
    report = run(files, launch)
    dump_json(report, tmp_path / "report.json")
    assert load_json(BenchReport, tmp_path / "report.json") == report


def test_noise_names_busy_neighbours_and_unsteady_runs(make_measurement) -> None:
    steady = [reduce_run(side, i, make_measurement()) for i in range(6) for side in ("before", "after")]
    assert noise(0.0, steady) == ()
    assert "other processes took 34% of the CPU time" in noise(0.34, steady)[0]
    disturbed = [*steady[:-1], reduce_run("after", 5, make_measurement(latency_ms=50.0))]
    (sentence,) = noise(0.0, disturbed)
    assert "of the file after ran from 20.0 to 100.0 tokens/s" in sentence


def python_launch(source: str, limit_s: float = 60.0):
    return subprocess_launch(limit_s, (sys.executable, "-c", source))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL (killed from outside"),
        ("raise RuntimeError('boom')", "exit code 1, saying 'RuntimeError: boom'"),
        ("print('hello')", "answered 'hello"),
        ("print('{\"measurement\": 3}')", "answered"),
        ("pass", "answered ''"),
    ],
)
def test_what_happened_to_a_worker_is_said(source: str, said: str) -> None:
    reply = python_launch(source)(JOB)
    assert reply.measurement is None
    assert reply.fault is not None
    assert reply.fault.kind == "crash"
    assert said in reply.fault.reason


def test_a_hanging_worker_is_stopped() -> None:
    reply = python_launch("import signal; signal.pause()", limit_s=0.3)(JOB)
    assert reply.fault is not None
    assert "had not finished after 0.3 seconds" in reply.fault.reason


def test_a_crashing_worker_process_ends_in_a_measurement_error(files) -> None:
    with pytest.raises(MeasurementError, match="SIGABRT"):
        bench(*files, BenchOptions(num_threads=1), launch=python_launch("import os; os.abort()"))
