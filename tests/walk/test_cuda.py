"""The walk on a CUDA device against the same walk on the CPU.

Rounding alone moves the impacts of these models by some 1e-6 of their size, as other batches on the CPU do.
What is allowed is far above that and below what TF32 costs, some 1e-3.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from device_checks import (
    CORPORA,
    EXPERT,
    Heard,
    assert_close_entries,
    assert_close_norms,
    planned,
    short_of_memory,
)
from tiny import save_model

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.errors import DeviceError
from cusprun.pipeline.neurons import prune_neurons
from cusprun.pipeline.opening import OpenModel
from cusprun.pipeline.stages import prune_opened
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning import refit_walk
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.neuron_plan import make_neuron_plan
from cusprun.pruning.neuron_score import score_neurons
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.rewrite import write_weights
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.quality.likelihood import measure_likelihood, perplexity
from cusprun.records import Corpora, Expert, Plan, TokenizedDocument
from cusprun.walk.device import CPU, Device, open_device
from cusprun.walk.importance import importance_of
from cusprun.walk.shell import DecoderShell

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

FAMILIES = ("llama", "gemma3", "phi3-partial-rotary", "qwen3-sliding-biased")
RELATIVE, OF_LARGEST = 1e-4, 1e-5
"""What an entry may differ by: of itself, and of the largest of its array."""
WEIGHTS = 1e-3
"""What refit weights may differ by, as a norm: solving multiplies the rounding of a Gram matrix."""


@dataclass(frozen=True)
class Subject:
    """A tiny model, and its stores of units and of neurons from the CPU."""

    index: CheckpointIndex
    digest: str
    units: Path
    neurons: Path

    def plan(self, store: Path, rule: str = "mean") -> Plan:
        return planned(self.index, store, rule, self.digest)


@pytest.fixture(scope="module")
def cuda() -> Device:
    return open_device("cuda")


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    root = tmp_path_factory.mktemp("subject")
    index = open_checkpoint(save_model(root / "model", request.param))
    digest = model_hash(index)
    for name, score in (("units", score_model), ("neurons", score_neurons)):
        score(index, CORPORA, root / name, model_hash=digest, corpus_hash="c")
    return Subject(index, digest, root / "units", root / "neurons")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))


def test_the_device_is_found_by_all_of_its_names(cuda: Device) -> None:
    assert cuda.name == "cuda:0"
    assert open_device("cuda:0") == open_device("auto") == cuda
    assert cuda.key == ("cuda",)
    assert torch.cuda.get_device_name(0) in cuda.label
    with pytest.raises(DeviceError, match="no device cuda:99"):
        open_device("cuda:99")


def test_units_have_the_impacts_and_the_plan_of_the_cpu(
    subject: Subject, cuda: Device, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    score_model(subject.index, CORPORA, out, model_hash=subject.digest, corpus_hash="c", device=cuda)
    assert_close_entries(out, subject.units, RELATIVE, OF_LARGEST)
    found, wanted = subject.plan(out), subject.plan(subject.units)
    assert found.layers == wanted.layers
    assert (found.after, found.kept_blocks) == (wanted.after, wanted.kept_blocks)
    assert found.store_hash != wanted.store_hash


def test_neurons_have_the_impacts_and_the_plan_of_the_cpu(
    subject: Subject, cuda: Device, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    score_neurons(subject.index, CORPORA, out, model_hash=subject.digest, corpus_hash="c", device=cuda)
    assert_close_entries(out, subject.neurons, RELATIVE, OF_LARGEST)
    plans = [
        make_neuron_plan(
            subject.index, open_store(store), model_hash=subject.digest, ratio=0.25, rule="paper"
        )
        for store in (out, subject.neurons)
    ]
    assert [layer.removed for layer in plans[0].layers] == [layer.removed for layer in plans[1].layers]


def test_two_runs_give_the_same_bytes(subject: Subject, cuda: Device, tmp_path: Path) -> None:
    plan = subject.plan(subject.units, "surgeon")
    digests = []
    for name in ("one", "two"):
        store, weights = tmp_path / f"{name}-store", tmp_path / name
        score_model(subject.index, CORPORA, store, model_hash="m", corpus_hash="c", device=cuda)
        weights.mkdir()
        settings = RefitSettings(revise=True, anchors=40)
        write_weights(subject.index, plan, weights, CORPORA.calibration, settings=settings, device=cuda)
        digests.append(
            [
                hashlib.sha256(path.read_bytes()).hexdigest()
                for folder in (store, weights)
                for path in sorted(folder.iterdir())
            ]
        )
    assert digests[0] == digests[1]


@pytest.mark.parametrize("target", ["output", "residual"])
def test_refit_weights_are_those_of_the_cpu(
    subject: Subject, target: str, cuda: Device, tmp_path: Path
) -> None:
    if target == "residual" and subject.index.family.normalises_outputs:
        pytest.skip("a norm stands behind its projections")
    plan = subject.plan(subject.units)
    reports = []
    for name, device in (("host", CPU), ("cuda", cuda)):
        (tmp_path / name).mkdir()
        written = write_weights(
            subject.index,
            plan,
            tmp_path / name,
            CORPORA.calibration,
            settings=RefitSettings(anchors=40, target=target),
            device=device,
        )
        reports.append(written.reports)
    assert_close_norms(tmp_path / "cuda", tmp_path / "host", WEIGHTS)
    for found, wanted in zip(reports[1], reports[0], strict=True):
        assert found.ridge == wanted.ridge
        assert found.relative_error_after == pytest.approx(wanted.relative_error_after, rel=1e-3)


def test_biases_are_those_of_the_cpu(cuda: Device, tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model", "llama"))
    score_model(index, CORPORA, tmp_path / "store", model_hash="m", corpus_hash="c")
    plan = planned(index, tmp_path / "store", "variance+bias")
    for name, device in (("host", CPU), ("cuda", cuda)):
        (tmp_path / name).mkdir()
        settings = RefitSettings(mode="bias")
        write_weights(index, plan, tmp_path / name, CORPORA.calibration, settings=settings, device=device)
    assert_close_norms(tmp_path / "cuda", tmp_path / "host", WEIGHTS)


@pytest.mark.parametrize("rule", ["mean", "surgeon"])
def test_a_whole_prune_gives_the_expert_of_the_cpu(
    subject: Subject, rule: str, cuda: Device, tmp_path: Path
) -> None:
    made = {}
    for name, device in (("host", CPU), ("cuda", cuda)):
        opened = OpenModel(subject.index, subject.digest, "tiny", device)
        wishes = PruneWishes(ratio=0.4, rule=rule, targets=("gguf:f16",))
        made[name] = prune_opened(opened, EXPERT, CORPORA, tmp_path / name, wishes)
    found, wanted = made["cuda"], made["host"]
    assert len(list((tmp_path / "cache" / "scores").iterdir())) == 2  # the CPU's scores were not taken
    assert found.versions["device"].startswith("cuda:0")
    assert found.plan.after == wanted.plan.after
    ours, theirs = found.measurements["held_out"], wanted.measurements["held_out"]
    assert ours["perplexity_before"] == pytest.approx(theirs["perplexity_before"], rel=1e-4)
    if rule == "mean":
        assert found.plan.layers == wanted.plan.layers
        assert_close_norms(tmp_path / "cuda", tmp_path / "host", WEIGHTS)
    # What the surgeon chooses last can hang on rounding, where two channels cost the same.
    assert ours["perplexity_after"] == pytest.approx(
        theirs["perplexity_after"], rel=1e-3 if found.plan.layers == wanted.plan.layers else 0.1
    )


def test_zeroed_neurons_are_those_of_the_cpu(subject: Subject, cuda: Device, tmp_path: Path) -> None:
    made = []
    for name, device in (("host", CPU), ("cuda", cuda)):
        opened = OpenModel(subject.index, subject.digest, "tiny", device)
        made.append(prune_neurons(opened, EXPERT, CORPORA, tmp_path / name, ratio=0.25, rule="paper"))
    assert [layer.removed for layer in made[0].plan.layers] == [
        layer.removed for layer in made[1].plan.layers
    ]
    assert made[1].measurements["held_out"] == pytest.approx(made[0].measurements["held_out"], rel=1e-3)


def test_perplexity_agreement_and_importance_are_those_of_the_cpu(
    subject: Subject, cuda: Device, tmp_path: Path
) -> None:
    other = open_checkpoint(save_model(tmp_path / "other", "llama", seed=1))
    wanted = measure_likelihood(subject.index, CORPORA.calibration, other)
    found = measure_likelihood(subject.index, CORPORA.calibration, other, device=cuda)
    assert perplexity(found) == pytest.approx(perplexity(wanted), rel=1e-4)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.negative_log_likelihood == pytest.approx(theirs.negative_log_likelihood, rel=1e-4)
        assert ours.reference_negative_log_likelihood == pytest.approx(
            theirs.reference_negative_log_likelihood, rel=1e-4
        )
        assert ours.kl_divergence == pytest.approx(theirs.kl_divergence, rel=1e-3)
        assert ours.top1_agreements == theirs.top1_agreements
    ids = [document.token_ids for document in CORPORA.calibration]
    means, found_means = importance_of(subject.index, ids), importance_of(subject.index, ids, device=cuda)
    assert found_means.keys() == means.keys()
    for name, mean in means.items():
        torch.testing.assert_close(
            torch.from_numpy(found_means[name]),
            torch.from_numpy(mean),
            rtol=RELATIVE,
            atol=OF_LARGEST * float(mean.max()),
        )


def test_tf32_is_off_whatever_the_process_has_set(cuda: Device, tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model", "llama"))
    score_model(index, CORPORA, tmp_path / "host", model_hash="m", corpus_hash="c")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        score_model(index, CORPORA, tmp_path / "cuda", model_hash="m", corpus_hash="c", device=cuda)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_close_entries(tmp_path / "cuda", tmp_path / "host", RELATIVE, OF_LARGEST)


def test_greedy_continuations_are_those_of_the_cpu(cuda: Device, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))
    from tiny_exports import TinyConfig, make_folder

    from cusprun.corpus.augment import Prompt
    from cusprun.corpus.tokens import load_tokenizer
    from cusprun.quality.continuation import continuations
    from cusprun.quality.stock import load_stock_model

    folder = make_folder(tmp_path / "model", TinyConfig("llama", {"tie_word_embeddings": True}))
    tokenizer = load_tokenizer(folder)
    prompts = [Prompt("task", tuple(range(4, 8 + number)), 12, seed=number) for number in range(20)]
    for temperature in (0.0, 0.8):  # the draws are the host's, and float32 weights give the same logits
        found = continuations(load_stock_model(folder, cuda), tokenizer, prompts, temperature, device=cuda)
        wanted = continuations(load_stock_model(folder), tokenizer, prompts, temperature)
        same = sum(ours == theirs for ours, theirs in zip(found, wanted, strict=True))
        assert same >= 18, f"{same} of 20 at temperature {temperature}"


def test_a_device_that_is_full_once_gets_smaller_batches(
    subject: Subject, cuda: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, DecoderShell, "run", times=1)
    heard, out = Heard(), tmp_path / "store"
    score_model(subject.index, CORPORA, out, model_hash="m", corpus_hash="c", device=cuda, progress=heard)
    assert "scoring, again in smaller batches because cuda:0 ran out of memory" in heard.seconds
    assert_close_entries(out, subject.units, RELATIVE, OF_LARGEST)


def test_what_the_device_has_no_room_to_solve_the_host_does(
    subject: Subject, cuda: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, settings = subject.plan(subject.units), RefitSettings(anchors=40)
    for name in ("device", "host"):
        if name == "host":
            short_of_memory(monkeypatch, refit_walk, "refit", times=1)
        (tmp_path / name).mkdir()
        write_weights(
            subject.index, plan, tmp_path / name, CORPORA.calibration, settings=settings, device=cuda
        )
    assert_close_norms(tmp_path / "host", tmp_path / "device", WEIGHTS)


def test_a_device_that_is_full_is_refused_and_leaves_nothing(cuda: Device, tmp_path: Path) -> None:
    # Of 3 MB a matrix, so that no free part of the allocator's 2 MB blocks is enough.
    index = open_checkpoint(save_model(tmp_path / "model", "llama", hidden_size=480, intermediate_size=1600))
    score_model(index, CORPORA, tmp_path / "store", model_hash="m", corpus_hash="c")
    plan, provenance = planned(index, tmp_path / "store"), Provenance("tiny", "m", "c", EXPERT, {})
    before = sorted(tmp_path.iterdir())
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(DeviceError, match="cuda:0 has too little memory"):
            score_model(index, CORPORA, tmp_path / "s", model_hash="m", corpus_hash="c", device=cuda)
        with pytest.raises(DeviceError, match="cuda:0 has too little memory"):
            write_expert(index, plan, tmp_path / "e", corpora=CORPORA, provenance=provenance, device=cuda)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sorted(tmp_path.iterdir()) == before


WIDE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""A llama of 1.5B widths, four blocks of it."""


