"""The real worker on a tiny GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest

from cusprun.errors import ModelError
from serve.bench.orchestrate import bench
from serve.bench.records import METRICS, BenchOptions, metric_value

pytest.importorskip("llama_cpp")
FAST = BenchOptions(num_prompt_tokens=16, num_decode_tokens=12, num_pairs=2, num_threads=1)


def test_two_files_end_to_end(tmp_path: Path, write_tiny_gguf) -> None:
    wide, narrow = tmp_path / "wide.gguf", tmp_path / "narrow.gguf"
    parameters = write_tiny_gguf(wide), write_tiny_gguf(narrow, intermediate_size=32)
    report = bench(wide, narrow, FAST)
    assert (report.before.num_parameters, report.after.num_parameters) == parameters
    assert (report.before.file_bytes, report.after.file_bytes) == (wide.stat().st_size, narrow.stat().st_size)
    assert report.num_pairs == 2
    assert not report.lost_runs
    assert report.context_length >= 28
    assert "llama.cpp" in report.environment.runtime
    for run in report.runs:
        assert all(metric_value(run, metric.name) > 0 for metric in METRICS)
        assert (
            run.inter_token_latency_p50_ms <= run.inter_token_latency_p90_ms <= run.inter_token_latency_p99_ms
        )
        assert run.peak_memory_bytes > 10_000_000


def test_a_text_is_tokenised_by_the_model(tmp_path: Path, write_tiny_gguf) -> None:
    from serve.bench.llamacpp_engine import LlamaCppEngine
    from serve.bench.records import Job

    file = tmp_path / "m.gguf"
    write_tiny_gguf(file)
    engine = LlamaCppEngine()
    engine.load(Job(str(file), 4, 4, 4, None, 1, 0))
    try:
        # <s>, the space that SentencePiece puts in front, then one byte token (3 + byte) per letter
        assert engine.tokenize("hi") == [1, 259, 3 + ord("h"), 3 + ord("i")]
        engine.forward([1, 2, 3])
        assert 0 <= engine.choose() < engine.num_vocabulary == 260
    finally:
        engine.close()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_cut_file_is_the_users_fault_in_one_sentence(tmp_path: Path, write_tiny_gguf, share: float) -> None:
    good, cut = tmp_path / "good.gguf", tmp_path / "cut.gguf"
    write_tiny_gguf(good)
    cut.write_bytes(good.read_bytes()[: int(share * good.stat().st_size)])
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load .*cut\.gguf") as caught:
        bench(cut, cut, FAST)
    assert "\n" not in str(caught.value)
