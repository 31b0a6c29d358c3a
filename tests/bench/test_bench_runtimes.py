"""Every runtime of the benchmark on a tiny model, in its real library."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cusprun.errors import ModelError, UserError
from serve.bench.engines import ENGINES
from serve.bench.measurement import Job
from serve.bench.orchestrate import Target, bench
from serve.bench.records import BenchOptions, Suite

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))

FAST = BenchOptions(
    prompt_lengths=(16,), context_depths=(8,), num_decode_tokens=6, num_pairs=1, num_threads=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_exports import TinyConfig, make_folder

    return make_folder(tmp_path_factory.mktemp("bench") / "tiny", TinyConfig("llama"))


def require_whole(suite: Suite) -> None:
    """Every metric is there and possible, and the tokens that were asked for were made."""
    assert suite.failure is None
    for run in suite.runs:
        assert all(value > 0 for value in run.values.values())
        assert (
            run.values["time_to_first_token_ms@16"] >= 1000 * 16 / run.values["prompt_tokens_per_second@16"]
        )
        assert "decode_tokens_per_second@8" in run.values
        assert run.values["peak_memory_bytes"] > 1e7


def test_torch(folder: Path) -> None:
    (suite,) = bench([Target("torch", folder, folder)], FAST).suites
    require_whole(suite)
    assert "float32" in suite.library
    assert suite.before.num_parameters == suite.after.num_parameters


def test_torchs_cache_holds_what_the_whole_text_would_give(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from serve.bench.engines.torch import TorchEngine

    engine = TorchEngine()
    engine.load(Job("torch", str(folder), (4,), (4,), 2, None, 1, 0))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        for _ in range(2):
            engine.clear()
            engine.forward([5, 9, 40])
            engine.forward([7])
            expected = whole(input_ids=torch.tensor([[5, 9, 40, 7]])).logits[0, -1]
            assert engine.choose() == int(expected.argmax())
            torch.testing.assert_close(engine._last_logits, expected)
    engine.close()


def test_onnx(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("onnx_ir")
    from exporters.registry import format_of

    out = format_of("onnx").export(folder, tmp_path / "m-onnx", quant="fp32")
    (suite,) = bench([Target("onnx", out, out)], FAST).suites
    require_whole(suite)
    config = json.loads((out / "genai_config.json").read_text())
    config["model"]["context_length"] = 12
    (out / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"takes 12 tokens and the benchmark needs 23"):
        bench([Target("onnx", out, out)], FAST)


@pytest.mark.vllm
def test_vllm(tmp_path: Path) -> None:
    """One server, in this process's charge; the others start two."""
    import time

    from tiny_exports import make_folder
    from tiny_vllm import FAMILIES

    from exporters.registry import format_of
    from serve.bench.engines.vllm import VllmEngine
    from serve.bench.stepping import Gauges
    from serve.bench.worker import measure

    folder = make_folder(tmp_path / "tiny", FAMILIES["qwen3"])
    out = format_of("vllm").export(folder, tmp_path / "m-vllm", quant="float32")
    gauges = Gauges(time.perf_counter, lambda: None)
    measured = measure(VllmEngine(), Job.of("vllm", str(out), FAST, 1), gauges)
    assert [len(timing.latencies_s) for timing in measured.timings] == [6, 0]
    assert all(0 < timing.prefill_s <= timing.first_token_s for timing in measured.timings)
    assert all(latency > 0 for latency in measured.timings[0].latencies_s)
    assert measured.library.startswith("vllm ")
    assert measured.memory.peak_bytes > 3e8  # the server's too


def test_every_runtime_of_the_pipeline_is_an_engine() -> None:
    from cusprun.pipeline.bench import WANTED

    assert set(WANTED) == set(ENGINES)


@pytest.mark.parametrize(
    ("runtimes", "quants", "said"),
    [
        ((), {}, "no runtime was named"),
        (("lamacpp",), {}, "unknown runtime 'lamacpp'; did you mean 'llamacpp'"),
        (("llamacpp",), {"guff": "q8_0"}, "unknown export format 'guff'; did you mean 'gguf'"),
        (("llamacpp",), {"gguf": "q8"}, "unknown gguf precision 'q8'"),
        (("llamacpp",), {"onnx": "int4"}, "--runtime does not name onnx"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(runtimes, quants, said: str) -> None:
    from cusprun.pipeline.bench import bench as measure

    with pytest.raises(UserError) as caught:
        measure("no/model", "no/model", runtimes=runtimes, quants=quants)
    assert said in str(caught.value)


def test_precisions_are_read_by_format() -> None:
    from cusprun.pipeline.bench import parse_quants

    assert parse_quants(["q4_k_m", "onnx:int8"]) == {"gguf": "q4_k_m", "onnx": "int8"}
    with pytest.raises(UserError, match="given twice, q8_0 and f16"):
        parse_quants(["q8_0", "gguf:f16"])
