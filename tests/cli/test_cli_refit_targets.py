"""``--refit-target`` and the recipe's key: what they make, what is told of it and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cusprun.codec import load_json
from cusprun.errors import ConfigError
from cusprun.pipeline.curve import SweepReport
from cusprun.recipe import load_recipe
from cusprun.records import Manifest

MODEL = ("model", "--expert", "expert.yaml", "--for", "gguf:f16")
PRUNE = ("prune", *MODEL)
SWEEP = ("sweep", *MODEL, "--out", "curve")


def manifest_of(folder: str) -> Manifest:
    return load_json(Manifest, Path(folder, "cusprun.json"))


def test_every_target_makes_an_expert_that_says_what_it_aimed_at(work, cusprun) -> None:
    for target in ("output", "residual", "auto"):
        outcome = cusprun(*PRUNE, "--refit-target", target, "--out", target)
        assert outcome.code == 0, outcome
    assert cusprun(*PRUNE, "--out", "default").code == 0
    weights = {
        name: Path(name, "model.safetensors").read_bytes()
        for name in ("output", "residual", "auto", "default")
    }
    assert weights["default"] == weights["output"] != weights["residual"]
    for target in ("output", "residual"):
        assert manifest_of(target).refit_target == target
        assert "refit_target" not in manifest_of(target).measurements
    assert "relative stream error" in Path("residual/README.md").read_text()
    told = manifest_of("auto").measurements["refit_target"]
    assert weights["auto"] == weights[told["chosen"]]
    assert set(told["perplexity"]) == {"output", "residual"}
    assert told["chosen"] == min(told["perplexity"], key=told["perplexity"].__getitem__)
    assert sorted(path.name for path in Path("auto").iterdir()) == sorted(
        path.name for path in Path("output").iterdir()
    )
    tabled = cusprun(*PRUNE, "--refit-target", "auto", "--out", "again").out
    assert f"refit target {told['chosen']}" in tabled


def test_a_curve_of_another_target_is_another_curve(work, cusprun) -> None:
    assert cusprun(*SWEEP, "--ratios", "0.3", "--refit-target", "residual").code == 0
    report = load_json(SweepReport, Path("curve/sweep.json"))
    assert report.refit_target == "residual"
    assert "target: residual" in Path("curve/sweep.md").read_text()
    outcome = cusprun(*SWEEP, "--ratios", "0.4")
    assert outcome.code == 2
    assert "refit_target" in outcome.err
    assert cusprun(*SWEEP, "--ratios", "0.4", "--refit-target", "residual").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--refit-target", "residue"), "did you mean 'residual'"),
        (("--refit-target", "residual", "--no-refit"), "or refit"),
        (("--refit-target", "residual", "--rule", "variance+bias"), "adds biases"),
        (("--refit-target", "residual", "--granularity", "neuron"), "the refit target"),
    ],
)
def test_what_cannot_be_aimed_at_is_refused(work, cusprun, arguments, words) -> None:
    outcome = cusprun(*PRUNE, *arguments, "--out", "out")
    assert outcome.code == 2, outcome
    assert words in outcome.err
    assert not Path("out").exists()


def test_a_recipe_names_a_target(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = "model: m\nexpert: e.yaml\nout: out\n"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path).wishes.refit_target is None
    path.write_text(f"{text}refit_target: auto\n", encoding="utf-8")
    assert load_recipe(path).wishes.refit_target == "auto"
    for wrong, words in (
        ("refit_target: outputs\n", "did you mean 'output'"),
        ("refit_target: residual\nrefit: false\n", "'refit' is false"),
    ):
        path.write_text(text + wrong, encoding="utf-8")
        with pytest.raises(ConfigError, match=words):
            load_recipe(path)
