"""Stores of scores through the commands: found in the cache, copied, held against model and corpora."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cusprun as api
from cusprun.codec import load_json
from cusprun.errors import PlanError
from cusprun.pipeline import sweep as sweeping
from cusprun.pipeline.curve import SweepReport
from cusprun.pruning.store import open_store
from cusprun.pruning.store_layout import StoreInfo
from cusprun.records import Manifest

EXPERT = ("--expert", "expert.yaml")
SCORE = ("score", "model", *EXPERT)
PRUNE = ("prune", "model", *EXPERT, "--for", "gguf:f16")


def swap_two_tokens() -> None:
    """Give two words of the tokenizer each other's ids, so that texts have as many tokens and other ones."""
    path = Path("model/tokenizer.json")
    plain = json.loads(path.read_text())
    words = plain["model"]["vocab"]
    words["e"], words["a"] = words["a"], words["e"]
    path.write_text(json.dumps(plain))


@pytest.mark.parametrize("granularity", ["unit", "neuron"])
@pytest.mark.parametrize("damage", ["gone", "cut short", "another block's", "not finite"])
def test_a_damaged_layer_in_the_cache_is_scored_again(work, cusprun, granularity, damage) -> None:
    score = (*SCORE, "--granularity", granularity)
    assert cusprun(*score, "--out", "first").code == 0
    (cached,) = (work / "cache" / "scores").iterdir()
    file, other = cached / "layer-00001.safetensors", cached / "layer-00000.safetensors"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        broken = {
            "cut short": whole[:-7],
            "another block's": other.read_bytes(),
            "not finite": whole[:-4] + b"\xff\xff\xff\x7f",
        }
        file.write_bytes(broken[damage])
    outcome = cusprun(*score, "--out", "second")
    assert outcome.code == 0, outcome
    assert "damaged; scoring again" in outcome.err
    open_store(Path("second")).check_files()
    assert Path("second/layer-00001.safetensors").read_bytes() == whole
    third = cusprun(*score, "--out", "third")
    assert "not scoring again" in third.err


def test_a_copied_store_has_the_name_of_the_expert_that_asked_for_it(work, cusprun) -> None:
    assert cusprun(*SCORE, "--out", "first").code == 0
    text = Path("expert.yaml").read_text()
    Path("expert.yaml").write_text(text.replace("name: tiny", "name: other"))
    second = cusprun(*SCORE, "--out", "second")
    assert "not scoring again" in second.err
    names = [load_json(StoreInfo, Path(f"{store}/store.json")).expert_name for store in ("first", "second")]
    assert names == ["tiny", "other"]


