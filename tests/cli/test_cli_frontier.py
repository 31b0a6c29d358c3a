"""``sweep --export`` on tiny models in the real runtimes; the speed is a stand-in for the benchmark's."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest

import cusprun as api
from cusprun.codec import load_json
from cusprun.corpus import build_corpora, load_expert
from cusprun.errors import MeasurementError, MissingDependencyError, OutputError
from cusprun.pipeline import frontier_points
from cusprun.pipeline import sweep as sweeping
from cusprun.pipeline.curve import SweepReport
from cusprun.pipeline.frontier import Speed, SpeedOptions
from serve.bench.records import Interval
from serve.runtimes.vllm_process import VLLM_VARIABLE

pytest.importorskip("llama_cpp")

TARGETS = ("gguf:q8_0",)
SWEEP = ("sweep", "model", "--expert", "expert.yaml", "--for", *TARGETS, "--out", "curve")
FILES = ["frontier.png", "sweep.json", "sweep.md", "sweep.png"]


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def report_of(folder: str) -> SweepReport:
    return load_json(SweepReport, Path(folder) / "sweep.json")


class Stopwatch:
    """A benchmark that takes no time: the fewer bytes, the faster. Remembers what it was asked."""

    def __init__(self, failing: str | None = None, error: BaseException | None = None) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self._failing, self._error = failing, error

    def __call__(self, before, after, runtime, options, progress) -> Speed:
        self.asked.append((before.name, after.name, runtime))
        assert before.exists()
        assert after.exists()
        if after.name == self._failing and self._error:
            raise self._error
        sizes = [_bytes(path) for path in (before, after)]
        rate, ratio = 1e8 / sizes[1], sizes[0] / sizes[1]
        near = Interval(rate, rate * 0.99, rate * 1.01), Interval(ratio, ratio * 0.99, ratio * 1.01)
        return Speed(*near, *near, 2.0 * sizes[1], options.num_pairs, f"{runtime} 1", "a machine", ("loud",))


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def sweep(ratios, out="curve", exports=("gguf:q8_0",), **options) -> SweepReport:
    chosen = {"targets": TARGETS, "exports": exports, "refit": False, **options}
    return api.sweep("model", "expert.yaml", ratios, out, **chosen)


def torch_perplexity(folder: str, documents) -> float:
    """By transformers alone, document after document."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    nats = tokens = 0.0
    for document in documents:
        ids = torch.tensor([document.token_ids])
        with torch.inference_mode():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return math.exp(nats / tokens)


def test_every_size_in_every_export(work) -> None:
    """Bytes as they lie there, quality as the runtime gives it, speed beside the original in that export."""
    pytest.importorskip("onnxruntime_genai")
    watch = Stopwatch()
    exports = ("gguf:f32", "gguf:q8_0", "onnx:fp32")
    report = sweep([0.3], exports=exports, measure=watch, keep=True)
    artifacts = {
        "gguf:f32": "f32.gguf",
        "gguf:q8_0": "q8_0.gguf",
        "onnx:fp32": "fp32-onnx",
    }
    assert names("curve") == sorted(
        [
            *FILES,
            "expert-0.3",
            *(f"{side}-{end}" for side in ("original", "expert-0.3") for end in artifacts.values()),
        ]
    )
    assert [point.name for point in report.frontier] == [
        f"{side} {export}" for side in ("original", "0.3") for export in exports
    ]
    corpora = build_corpora(load_expert(Path("expert.yaml")), Path("model"))
    exact = {
        (ratio, name): torch_perplexity(folder, documents)
        for ratio, folder in ((0.0, "model"), (0.3, "curve/expert-0.3"))
        for name, documents in (("held_out", corpora.held_out), ("general", corpora.general))
    }
    for point in report.frontier:
        export = f"{point.format}:{point.precision}"
        side = "original" if not point.ratio else "expert-0.3"
        assert point.failure is None
        size = _bytes(Path("curve") / f"{side}-{artifacts[export]}")
        assert point.file_bytes == size
        folder = "model" if not point.ratio else "curve/expert-0.3"
        assert point.num_parameters == api.inspect(folder).num_parameters
        assert point.bits_per_weight == pytest.approx(8 * size / point.num_parameters)
        close = 0.03 if point.precision == "q8_0" else 1e-4
        for name, row in point.corpora.items():
            assert row.perplexity.value == pytest.approx(exact[point.ratio, name], rel=close)
            ratio = exact[point.ratio, name] / exact[0.0, name]
            assert row.perplexity_ratio.value == pytest.approx(ratio, rel=close)
            assert row.perplexity_ratio.low <= row.perplexity_ratio.value <= row.perplexity_ratio.high
    runtimes = {"gguf": "llamacpp", "onnx": "onnx"}
    assert watch.asked == [
        (f"original-{artifacts[export]}", f"{side}-{artifacts[export]}", runtimes[export.partition(":")[0]])
        for side in ("original", "expert-0.3")
        for export in exports
    ]
    assert report == report_of("curve")
    assert str(work) not in Path("curve/sweep.json").read_text()
    _check_page(report)


