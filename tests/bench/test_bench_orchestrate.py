from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from cusprun.cli.bench import require_all_measured
from cusprun.codec import dump_json, load_json
from cusprun.errors import ConfigError, MeasurementError, MissingDependencyError, ModelError, UserError
from serve.bench.launch import subprocess_launch
from serve.bench.measurement import Fault, Job, Reply
from serve.bench.orchestrate import Target, bench, noise
from serve.bench.records import NO_DIFFERENCE, TOO_FEW_PAIRS, BenchOptions, BenchReport, Suite
from serve.bench.roofline import Speeds, Work
from serve.bench.statistics import reduce_run
from serve.bench.table import bench_table, to_text

JOB = Job("llamacpp", "m.gguf", (128, 512), (128, 512), 4, None, 1, 0)
SPEED = "decode_tokens_per_second@128"


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
                first_ms=401 * noise,
            )
        )


CRASH = Reply(fault=Fault("crash", "the worker was ended by SIGSEGV"))


def report_of(files, launch: FakeLaunch, runtimes=("llamacpp",), **options) -> BenchReport:
    targets = [Target(runtime, *files) for runtime in runtimes]
    return bench(targets, BenchOptions(num_threads=1, **options), launch=launch, clock=launch.clock)


def run(files, launch: FakeLaunch, **options) -> Suite:
    (suite,) = report_of(files, launch, **options).suites
    return suite


@pytest.mark.parametrize("seed", range(5))
def test_a_file_against_itself_shows_no_difference(files, make_measurement, seed: int) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 10.0}, noise_seed=seed)
    suite = run(files, launch)
    assert len(suite.comparisons) == 15  # pss, mapped bytes and energy are not counted by the fake
    assert {entry.verdict for entry in suite.comparisons} == {NO_DIFFERENCE}


def test_a_difference_is_found_through_noise(files, make_measurement) -> None:
    suite = run(files, FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0}, noise_seed=0))
    speed = suite.comparison(SPEED)
    assert speed.verdict == "faster"
    assert speed.ratio.low < 1.25 < speed.ratio.high
    assert suite.comparison("inter_token_latency_p99_ms@512").verdict == "faster"
    assert suite.comparison("load_time_ms").verdict == NO_DIFFERENCE


def test_runs_are_interleaved_in_a_seeded_random_order(files, make_measurement) -> None:
    orders = {}
    for seed in (0, 0, 1):
        launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
        run(files, launch, seed=seed, num_pairs=9)
        pairs = [tuple(launch.order[i : i + 2]) for i in range(0, 18, 2)]
        assert len(launch.order) == 18
        assert all(set(pair) == {"before", "after"} for pair in pairs)
        assert len(set(pairs)) == 2  # both orders come up among nine
        assert orders.setdefault(seed, pairs) == pairs
    assert orders[0] != orders[1]


def test_facts_of_the_report(files, make_measurement) -> None:
    report = report_of(files, FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0}), num_pairs=9)
    (suite,) = report.suites
    assert (suite.before.file_bytes, suite.after.file_bytes) == (2000, 1500)
    assert (suite.before.bits_per_weight, suite.after.bits_per_weight) == (16.0, 12.0)
    assert suite.num_pairs == 9
    assert (report.elapsed_s, suite.elapsed_s) == (36.0, 36.0)
    assert report.environment.num_threads == 1
    assert suite.comparison(SPEED).ratio.median == pytest.approx(1.25)
    assert suite.comparison(SPEED).before.median == pytest.approx(100.0)
    assert suite.stopped == "9 pairs, as asked"


def test_steady_runs_stop_at_the_least_pairs_that_can_show_a_difference(files, make_measurement) -> None:
    """13 metrics are tested, so 2 / 2**n * 13 <= 0.05 from 10 pairs on."""
    suite = run(files, FakeLaunch(make_measurement, {"before": 10.0, "after": 9.99}))
    assert suite.num_pairs == 10
    assert suite.stopped == "the ratios of the speeds are known within 2.0%"


def test_noisy_runs_go_on_to_the_limit(files, make_measurement) -> None:
    suite = run(
        files,
        FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0}, 0),
        precision=1e-4,
        time_limit_s=600.0,
    )
    assert suite.num_pairs == BenchOptions().max_pairs
    assert suite.stopped == "48 pairs, the most that are made"