def test_a_store_that_does_not_fit_on_the_disk_is_refused(work, cusprun, monkeypatch) -> None:
    assert cusprun(*SCORE, "--out", "first").code == 0
    usage = shutil.disk_usage(work)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
        outcome = cusprun(*SCORE, "--out", "second")
    assert outcome.code == 2, outcome
    assert "second needs" in outcome.err

    def full(*_paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    outcome = cusprun(*SCORE, "--out", "second")
    assert outcome.code == 2, outcome
    assert "second cannot be written (No space left on device)" in outcome.err
    assert not Path("second").exists()


def test_scores_made_with_another_tokenizer_are_refused(work, cusprun) -> None:
    assert cusprun(*SCORE, "--out", "store").code == 0
    swap_two_tokens()
    for arguments in (("plan", "model"), PRUNE[:4]):
        out = ("--out", "out") if arguments[0] == "prune" else ()
        outcome = cusprun(*arguments, "--scores", "store", "--for", "gguf:f16", *out)
        assert outcome.code == 2, outcome
        assert "other tokens" in outcome.err
    assert not Path("out").exists()
    fresh = cusprun(*PRUNE, "--out", "out")
    assert fresh.code == 0, fresh
    assert "scores" not in fresh.err.replace("not scoring again", "scores")


def test_scores_of_texts_that_were_cut_elsewhere_are_refused(work, cusprun) -> None:
    """The same model and texts, and another max_tokens: only the documents themselves tell."""
    assert cusprun(*SCORE, "--out", "store").code == 0
    text = Path("expert.yaml").read_text().partition("general:")[0]
    Path("expert.yaml").write_text(f"{text}max_tokens: 24\n")
    outcome = cusprun(*PRUNE, "--scores", "store", "--no-refit", "--out", "out")
    assert outcome.code == 2, outcome
    assert "other token ids there" in outcome.err


def test_the_manifest_and_the_card_tell_the_weights_of_the_dimensions(work, cusprun) -> None:
    outcome = cusprun(*PRUNE, "--weight", "task=0.25", "--out", "a")
    assert outcome.code == 0, outcome
    assert load_json(Manifest, Path("a/cusprun.json")).refit_weights == {"task": 0.25}
    assert "weights of the dimensions: task 0.25" in Path("a/README.md").read_text()
    assert cusprun(*PRUNE, "--out", "b").code == 0
    assert load_json(Manifest, Path("b/cusprun.json")).refit_weights == {}
    assert "weights" not in Path("b/README.md").read_text()


@pytest.mark.parametrize("given", ["options", "plan"])
@pytest.mark.parametrize("refit", ["--refit", "--no-refit"])
def test_the_share_in_the_plan_is_that_of_the_written_parameters(work, cusprun, refit, given) -> None:
    rule = ("--rule", "variance+bias")
    if given == "plan":
        assert cusprun(*SCORE, "--out", "store").code == 0
        plan = ("plan", "model", "--scores", "store", "--for", "gguf:f16", *rule, "--out", "p.json")
        assert cusprun(*plan).code == 0
        outcome = cusprun("prune", "model", *EXPERT, "--plan", "p.json", refit, "--out", "a")
    else:
        outcome = cusprun(*PRUNE, *rule, refit, "--out", "a")
    assert outcome.code == 0, outcome
    manifest = load_json(Manifest, Path("a/cusprun.json"))
    share = 1 - manifest.parameters_after / manifest.parameters_before
    assert manifest.plan.total_ratio == share
    assert f"{share:.1%} of" in Path("a/README.md").read_text().replace("\n", " ")


def test_single_neurons_may_be_nearly_all_and_not_none(work, cusprun) -> None:
    neurons = ("prune", "model", *EXPERT, "--granularity", "neuron", "--out", "a")
    assert cusprun(*neurons, "--ratio", "0.95").code == 0
    with pytest.raises(PlanError, match="the smallest that sets one to zero is"):
        api.prune("model", "expert.yaml", "b", granularity="neuron", ratio=1e-5)


def test_two_sweeps_at_once_in_one_folder_lose_nothing(work, monkeypatch) -> None:
    """While an expert is made, another process adds that ratio and a second one to the same curve."""
    pruning = sweeping.prune_opened
    options = ("--for", "gguf:f16", "--ratios", "0.3,0.5", "--keep", "--out", "curve")
    others: list[subprocess.CompletedProcess[str]] = []

    def interrupted(opened, expert, corpora, out, wishes, progress):
        if not others:
            command = [sys.executable, "-m", "cusprun", "sweep", "model", *EXPERT, *options]
            others.append(subprocess.run(command, capture_output=True, text=True, check=False))
        return pruning(opened, expert, corpora, out, wishes, progress)

    monkeypatch.setattr(sweeping, "prune_opened", interrupted)
    report = api.sweep("model", "expert.yaml", [0.3, 0.4], "curve", targets=("gguf:f16",), keep=True)
    assert others[0].returncode == 0, others[0].stderr
    assert [point.ratio for point in report.points] == [0.3, 0.4, 0.5]
    assert load_json(SweepReport, Path("curve/sweep.json")) == report
    assert sorted(path.name for path in Path("curve").iterdir()) == [
        "expert-0.3", "expert-0.4", "expert-0.5", "sweep.json", "sweep.md", "sweep.png",
    ]  # fmt: skip
    for point in report.points:
        assert f"| {point.ratio:g} |" in Path("curve/sweep.md").read_text()