def _check_page(report: SweepReport) -> None:
    page = Path("curve/sweep.md").read_text()
    table = page.partition("## Exports")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * (1 + len(report.frontier))
    for point in report.frontier:
        (row,) = [line for line in rows[: len(rows) // 2] if line.startswith(f"| {point.name} |")]
        assert row.endswith(f"| {point.dominated_by or 'nothing'} |")
    for word in (
        "bits per weight",
        "decode tokens/s",
        "held-out perplexity",
        "dominated by",
        "loud",
        "a machine",
    ):
        assert word in table
    assert Path("curve/frontier.png").read_bytes().startswith(b"\x89PNG")


def test_exports_are_calibrated_on_the_expert_s_documents_and_removed(work, monkeypatch) -> None:
    """A kept expert exported by hand has the same tensors as the sweep's, importance matrix and all."""
    import gguf

    seen: dict[str, dict[str, bytes]] = {}
    measuring = frontier_points.Exporter._quality

    def looked_at(exporter, artifact, spec):
        seen[artifact.name] = tensors(artifact)
        return measuring(exporter, artifact, spec)

    def tensors(path: Path) -> dict[str, bytes]:
        return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}

    monkeypatch.setattr(frontier_points.Exporter, "_quality", looked_at)
    sweep([0.3], exports=("gguf:q4_0",), speed=None, refit=True)
    assert names("curve") == FILES
    api.prune("model", "expert.yaml", "expert", ratio=0.3, targets=TARGETS)
    quiet = {"quant": "q4_0", "verify": False}
    for side, folder in (("original", "model"), ("expert-0.3", "expert")):
        api.export(folder, f"{side}.gguf", expert="expert.yaml", **quiet)
        assert tensors(Path(f"{side}.gguf")) == seen[f"{side}-q4_0.gguf"]
    api.export("expert", "plain.gguf", options={"imatrix": False}, **quiet)
    assert tensors(Path("plain.gguf")) != seen["expert-0.3-q4_0.gguf"]


def test_without_speed_two_axes_are_left(work, cusprun) -> None:
    outcome = cusprun(*SWEEP, "--ratios", "0.3", "--export", "gguf:f32,gguf:f16", "--no-speed")
    assert outcome.code == 0, outcome
    report = report_of("curve")
    assert [point.speed for point in report.frontier] == [None] * 4
    assert report.speed_options is None
    page = Path("curve/sweep.md").read_text()
    assert "tokens/s" not in page.partition("## Exports")[2]
    for text in (page, outcome.out):
        for word in ("original gguf:f32", "0.3 gguf:f16", "dominated by", "bits per weight"):
            assert word in " ".join(text.split())
    # f16 is smaller for sure; where it is also measured no worse, f32 is greyed.
    quality = {point.name: point.corpora["held_out"].perplexity_ratio.value for point in report.frontier}
    for point in report.frontier:
        twin = point.name.replace("f32", "f16")
        if point.precision == "f32" and quality[twin] <= quality[point.name]:
            assert point.dominated_by is not None


def test_an_interrupted_sweep_goes_on_from_the_finished_exports(work, monkeypatch) -> None:
    stopped = Stopwatch("expert-0.5-q8_0.gguf", KeyboardInterrupt())
    exports = ("gguf:f32", "gguf:q8_0")
    with pytest.raises(KeyboardInterrupt):
        sweep([0.3, 0.5], exports=exports, measure=stopped)
    assert names("curve") == ["sweep.json"]
    halfway = report_of("curve")
    assert [point.name for point in halfway.frontier] == [
        "original gguf:f32", "original gguf:q8_0", "0.3 gguf:f32", "0.3 gguf:q8_0", "0.5 gguf:f32",
    ]  # fmt: skip
    watch = Stopwatch()
    report = sweep([0.3, 0.5], exports=exports, measure=watch)
    assert watch.asked == [("original-q8_0.gguf", "expert-0.5-q8_0.gguf", "llamacpp")]
    assert names("curve") == FILES
    by_name = {point.name: point for point in report.frontier}
    assert len(by_name) == 6
    for point in halfway.frontier:
        assert by_name[point.name].corpora == point.corpora
        assert by_name[point.name].seconds == point.seconds
    # Nothing is left, so nothing runs.
    monkeypatch.setattr(sweeping, "prune_opened", None)
    monkeypatch.setattr(frontier_points.Exporter, "_made", None)
    before = Path("curve/sweep.json").read_bytes()
    assert sweep([0.3, 0.5], exports=exports, measure=watch) == report
    assert Path("curve/sweep.json").read_bytes() == before


def test_exports_join_a_curve_that_is_there_and_twins_are_made_once(work) -> None:
    first = sweep([0.3], exports=())
    plain = json.loads(Path("curve/sweep.json").read_text())
    plain.pop("frontier")
    plain.pop("speed_options")
    Path("curve/sweep.json").write_text(json.dumps(plain))  # as it was before there were exports
    watch = Stopwatch()
    report = sweep([0.3, 0.3001], measure=watch)
    assert report.points[0] == first.points[0]
    assert [asked[1] for asked in watch.asked] == ["original-q8_0.gguf", "expert-0.3-q8_0.gguf"]
    _, one, other = report.frontier
    assert (one.ratio, other.ratio) == (0.3, 0.3001)
    assert (one.corpora, one.speed, one.file_bytes) == (other.corpora, other.speed, other.file_bytes)
    again = sweep([0.5], exports=())
    assert again.frontier == report.frontier
    assert [point.ratio for point in again.points] == [0.3, 0.3001, 0.5]


def test_an_export_that_fails_is_a_row_that_says_why_and_is_tried_again(work) -> None:
    lost = Stopwatch("expert-0.3-q8_0.gguf", MeasurementError(f"{work}/curve/x.gguf is\non fire"))
    report = sweep([0.3], exports=("gguf:f32", "gguf:q8_0"), measure=lost, keep=True)
    (failed,) = report.failures
    assert failed.name == "0.3 gguf:q8_0"
    assert failed.failure == "x.gguf is on fire"
    assert failed.speed is None
    assert failed.corpora
    assert failed.dominated_by is None
    assert f"not judged: {failed.failure}" in Path("curve/sweep.md").read_text()
    assert "expert-0.3-q8_0.gguf" not in names("curve")
    watch = Stopwatch()
    mended = sweep([0.3], exports=("gguf:f32", "gguf:q8_0"), measure=watch, keep=True)
    assert mended.failures == ()
    assert watch.asked == [("original-q8_0.gguf", "expert-0.3-q8_0.gguf", "llamacpp")]
    assert "expert-0.3-q8_0.gguf" in names("curve")


def test_a_refused_export_leaves_the_others_and_ends_with_3(work, cusprun, monkeypatch) -> None:
    """Unforeseen errors of a runtime, and exports that are refused, cost their own rows alone."""
    opened = frontier_points.RUNTIMES["gguf"].__class__.open

    def breaking(runtime, path, **options):
        if path.name == "expert-0.3-f16.gguf":
            raise RuntimeError(f"cannot read {path}")
        return opened(runtime, path, **options)

    monkeypatch.setattr(frontier_points.RUNTIMES["gguf"].__class__, "open", breaking)
    outcome = cusprun(*SWEEP, "--ratios", "0.3", "--export", "gguf:f16", "--export", "gguf:f32", "--no-speed")
    assert outcome.code == 3, outcome
    error = outcome.err.splitlines()[-1]
    assert "1 of 4 exports failed (0.3 gguf:f16)" in error
    assert "wrote curve" in outcome.out
    assert names("curve") == FILES
    reasons = [point.failure for point in report_of("curve").frontier]
    assert reasons == [None, None, "RuntimeError: cannot read expert-0.3-f16.gguf", None]


def test_a_model_that_a_format_cannot_hold_still_has_its_curve(work, cusprun) -> None:
    path = Path("model/config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    path.write_text(json.dumps({**config, "rope_parameters": rope}), encoding="utf-8")
    outcome = cusprun(*SWEEP, "--ratios", "0.3", "--export", "gguf:f16", "--no-speed")
    assert outcome.code == 3, outcome
    report = report_of("curve")
    assert len(report.points) == 1
    assert all("dynamic" in point.failure for point in report.frontier)
    assert [point.file_bytes for point in report.frontier] == [None, None]
    assert names("curve") == [name for name in FILES if name != "frontier.png"]


def test_other_speed_options_are_another_frontier(work) -> None:
    sweep([0.3], measure=Stopwatch())
    before = Path("curve/sweep.json").read_bytes()
    with pytest.raises(OutputError, match=r"time_limit_s 60.0 and not 5"):
        sweep([0.3], measure=Stopwatch(), speed=SpeedOptions(time_limit_s=5))
    with pytest.raises(OutputError, match="this call measures none"):
        sweep([0.5], speed=None)
    assert Path("curve/sweep.json").read_bytes() == before


def test_a_file_of_somebody_else_is_not_replaced(work) -> None:
    sweep([0.3], exports=())
    Path("curve/original-q8_0.gguf").write_text("mine")
    with pytest.raises(OutputError, match=r"original-q8_0.gguf exists and is not in sweep.json"):
        sweep([0.3], measure=Stopwatch(), keep=True)
    assert Path("curve/original-q8_0.gguf").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--export", "ggfu:q8_0"), "did you mean 'gguf'"),
        (("--export", "gguf:q9_0"), "did you mean 'q"),
        (("--export", "gguf"), "write FORMAT:PRECISION"),
        (("--export", "gguf:"), "write FORMAT:PRECISION"),
        (("--export", "gguf:q8_0,GGUF:Q8_0"), "named twice"),
        (("--export", "gguf:q8_0", "--time-limit", "0"), "time_limit_s must be above 0"),
        (("--time-limit", "5"), "leave it out"),
        (("--export", "gguf:q8_0", "--no-speed", "--time-limit", "5"), "leave it out"),
    ],
)
def test_exports_that_cannot_be_are_refused_before_any_work(work, cusprun, options, words) -> None:
    outcome = cusprun(*SWEEP, "--ratios", "0.3", *options)
    assert outcome.code == 2, outcome
    assert words in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not Path("curve").exists()
    assert not Path("cache").exists()


