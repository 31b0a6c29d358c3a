"""The real worker on a tiny GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest

from cusprun.errors import ModelError
from serve.bench.metrics import metrics_of
from serve.bench.orchestrate import Target, bench
from serve.bench.records import BenchOptions

pytest.importorskip("llama_cpp")
FAST = BenchOptions(
    prompt_lengths=(16,), context_depths=(8, 24), num_decode_tokens=12, num_pairs=2, num_threads=1
)


def test_two_files_end_to_end(tmp_path: Path, write_tiny_gguf) -> None:
    wide, narrow = tmp_path / "wide.gguf", tmp_path / "narrow.gguf"
    parameters = write_tiny_gguf(wide), write_tiny_gguf(narrow, intermediate_size=32)
    report = bench([Target("llamacpp", wide, narrow)], FAST)
    (suite,) = report.suites
    assert (suite.before.num_parameters, suite.after.num_parameters) == parameters
    assert (suite.before.file_bytes, suite.after.file_bytes) == (wide.stat().st_size, narrow.stat().st_size)
    assert suite.num_pairs == 2
    assert not suite.lost_runs
    assert suite.context_length is not None
    assert suite.context_length >= 36
    assert "llama.cpp" in suite.library
    uncounted = {"prompt_energy_joules_per_token", "decode_energy_joules_per_token"}
    for run in suite.runs:
        assert {metric.name for metric in metrics_of(FAST)} - set(run.values) <= uncounted
        assert all(value > 0 for value in run.values.values())
        for depth in FAST.context_depths:
            shares = [run.values[f"inter_token_latency_{name}_ms@{depth}"] for name in ("p50", "p90", "p99")]
            assert shares == sorted(shares)
        assert run.values["peak_memory_bytes"] >= run.values["steady_memory_bytes"] > 10_000_000
        sizes = {"before": suite.before.file_bytes, "after": suite.after.file_bytes}
        assert run.values["mapped_file_resident_bytes"] <= sizes[run.side] + 8192  # whole pages


def test_a_text_is_tokenised_by_the_model(tmp_path: Path, write_tiny_gguf) -> None:
    from serve.bench.engines.llamacpp import LlamaCppEngine
    from serve.bench.measurement import Job

    file = tmp_path / "m.gguf"
    write_tiny_gguf(file)
    engine = LlamaCppEngine()
    engine.load(Job("llamacpp", str(file), (4,), (4,), 4, None, 1, 0))
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
        bench([Target("llamacpp", cut, cut)], FAST)
    assert "\n" not in str(caught.value)
