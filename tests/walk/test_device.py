"""Devices: names, refusals, that nothing is left on the host, and what follows when memory is short."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_checks import CORPORA, EXPERT, LONG, Heard, assert_close_entries, planned, short_of_memory
from elsewhere import ELSEWHERE, elsewhere
from tiny import save_model

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.errors import ConfigError, DeviceError
from cusprun.pipeline.opening import OpenModel
from cusprun.pipeline.stages import scored
from cusprun.pruning import inputs
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.neuron_score import score_neurons
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.rewrite import write_weights
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.quality.likelihood import measure_likelihood
from cusprun.recipe import load_recipe
from cusprun.records import Corpora
from cusprun.walk.device import CPU, Device, check_device, open_device
from cusprun.walk.fallback import Batching, with_smaller_batches
from cusprun.walk.importance import importance_of
from cusprun.walk.shell import DecoderShell

FAMILIES = ("llama-untied-biased", "gemma3", "phi3-partial-rotary")
"""Biases and a head of its own; norms behind projections, windows and a tied head; fused projections."""


@pytest.fixture(scope="module", params=FAMILIES)
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return open_checkpoint(save_model(tmp_path_factory.mktemp("model") / "model", request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return open_checkpoint(save_model(tmp_path_factory.mktemp("llama") / "model"))


def test_a_forgotten_transfer_would_be_seen() -> None:
    with elsewhere() as away:
        put, host = ELSEWHERE.put(torch.ones(3)), torch.ones(3)
        assert put.device.type == "ipu"
        assert away.operations == 0
        assert ELSEWHERE.fetch(put + put).tolist() == [2, 2, 2]
        for wrong in (lambda: put + host, lambda: put[host > 0], lambda: torch.stack([put, host])):
            with pytest.raises(AssertionError, match="two devices"):
                wrong()
        with pytest.raises(RuntimeError):
            put.numpy()


@pytest.mark.parametrize("score", [score_model, score_neurons])
def test_scores_are_computed_on_the_device(
    index: CheckpointIndex, tmp_path: Path, score: Callable[..., Path]
) -> None:
    score(index, CORPORA, tmp_path / "host", model_hash="m", corpus_hash="c")
    with elsewhere() as away:
        score(index, CORPORA, tmp_path / "away", model_hash="m", corpus_hash="c", device=ELSEWHERE)
    assert away.operations > 500
    assert_close_entries(tmp_path / "host", tmp_path / "away")
    stores = [open_store(tmp_path / name) for name in ("host", "away")]
    assert [store.infos[0].device for store in stores] == ["cpu", "ipu"]
    assert stores[0].store_hash != stores[1].store_hash


@pytest.mark.parametrize("rule", ["mean", "surgeon", "variance+bias"])
def test_the_refit_is_collected_and_solved_on_the_device(
    index: CheckpointIndex, tmp_path: Path, rule: str
) -> None:
    if rule == "variance+bias" and index.family.model_type != "llama":
        pytest.skip("no place for biases")
    score_model(index, CORPORA, tmp_path / "store", model_hash="m", corpus_hash="c")
    plan = planned(index, tmp_path / "store", rule)
    settings = RefitSettings(
        mode="bias" if rule == "variance+bias" else "refit", revise=rule == "surgeon", anchors=40
    )
    for name, device in (("host", CPU), ("away", ELSEWHERE)):
        (tmp_path / name).mkdir()
        with elsewhere() as away:
            written = write_weights(
                index, plan, tmp_path / name, CORPORA.calibration, settings=settings, device=device
            )
        assert (away.operations > 500) is (device is ELSEWHERE)
        if device is CPU:
            wanted = written
    assert written.layers == wanted.layers
    assert_close_entries(tmp_path / "host", tmp_path / "away")


def test_quality_and_importance_are_measured_on_the_device(index: CheckpointIndex, tmp_path: Path) -> None:
    other = open_checkpoint(save_model(tmp_path / "other", "llama", seed=1))
    wanted = measure_likelihood(index, CORPORA.held_out, other)
    ids = [document.token_ids for document in CORPORA.held_out]
    means = importance_of(index, ids)
    with elsewhere() as away:
        found = measure_likelihood(index, CORPORA.held_out, other, device=ELSEWHERE)
        operations, away.operations = away.operations, 0
        found_means = importance_of(index, ids, device=ELSEWHERE)
    assert min(operations, away.operations) > 100
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.negative_log_likelihood == pytest.approx(theirs.negative_log_likelihood, rel=1e-5)
        assert ours.kl_divergence == pytest.approx(theirs.kl_divergence, rel=1e-4)
        assert ours.top1_agreements == theirs.top1_agreements
    assert found_means.keys() == means.keys()
    for name, mean in means.items():
        torch.testing.assert_close(torch.from_numpy(found_means[name]), torch.from_numpy(mean))


def test_an_expert_says_what_it_was_made_on(llama: CheckpointIndex, tmp_path: Path) -> None:
    score_model(llama, CORPORA, tmp_path / "store", model_hash="m", corpus_hash="c")
    plan = planned(llama, tmp_path / "store")
    provenance = Provenance("tiny", "m", "c", EXPERT, {})
    with elsewhere():
        there = write_expert(
            llama, plan, tmp_path / "away", corpora=CORPORA, provenance=provenance, device=ELSEWHERE
        )
    here = write_expert(llama, plan, tmp_path / "host", corpora=CORPORA, provenance=provenance)
    assert there.versions["device"] == "ipu:0"
    assert "device" not in here.versions
    assert there.measurements["held_out"] == pytest.approx(here.measurements["held_out"], rel=1e-4)


def test_memory_that_is_short_once_means_smaller_batches(
    llama: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Corpora(tuple(replace(LONG, text_hash=str(number)) for number in range(20)), ())
    score_model(llama, many, tmp_path / "wanted", model_hash="m", corpus_hash="c")
    calls = short_of_memory(monkeypatch, DecoderShell, "run", times=1, after=3)
    heard = Heard()
    score_model(llama, many, tmp_path / "found", model_hash="m", corpus_hash="c", progress=heard)
    assert heard.stages == ["scoring", "scoring, again in smaller batches because cpu ran out of memory"]
    assert calls[0] == 4 + 3 * 5  # 4 documents of 110 tokens in 512, and three blocks
    assert_close_entries(tmp_path / "wanted", tmp_path / "found")


def work_of(name: str, index: CheckpointIndex, out: Path) -> Callable[[], object]:
    provenance = Provenance("tiny", "m", "c", EXPERT, {})
    if name == "prune":
        store = score_model(index, CORPORA, out.parent / "store", model_hash="m", corpus_hash="c")
        plan = planned(index, store)
        return lambda: write_expert(index, plan, out, corpora=CORPORA, provenance=provenance)
    ids = [document.token_ids for document in CORPORA.held_out]
    return {
        "units": lambda: score_model(index, CORPORA, out, model_hash="m", corpus_hash="c"),
        "neurons": lambda: score_neurons(index, CORPORA, out, model_hash="m", corpus_hash="c"),
        "quality": lambda: measure_likelihood(index, CORPORA.held_out),
        "importance": lambda: importance_of(index, ids),
    }[name]


def test_what_a_library_of_the_device_says_of_its_memory_counts_too() -> None:
    tried: list[int] = []

    def work(batching: Batching) -> int:
        tried.append(batching.tokens)
        if len(tried) == 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return batching.share_of(3)

    assert with_smaller_batches(CPU, work) == 1
    assert tried == [2048, 512]
    with pytest.raises(RuntimeError, match="another fault"):
        with_smaller_batches(CPU, lambda _batching: fail("another fault"))


def fail(text: str) -> None:
    raise RuntimeError(text)


@pytest.mark.parametrize("name", ["units", "neurons", "prune", "quality", "importance"])
def test_memory_that_stays_short_is_refused(
    name: str, llama: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(name, llama, tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    short_of_memory(monkeypatch, DecoderShell, "run", times=1000)
    with pytest.raises(DeviceError, match="too little memory") as caught:
        work()
    assert caught.value.exit_code == 2
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("function", ["refit", "choose_channels"])
def test_what_the_device_cannot_solve_the_host_does(
    function: str,
    llama: CheckpointIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    score_model(llama, CORPORA, tmp_path / "store", model_hash="m", corpus_hash="c")
    plan = planned(llama, tmp_path / "store", "surgeon")
    for name in ("wanted", "found"):
        (tmp_path / name).mkdir()
    settings = RefitSettings(revise=True)
    write_weights(llama, plan, tmp_path / "wanted", CORPORA.calibration, settings=settings)
    short_of_memory(monkeypatch, inputs, function, times=1)
    with elsewhere(), caplog.at_level(logging.INFO, "cusprun"):
        write_weights(
            llama, plan, tmp_path / "found", CORPORA.calibration, settings=settings, device=ELSEWHERE
        )
    assert "too little memory to solve" in caplog.text
    assert_close_entries(tmp_path / "wanted", tmp_path / "found")


def test_scores_in_the_cache_are_kept_apart_by_kind_of_device(
    llama: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path))
    digest = model_hash(llama)

    def store_on(device: Device) -> Path:
        with elsewhere():
            return scored(OpenModel(llama, digest, "tiny", device), EXPERT, CORPORA, Heard())

    host, away = store_on(CPU), store_on(ELSEWHERE)
    assert host != away
    assert store_on(CPU) == host
    assert store_on(Device("ipu:1")) == away  # found, for "ipu:1" is no device


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", "cpu:0", "mps", 3])
def test_an_unknown_device_is_refused_with_those_that_are_known(name: Any) -> None:
    for refuse in (check_device, open_device):
        with pytest.raises(DeviceError, match=r"cuda:N|must be text") as caught:
            refuse(name)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(("version", "says"), [(None, "built without CUDA"), ("13.0", "cusprun doctor")])
def test_cuda_that_is_not_there_is_refused_and_auto_takes_the_cpu(
    version: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", None)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(DeviceError, match=says):
            open_device(name)
    assert open_device("auto") == CPU
    assert open_device("cpu") == CPU


def test_a_number_that_is_not_there_and_a_gpu_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"no device cuda:2: torch sees 2 .cuda:0 to cuda:1.; take one"):
        open_device("cuda:2")

    def broken(*_sizes: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(DeviceError, match=r"cuda:1 does not work .*no kernel image is available for"):
        open_device("cuda:1")
    assert open_device("auto") == CPU


def test_every_command_that_runs_a_model_takes_a_device() -> None:
    import typer

    from cusprun.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    taking = {name for name, command in commands.items() if any("--device" in p.opts for p in command.params)}
    assert taking == {"score", "prune", "sweep", "eval", "export", "run"}
    rounding = {
        name for name, command in commands.items() if any("--dtype" in p.opts for p in command.params)
    }
    assert rounding - {"import-gguf"} == {"score", "prune", "sweep"}  # where it is what is written


def test_a_recipe_names_a_device(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = "model: m\nexpert: e.yaml\nout: out\n"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path).device == "cpu"
    path.write_text(f"{text}device: cuda:1\n", encoding="utf-8")
    assert load_recipe(path).device == "cuda:1"
    path.write_text(f"{text}device: cude\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        load_recipe(path)
