"""Every bad input: one sentence, exit code 2, no traceback, nothing left behind, the input untouched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

PRUNE = ("prune", "model", "--expert", "expert.yaml", "--out", "out")
WEIGHTS = "model/model.safetensors"


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder outside the cache's finished stages, with the hash of what it holds."""

    def content(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {
        str(path.relative_to(folder)): content(path)
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "cache"
    }


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".partial" in path.name or ".cusprun-spill" in path.name]


def truncate(path: str, share: float) -> Callable[[], None]:
    def change() -> None:
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: int(len(data) * share)])

    return change


def corrupt_header() -> None:
    data = bytearray(Path(WEIGHTS).read_bytes())
    data[8:20] = b"not a header"
    Path(WEIGHTS).write_bytes(bytes(data))


def poison(value: float) -> Callable[[], None]:
    def change() -> None:
        weights = load_file(WEIGHTS)
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(weights, WEIGHTS)

    return change


def pickled_only() -> None:
    torch.save(load_file(WEIGHTS), "model/pytorch_model.bin")
    Path(WEIGHTS).unlink()


def edit_config(**changes: object) -> Callable[[], None]:
    def change() -> None:
        path = Path("model/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(path: str, text: str) -> Callable[[], None]:
    return lambda: (Path(path).write_text(text), None)[1]


def remove(path: str) -> Callable[[], None]:
    return lambda: Path(path).unlink()


def nothing() -> None:
    pass


GGUF = ("import-gguf", "model.gguf", "out")
Case = namedtuple("Case", "change arguments words")
CASES = {
    "missing corpus": Case(remove("domain.jsonl"), PRUNE, ("domain.jsonl",)),
    "empty corpus": Case(write("domain.jsonl", ""), PRUNE, ("domain.jsonl", "no documents")),
    "corpus of one text": Case(write("task.jsonl", '{"text": ""}\n'), PRUNE, ("task.jsonl",)),
    "missing expert": Case(remove("expert.yaml"), PRUNE, ("expert.yaml",)),
    "expert with a typo": Case(
        write("expert.yaml", "domian: {sources: [{path: domain.jsonl}]}"), PRUNE, ("did you mean 'domain'",)
    ),
    "ratio of zero": Case(nothing, (*PRUNE, "--ratio", "0"), ("ratio", "0.9")),
    "ratio above": Case(nothing, (*PRUNE, "--ratio", "0.95"), ("ratio", "0.9")),
    "ratio that is no number": Case(nothing, (*PRUNE, "--ratio", "half"), ("--ratio",)),
    "truncated safetensors": Case(truncate(WEIGHTS, 0.6), PRUNE, ("model.safetensors",)),
    "safetensors cut in the header": Case(truncate(WEIGHTS, 0.001), PRUNE, ("model.safetensors",)),
    "corrupt safetensors header": Case(corrupt_header, PRUNE, ("model.safetensors",)),
    "NaN": Case(poison(float("nan")), PRUNE, ("model.layers.1.mlp.up_proj.weight",)),
    "Inf": Case(poison(float("inf")), PRUNE, ("model.layers.1.mlp.up_proj.weight",)),
    "pickles": Case(pickled_only, PRUNE, ("pickled", "safetensors")),
    "no config": Case(remove("model/config.json"), PRUNE, ("config.json",)),
    "other family": Case(edit_config(model_type="mamba"), PRUNE, ("mamba", "llama", "qwen2")),
    "mixture of experts": Case(edit_config(num_local_experts=8), PRUNE, ("mixture of experts",)),
    "no tokenizer": Case(remove("model/tokenizer.json"), PRUNE, ("tokenizer",)),
    "output exists": Case(lambda: Path("out").mkdir(), PRUNE, ("out exists",)),
    "unknown rule": Case(nothing, (*PRUNE, "--rule", "papre"), ("did you mean 'paper'",)),
    "unknown target": Case(nothing, (*PRUNE, "--for", "gguf:q8"), ("did you mean 'q8_0'",)),
    "unknown runtime": Case(nothing, (*PRUNE, "--for", "gguv:q8_0"), ("did you mean 'gguf'",)),
    "bad shard size": Case(nothing, (*PRUNE, "--shard-size", "big"), ("size", "5GB")),
    "missing store": Case(
        nothing, ("plan", "model", "--scores", "store", "--out", "plan.json"), ("store", "cusprun score")
    ),
    "no store": Case(nothing, ("plan", "model"), ("store", "cusprun score")),
    "missing plan": Case(nothing, (*PRUNE, "--plan", "plan.json"), ("plan.json", "does not exist")),
    "plan that is no JSON": Case(write("plan.json", "{"), (*PRUNE, "--plan", "plan.json"), ("plan.json",)),
    "plan and ratio": Case(
        nothing, (*PRUNE, "--plan", "plan.json", "--ratio", "0.5"), ("plan", "leave out ratio")
    ),
    "plan and units": Case(
        nothing, (*PRUNE, "--plan", "plan.json", "--units", "block"), ("plan", "leave out units")
    ),
    "two budgets": Case(
        nothing, (*PRUNE, "--ratio", "0.2", "--target-params", "1M"), ("only one budget", "target_params")
    ),
    "three budgets": Case(
        nothing,
        (*PRUNE, "--target-bytes", "1MB", "--target-params", "1M", "--max-loss", "5%"),
        ("only one budget", "target_bytes", "max_loss"),
    ),
    "bad target-params": Case(nothing, (*PRUNE, "--target-params", "100MB"), ("100MB", "100M")),
    "bad target-bytes": Case(nothing, (*PRUNE, "--target-bytes", "x"), ("'x'", "5GB")),
    "bytes of no file": Case(
        nothing, (*PRUNE, "--target-bytes", "1MB", "--for", "vllm:tp1"), ("exactly one", "gguf:q4_k_m")
    ),
    "bytes of two files": Case(
        nothing, (*PRUNE, "--target-bytes", "1MB", "--for", "gguf:f16,gguf:q8_0"), ("2 gguf targets",)
    ),
    "bytes below any shape": Case(
        nothing,
        (*PRUNE, "--target-bytes", "9kB", "--for", "gguf:q8_0"),
        ("nearest legal shapes", "bytes as gguf:q8_0"),
    ),
    "params above the model's": Case(
        nothing, (*PRUNE, "--target-params", "900M"), ("asks for nothing", "the least cut is")
    ),
    "bad max-loss": Case(nothing, (*PRUNE, "--max-loss", "5"), ("5%",)),
    "unknown unit": Case(nothing, (*PRUNE, "--units", "blok"), ("did you mean 'block'",)),
    "unknown device": Case(nothing, (*PRUNE, "--device", "cudaa"), ("did you mean 'cuda'", "cuda:N")),
    "unknown device of a recipe": Case(
        write("recipe.yaml", "model: model\nexpert: expert.yaml\nout: out\ndevice: gpu\n"),
        ("run", "recipe.yaml"),
        ("recipe.yaml:4", "unknown device 'gpu'"),
    ),
    "unknown dtype": Case(nothing, (*PRUNE, "--dtype", "bfloat"), ("did you mean 'bfloat16'",)),
    "unknown granularity": Case(nothing, (*PRUNE, "--granularity", "neurn"), ("did you mean 'neuron'",)),
    "neurons with targets": Case(
        nothing, (*PRUNE, "--granularity", "neuron", "--for", "gguf:f16"), ("leave out targets",)
    ),
    "weight of no form": Case(nothing, (*PRUNE, "--weight", "task"), ("language=0.3",)),
    "weight given twice": Case(nothing, (*PRUNE, "--weight", "task=1,task=2"), ("two weights",)),
    "weight below zero": Case(nothing, (*PRUNE, "--weight", "task=-1"), ("0 or above",)),
    "weight of an unknown dimension": Case(nothing, (*PRUNE, "--weight", "tsak=1"), ("'task'",)),
    "weight of a dimension that is not there": Case(
        nothing, (*PRUNE, "--weight", "language=1"), ("no dimension 'language'",)
    ),
    "no weight above zero": Case(nothing, (*PRUNE, "--weight", "task=0,domain=0"), ("above 0",)),
    "weights without refit": Case(nothing, (*PRUNE, "--weight", "task=2", "--no-refit"), ("refit",)),
    "quantile without number": Case(nothing, (*PRUNE, "--rule", "quantile"), ("quantile:0.9",)),
    "missing model": Case(nothing, ("inspect", "./nowhere"), ("nowhere does not exist",)),
    "missing model of one word": Case(
        nothing, ("inspect", "nowhere"), ("nowhere does not exist", "owner/name")
    ),
    "missing GGUF": Case(nothing, ("inspect", "some/where.gguf"), ("some/where.gguf does not exist",)),
    "file of another kind": Case(nothing, ("inspect", "expert.yaml"), ("no GGUF file",)),
    "missing package": Case(nothing, ("inspect", "package:not_there"), ("not_there", "pip install")),
    "package that would run code": Case(nothing, ("inspect", "package:os.path"), ("os.path",)),
    "GGUF that is none": Case(write("model.gguf", "GGUF"), GGUF, ("model.gguf",)),
    "empty GGUF": Case(write("model.gguf", ""), GGUF, ("model.gguf",)),
    "folder as GGUF": Case(nothing, ("import-gguf", "model", "out"), ("is a folder",)),
    "unknown format": Case(
        nothing, ("export", "model", "--to", "guff", "--out", "out"), ("did you mean 'gguf'",)
    ),
    "unknown precision": Case(
        nothing, ("export", "model", "--quant", "q8", "--out", "out.gguf"), ("did you mean 'q8_0'",)
    ),
    "export output exists": Case(
        write("out.gguf", "mine"), ("export", "model", "--out", "out.gguf"), ("out.gguf exists",)
    ),
    "artifact of no format": Case(
        nothing, ("verify", "model", "expert.yaml"), ("expert.yaml", "gguf, onnx, vllm")
    ),
    "missing artifact": Case(nothing, ("verify", "model", "a.gguf"), ("a.gguf does not exist",)),
    "bench without a file": Case(
        nothing, ("bench", "--before", "a.gguf", "--after", "b.gguf"), ("a.gguf does not exist",)
    ),
    "bench option": Case(
        nothing, ("bench", "--before", "model", "--after", "model", "--pairs", "0"), ("num_pairs",)
    ),
    "report exists": Case(
        write("r.json", "mine"),
        ("eval", "model", "--expert", "expert.yaml", "--json", "r.json"),
        ("r.json exists",),
    ),
    "missing recipe": Case(nothing, ("run", "recipe.yaml"), ("recipe.yaml",)),
    "unknown command": Case(nothing, ("prun",), ("prune",)),
    "unknown option": Case(nothing, ("plan", "model", "--rato", "0.5"), ("--ratio",)),
    "missing option": Case(nothing, ("prune", "model"), ("--expert",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_is_refused_in_one_sentence(work, cusprun, case) -> None:
    case.change()
    before = snapshot(work)
    outcome = cusprun(*case.arguments)
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in outcome.err
    for word in case.words:
        assert word in outcome.err
    assert snapshot(work) == before
    assert not leftovers(work)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.98])
def test_a_truncated_gguf_is_refused(work, cusprun, share) -> None:
    made = cusprun("export", "model", "--out", "model.gguf", "--no-verify")
    assert made.code == 0
    assert "not proven" in made.out
    truncate("model.gguf", share)()
    before = snapshot(work)
    for arguments in (GGUF, ("inspect", "model.gguf"), ("prune", "model.gguf", *PRUNE[2:])):
        outcome = cusprun(*arguments)
        assert outcome.code == 2, outcome
        assert "model.gguf" in outcome.err.splitlines()[-1]
    assert snapshot(work) == before
    assert not leftovers(work)


def test_a_corpus_with_fewer_tokens_than_the_refit_solves_for_is_told(work, cusprun) -> None:
    for name in ("domain", "task"):
        Path(f"{name}.jsonl").write_text(json.dumps({"text": f"{name} one"}) + "\n")
    outcome = cusprun(*PRUNE)
    assert outcome.code == 0
    assert "calibration tokens, fewer than the" in outcome.err


def test_a_plan_for_another_model_is_refused(work, cusprun, tiny_models) -> None:
    assert cusprun("score", "model", "--expert", "expert.yaml", "--out", "store").code == 0
    assert cusprun("plan", "model", "--scores", "store", "--for", "gguf:f16", "--out", "plan.json").code == 0
    before = snapshot(work)
    other = str(tiny_models / "qwen2")
    for arguments in (
        ("prune", other, *PRUNE[2:], "--plan", "plan.json"),
        ("plan", other, "--scores", "store"),
        ("prune", other, *PRUNE[2:], "--scores", "store"),
    ):
        outcome = cusprun(*arguments)
        assert outcome.code == 2, outcome
        assert "another model" in outcome.err
    assert snapshot(work) == before
    assert not leftovers(work)


def test_a_damaged_store_is_refused_and_a_damaged_cache_mended(work, cusprun) -> None:
    assert cusprun("score", "model", "--expert", "expert.yaml", "--out", "store").code == 0
    truncate("store/layer-00001.safetensors", 0.5)()
    outcome = cusprun("plan", "model", "--scores", "store", "--for", "gguf:f16")
    assert outcome.code == 2
    assert "layer-00001.safetensors" in outcome.err
    (cached,) = (work / "cache" / "scores").iterdir()
    (cached / "store.json").write_text("{")
    outcome = cusprun(*PRUNE, "--for", "gguf:f16")
    assert outcome.code == 0, outcome
    assert "damaged" in outcome.err


def test_a_full_disk_is_refused_before_the_work(work, cusprun, monkeypatch) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    before = snapshot(work)
    for arguments in (PRUNE, ("export", "model", "--out", "out.gguf")):
        outcome = cusprun(*arguments)
        assert outcome.code == 2, outcome
        assert "free" in outcome.err
    assert snapshot(work) == before
    assert not leftovers(work)


def test_a_cache_that_cannot_be_made_is_named(work, cusprun, monkeypatch) -> None:
    Path("blocked").write_text("a file where the cache should be")
    monkeypatch.setenv("CUSPRUN_CACHE", str(work / "blocked"))
    outcome = cusprun(*PRUNE)
    assert outcome.code == 2, outcome
    assert "blocked" in outcome.err


def test_an_unexpected_error_is_one_line_and_its_traceback_is_for_debug(work, cusprun, monkeypatch) -> None:
    from cusprun.pipeline import models

    def broken(*_args: object) -> None:
        raise ZeroDivisionError("division by\nzero")

    monkeypatch.setattr(models, "locate", broken)
    outcome = cusprun("inspect", "model")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "ZeroDivisionError: division by zero; please report" in outcome.err
    outcome = cusprun("--debug", "inspect", "model")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