def test_the_time_limit_stops_before_a_pair_that_would_end_too_late(files, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    suite = run(files, launch, time_limit_s=13.0)
    assert suite.num_pairs == 3  # pairs take 4 seconds: a fourth would end at 16
    assert suite.stopped == "the time limit of 13 seconds"
    least = run(files, launch, time_limit_s=0.1)
    assert least.num_pairs == 1
    assert least.comparison(SPEED).verdict == TOO_FEW_PAIRS


def test_a_lost_run_is_reported_and_its_pair_measured_again(files, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    launch.failures = {3: CRASH}
    report = report_of(files, launch, num_pairs=9)
    (suite,) = report.suites
    (lost,) = suite.lost_runs
    assert suite.num_pairs == 9
    assert len(suite.runs) == 18
    assert lost.pair == 1
    assert lost.side == launch.order[3]
    assert "SIGSEGV" in lost.reason
    text = to_text(bench_table(report, suite))
    assert f"Lost run: pair 2, {lost.side}, the worker was ended by SIGSEGV" in text


def test_a_worker_that_keeps_crashing_ends_the_benchmark(files, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    launch.failures = dict.fromkeys(range(50), CRASH)
    with pytest.raises(MeasurementError, match=r"failed 3 times, the last time because .*SIGSEGV"):
        run(files, launch)
    assert len(launch.order) == 3


@pytest.mark.parametrize("fault", [CRASH, Reply(fault=Fault("model", "the server did not answer"))])
def test_a_runtime_that_breaks_down_keeps_the_pairs_that_it_gave(files, make_measurement, fault) -> None:
    """Out of memory in the middle, or a server that starts no more: the file was good before."""
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    launch.failures = dict.fromkeys(range(8, 100), fault)
    report = report_of(files, launch)
    (suite,) = report.suites
    assert (suite.num_pairs, len(suite.lost_runs), suite.stopped) == (4, 3, "3 runs were lost")
    assert suite.comparison(SPEED).ratio.median == pytest.approx(1.25)
    assert suite.given_up is not None
    assert fault.fault.reason in suite.given_up
    with pytest.raises(MeasurementError, match="not measured to the end: llamacpp"):
        require_all_measured(report)


def test_nothing_measured_is_a_report_where_that_is_wanted(files, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {})
    where = str(files[0].parent)
    launch.failures = {0: Reply(fault=Fault("model", f"{files[0]} is damaged; see {where}/before.gguf"))}
    report = bench([Target("llamacpp", *files)], launch=launch, clock=launch.clock, must_measure=False)
    (suite,) = report.suites
    assert suite.failure == "before.gguf is damaged; see before.gguf"  # no folder of the user's
    with pytest.raises(MeasurementError, match="not measured: llamacpp"):
        require_all_measured(report)


def test_a_runtime_that_fails_leaves_the_others_their_rows(files, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0})
    launch.failures = {0: Reply(fault=Fault("dependency", "onnxruntime-genai is not installed"))}
    report = report_of(files, launch, ("onnx", "llamacpp"), num_pairs=10)
    failed, measured = report.suites
    assert report.failed
    assert failed.failure == "onnxruntime-genai is not installed"
    assert bench_table(report, failed).notes == ("Not measured: onnxruntime-genai is not installed.",)
    assert measured.comparison(SPEED).verdict == "faster"


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
        bench([Target("llamacpp", files[0], tmp_path / "none.gguf")], launch=launch)
    assert not launch.order


def test_an_unknown_runtime_is_refused_with_the_nearest(files) -> None:
    with pytest.raises(UserError, match="unknown runtime 'lamacpp'; did you mean 'llamacpp'"):
        bench([Target("lamacpp", *files)])


def test_all_wrong_options_are_listed(files) -> None:
    options = BenchOptions(
        prompt_lengths=(), context_depths=(0, 4, 4), num_decode_tokens=0, time_limit_s=-1.0, prompt_text=" "
    )
    with pytest.raises(ConfigError) as caught:
        bench([Target("llamacpp", *files)], options)
    assert len(caught.value.faults) == 6
    for value in (float("inf"), float("nan"), 0.0):  # which JSON could not hold, either
        with pytest.raises(ConfigError, match=f"precision must be over 0 of the ratio, not {value:g}"):
            bench([Target("llamacpp", *files)], BenchOptions(precision=value))


def test_the_report_survives_json(files, tmp_path, make_measurement) -> None:
    launch = FakeLaunch(make_measurement, {"before": 10.0, "after": 8.0}, noise_seed=0)
    launch.failures = {3: CRASH}
    works = {side: Work(500 * scale, 10, 100.0, 20.0, 1.0) for scale, side in ((2, "before"), (1, "after"))}
    report = bench(
        [Target("llamacpp", *files, "q8_0", works)],
        BenchOptions(num_threads=1),
        launch=launch,
        clock=launch.clock,
        hardware=lambda sizes, threads: {size: Speeds(1e6, 1e5) for size in sizes},
    )
    dump_json(report, tmp_path / "report.json")
    assert load_json(BenchReport, tmp_path / "report.json") == report


def test_noise_names_busy_neighbours_and_unsteady_runs(make_measurement) -> None:
    options = BenchOptions()
    steady = [reduce_run(side, i, make_measurement(), JOB) for i in range(6) for side in ("before", "after")]
    assert noise(0.0, steady, options) == ()
    assert "other processes took 34% of the CPU time" in noise(0.34, steady, options)[0]
    disturbed = [*steady[:-1], reduce_run("after", 5, make_measurement(latency_ms=50.0), JOB)]
    (sentence,) = noise(0.0, disturbed, options)
    assert "after pruning ran from 20.0 to 100.0 tokens/s" in sentence


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
    launch = python_launch("import os; os.abort()")
    with pytest.raises(MeasurementError, match="SIGABRT"):
        bench([Target("llamacpp", *files)], BenchOptions(num_threads=1), launch=launch)


def test_what_the_environment_names_is_named_from_the_callers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker starts elsewhere, where ``-m`` finds the package, and looks for vLLM all the same."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUSPRUN_VLLM", "bin/python")
    job = Job("vllm", str(tmp_path), (4,), (4,), 2, None, 1, 0)
    reply = subprocess_launch(60.0)(job)
    assert reply.fault is not None
    # Found and without vLLM, which is said of it; one that is not found cannot even be asked.
    assert reply.fault.kind == "dependency"
    assert "bin/python is no Python that has vLLM" in reply.fault.reason