def test_a_missing_runtime_is_refused_before_any_work(work, cusprun, monkeypatch) -> None:
    from serve.runtimes import llamacpp

    def missing() -> None:
        raise MissingDependencyError("llama.cpp is not installed; run: pip install it")

    monkeypatch.setattr(llamacpp, "require", missing)
    outcome = cusprun(*SWEEP, "--ratios", "0.3", "--export", "gguf:q8_0")
    assert outcome.code == 2
    assert "pip install it" in outcome.err
    assert not Path("curve").exists()
    assert not Path("cache").exists()


@pytest.mark.slow
def test_the_whole_command_with_the_real_benchmark(work, cusprun) -> None:
    outcome = cusprun(*SWEEP, "--ratios", "0.3", "--export", "gguf:q8_0,onnx:int4", "--time-limit", "5")
    assert outcome.code == 0, outcome
    for point in report_of("curve").frontier:
        assert point.speed is not None
        assert point.speed.decode_tokens_per_second.median > 0
        assert point.speed.peak_memory_bytes > point.file_bytes
    assert names("curve") == FILES


@pytest.mark.vllm
def test_an_export_for_vllm_is_measured_in_vllm(work, monkeypatch) -> None:
    """One server is started: that of the original is left out, which takes as long again."""
    from tiny_exports import TinyConfig, make_folder

    made = Path(__file__).parents[2] / ".venv-vllm"  # which is looked for in the current folder
    if made.is_dir() and not os.environ.get(VLLM_VARIABLE):
        monkeypatch.setenv(VLLM_VARIABLE, str(made))
    sizes = {"hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": True}
    shutil.rmtree("model")
    make_folder(work / "model", TinyConfig("llama", sizes))
    opening = frontier_points.RUNTIMES["vllm"].__class__.open

    def opened(runtime, path, **options):
        if path.name.startswith("original"):
            raise MeasurementError("left out")
        return opening(runtime, path, **options)

    monkeypatch.setattr(frontier_points.RUNTIMES["vllm"].__class__, "open", opened)
    report = api.sweep(
        "model", "expert.yaml", [0.3], "curve", targets=("vllm:tp1",), exports=("vllm:float32",), speed=None,
        keep=True,
    )  # fmt: skip
    corpora = build_corpora(load_expert(Path("expert.yaml")), Path("model"))
    original, expert = report.frontier
    assert original.failure == "left out"
    assert expert.failure is None
    for name, documents in (("held_out", corpora.held_out), ("general", corpora.general)):
        exact = torch_perplexity("curve/expert-0.3", documents)
        assert expert.corpora[name].perplexity.value == pytest.approx(exact, rel=1e-3)