def test_times_and_memory_of_a_wide_model(cuda: Device, tmp_path: Path) -> None:
    """Prints, and asserts only that all of it goes through; `pytest -s` shows it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(cuda.name):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WIDE), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    del model
    torch.cuda.empty_cache()
    index = open_checkpoint(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    texts = tuple(
        TokenizedDocument(
            "domain", str(number), tuple(torch.randint(0, 32000, (256,), generator=generator).tolist())
        )
        for number in range(100)
    )
    corpora = Corpora(texts[:80], texts[80:])
    few = replace(corpora, calibration=texts[:8])
    print(f"\n{cuda.label}: llama, 1.5B widths, 4 blocks, {corpora.calibration_tokens:,} tokens")

    def timed(name: str, work: Callable[[], object], tokens: int) -> None:
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        work()
        took = time.monotonic() - started
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"{name}: {took:.1f} s, {tokens / took:,.0f} tokens/s, device memory {peak:.2f} GB")

    def score(function: Callable[..., Path], name: str, device: Device, given: Corpora) -> None:
        timed(
            f"{name} on {device.name}",
            lambda: function(
                index,
                given,
                tmp_path / f"{name}-{device.kind}",
                model_hash="m",
                corpus_hash="c",
                device=device,
            ),
            given.calibration_tokens,
        )

    score(score_model, "warm", cuda, few)
    score(score_model, "units", CPU, few)
    score(score_model, "units", cuda, corpora)
    score(score_neurons, "neurons", cuda, corpora)
    heard = Heard()
    opened = OpenModel(index, "m", "wide", cuda)
    wishes = PruneWishes(ratio=0.25)
    timed(
        "prune on cuda",
        lambda: prune_opened(
            opened, Expert("wide", {"domain": ()}), corpora, tmp_path / "expert", wishes, heard
        ),
        corpora.calibration_tokens,
    )
    print({name: round(seconds, 1) for name, seconds in heard.seconds.items()})
