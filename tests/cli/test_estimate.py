"""What a prune will take, worked out from its first blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import documents, save_model

import cusprun as api
from cusprun.checkpoint.index import open_checkpoint
from cusprun.cli.console import duration
from cusprun.codec import load_json
from cusprun.pipeline.trial import first_blocks, num_tokens, predicted_seconds, spread
from cusprun.records import Corpora, Manifest
from cusprun.walk.shell import DecoderShell

ASK = ("prune", "model", "--expert", "expert.yaml", "--estimate", "--for", "gguf:f16")
_seconds = st.floats(0, 100)


@given(
    once=_seconds, per_token=_seconds, block=_seconds, block_token=_seconds,
    layers=st.integers(2, 200), tokens=st.integers(1, 10**6), few=st.integers(1, 999),
    more=st.integers(1000, 5000), most=st.integers(2, 4),
)  # fmt: skip
def test_one_block_and_several_with_few_and_more_tokens_tell_the_whole(
    once: float, per_token: float, block: float, block_token: float,
    layers: int, tokens: int, few: int, more: int, most: int,
) -> None:  # fmt: skip
    def took(count: int, size: int) -> float:
        return once + per_token * size + count * (block + block_token * size)

    whole = {(count, size): took(count, size) for count in (1, most) for size in (few, more)}
    assert predicted_seconds(whole, layers, tokens) == pytest.approx(took(layers, tokens), rel=1e-6, abs=1e-6)
    known = {(count, tokens): took(count, tokens) for count in (1, most)}
    for tried in (known, {(1, tokens + 1): 1e6, **known}):
        found = predicted_seconds(tried, layers, tokens)
        assert found == pytest.approx(took(layers, tokens), rel=1e-6, abs=1e-6)
    alone = {(1, size): took(1, size) for size in (few, more)}
    assert predicted_seconds(alone, 1, tokens) == pytest.approx(took(1, tokens), rel=1e-6, abs=1e-6)


def test_noise_never_makes_time_negative() -> None:
    times = {(1, 10): 3.0, (2, 10): 2.0, (1, 20): 1.0, (2, 20): 0.5}
    assert predicted_seconds(times, 100, 10**6) >= 0


@given(tokens=st.integers(1, 2000))
def test_a_part_of_the_documents_has_tokens_enough_and_all_lengths(tokens: int) -> None:
    texts = documents(60)
    chosen = spread(texts, tokens)
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(texts)
    assert num_tokens(chosen) >= min(tokens, num_tokens(texts)) * 0.6
    if tokens >= num_tokens(texts):
        assert len(chosen) == len(texts)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-sliding-biased"])
def test_the_first_blocks_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model", family))
    view = first_blocks(index, 2)
    assert view.config["num_hidden_layers"] == 2
    assert len(view.config.get("layer_types") or [0, 0]) == 2
    gone = {name for name in index.tensors if ".layers.2." in name}
    assert set(view.tensors) == set(index.tensors) - gone
    for layer in range(2):
        blocks = (DecoderShell(each).load_block(layer).state_dict() for each in (index, view))
        one, other = blocks
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)


def test_an_estimate_is_told_and_leaves_nothing(work: Path, cusprun: Any) -> None:
    before = {path: path.stat().st_size for path in work.rglob("*") if path.is_file()}
    outcome = cusprun(*ASK, "--out", "out", "--json", "estimate.json")
    assert outcome.code == 0, outcome
    told = json.loads(Path("estimate.json").read_text())
    Path("estimate.json").unlink()
    assert {path: path.stat().st_size for path in work.rglob("*") if path.is_file()} == before
    assert not Path("out").exists()
    assert [stage["name"] for stage in told["stages"]] == [
        "start, open and hash", "score", "plan", "refit and write", "measure",
    ]  # fmt: skip
    assert told["seconds"] == pytest.approx(sum(stage["seconds"] for stage in told["stages"]))
    assert told["memory_bytes"] == max(stage["memory_bytes"] for stage in told["stages"])
    assert duration(told["seconds"]) in outcome.out
    assert "From 2 of 2 blocks" in outcome.out


@pytest.mark.parametrize(("seconds", "share"), [(1.0, 1.0), (100.0, 0.5)])
def test_a_quick_block_is_tried_on_all_documents_and_a_slow_one_on_a_part(
    seconds: float, share: float, work: Path
) -> None:
    from cusprun.pipeline.estimate import SCORE, _Trial
    from cusprun.pipeline.opening import open_model
    from cusprun.pipeline.wishes import PruneWishes

    texts = documents(600)
    every = num_tokens(texts)
    trial = _Trial(open_model("model"), Corpora(texts, ()), PruneWishes(ratio=0.25), work)
    trial.least_tokens = every // 5
    first = trial._parts(SCORE, texts)
    few = next(first)
    assert num_tokens(few) == pytest.approx(trial.least_tokens, rel=0.2)
    trial.times[SCORE] = {(1, num_tokens(few)): seconds}
    more = next(first)
    assert num_tokens(more) == pytest.approx(share * every, rel=0.1)
    assert next(first, None) is None
    assert list(trial._parts(SCORE, texts)) == ([more] if share == 1 else [few, more])


def test_the_disk_is_what_pruning_leaves(work: Path, cusprun: Any) -> None:
    save_layers(work / "deep", 5)
    told = api.estimate("deep", "expert.yaml", targets=["gguf:f16"], ratio=0.3)
    manifest = api.prune("deep", "expert.yaml", "out", targets=["gguf:f16"], ratio=0.3)
    assert isinstance(manifest, Manifest)
    assert told.disk.expert_bytes == manifest.measurements["weight_bytes_after"]
    assert told.tokens == manifest.calibration_tokens
    assert (told.blocks, told.measured_blocks) == (5, 3)
    (store,) = (work / "cache" / "scores").iterdir()
    written = sum(path.stat().st_size for path in store.glob("*.safetensors"))
    assert 0.6 * written < told.disk.scores_bytes <= written  # headers are large beside tiny arrays
    assert told.disk_bytes >= told.disk.expert_bytes + told.disk.scores_bytes


def save_layers(folder: Path, count: int) -> None:
    from tiny_exports import TinyConfig, make_folder

    make_folder(folder, TinyConfig("llama", {"tie_word_embeddings": True, "num_hidden_layers": count}))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--max-loss", "5%"), "leave out --max-loss"),
        (("--granularity", "neuron", "--plan", "p.json"), "leave out --plan and --granularity"),
        (("--units", "block"), "leave out 'block'"),
        (("--memory", "90MB"), "is too little for"),
        (("--memory", "lots"), "'lots' is not a number"),
        (("--ratio", "2"), "the ratio 2"),
        (("--json", "expert.yaml"), "exists already"),
    ],
)
def test_what_cannot_be_estimated_is_refused(work: Path, cusprun: Any, options: Any, told: str) -> None:
    outcome = cusprun(*ASK, *options)
    assert outcome.code == 2
    assert told in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_without_a_folder_or_with_a_report_there_is_no_prune(work: Path, cusprun: Any) -> None:
    ask = ("prune", "model", "--expert", "expert.yaml")
    assert "name it with --out" in cusprun(*ask).err
    assert "is for --estimate" in cusprun(*ask, "--out", "out", "--json", "x.json").err
    assert not Path("out").exists()


def test_a_budget_of_memory_is_kept_and_refused_before_work(work: Path, cusprun: Any) -> None:
    ask = ("prune", "model", "--expert", "expert.yaml", "--for", "gguf:f16", "--out", "out", "--memory")
    outcome = cusprun(*ask, "100MB")
    assert outcome.code == 2
    assert "takes at least" in outcome.err
    assert not (work / "cache" / "scores").exists()
    least = outcome.err.split("takes at least ")[1].split(" (")[0].replace(" ", "")
    outcome = cusprun(*ask, least)
    assert outcome.code == 0, outcome
    assert load_json(Manifest, Path("out/cusprun.json")).plan.block_ratio >= 0.25
    for command in (("eval", "model"), ("sweep", "model", "--ratios", "0.3", "--out", "curve")):
        outcome = cusprun(*command, "--expert", "expert.yaml", "--memory", "100MB")
        assert outcome.code == 2
        assert "takes at least" in outcome.err
    assert not Path("curve").exists()
    neuron = cusprun(*ask[:4], "--out", "other", "--granularity", "neuron", "--memory", "1GB")
    assert neuron.code == 2
    assert "leave it out" in neuron.err
