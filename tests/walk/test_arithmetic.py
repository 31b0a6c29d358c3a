"""Products in bfloat16: what they are, where they are made and where not, and that results are kept apart."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from device_checks import CORPORA, EXPERT, planned, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import save_model

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.errors import ConfigError, DeviceError
from cusprun.pipeline.opening import OpenModel
from cusprun.pipeline.stages import scored
from cusprun.progress import SILENT
from cusprun.pruning.neuron_score import score_neurons
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.rewrite import write_weights
from cusprun.pruning.score import score_model
from cusprun.quality.likelihood import measure_likelihood
from cusprun.recipe import load_recipe, recipe_tree
from cusprun.walk.arithmetic import RoundedLinear, linear_of
from cusprun.walk.budget import block_bytes, scoring, token_bytes
from cusprun.walk.device import CPU, Device, open_device
from cusprun.walk.importance import importance_of
from cusprun.walk.shell import DecoderShell

ROUNDED = Device("cpu", "bfloat16")
FAMILIES = ("llama-untied-biased", "gemma3", "phi3-partial-rotary")
HALF_STEP = 2.0**-8
"""The most by which rounding to bfloat16, with 8 bits, changes a value, as a share of it; a half step."""


@pytest.fixture(scope="module", params=FAMILIES)
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    return open_checkpoint(save_model(tmp_path_factory.mktemp("model") / "model", request.param))


def scores_of(index: CheckpointIndex, out: Path, device: Device) -> dict[str, torch.Tensor]:
    folder = score_model(index, CORPORA, out, model_hash="m", corpus_hash="c", device=device)
    return {
        f"{path.name}: {name}": values.double()
        for path in sorted(folder.glob("*.safetensors"))
        for name, values in load_file(path).items()
    }


@given(st.integers(1, 9), st.integers(1, 300), st.integers(1, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_product_is_that_of_rounded_factors_with_a_sum_of_more_bits(
    rows: int, width: int, features: int, has_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    given_rows = torch.randn(rows, width, generator=generator)
    weight = torch.randn(features, width, generator=generator)
    bias = torch.randn(features, generator=generator) if has_bias else None
    found = linear_of(weight, bias, torch.bfloat16)(given_rows).double()
    terms = given_rows.bfloat16().double().unsqueeze(1) * weight.bfloat16().double()
    wanted = terms.sum(dim=-1)
    # One rounding of the sum, and what float32 loses while it adds: far less than a sum of 8 bits would lose.
    error = HALF_STEP * wanted.abs() + width * 2.0**-23 * terms.abs().sum(dim=-1)
    if bias is not None:
        wanted = wanted + bias
        error = error + 2.0**-23 * wanted.abs()
    assert ((found - wanted).abs() <= error).all()


def test_only_linear_layers_are_rounded(index: CheckpointIndex) -> None:
    exact, rounded = (DecoderShell(index, device).load_block(0) for device in (CPU, ROUNDED))
    kinds = {path: module for path, module in rounded.named_modules() if isinstance(module, RoundedLinear)}
    assert sorted(kinds) == sorted(
        path for path, module in exact.named_modules() if isinstance(module, torch.nn.Linear)
    )
    for name, parameter in rounded.named_parameters():
        path, _, own = name.rpartition(".")
        is_rounded = path in kinds and own == "weight"
        assert parameter.dtype == (torch.bfloat16 if is_rounded else torch.float32), name
        torch.testing.assert_close(
            parameter.float(), exact.get_parameter(name), rtol=HALF_STEP if is_rounded else 0, atol=0
        )


def test_scores_differ_by_rounding(index: CheckpointIndex, tmp_path: Path) -> None:
    exact = scores_of(index, tmp_path / "exact", CPU)
    rounded = scores_of(index, tmp_path / "rounded", ROUNDED)
    assert exact.keys() == rounded.keys()
    for name, values in rounded.items():
        if name.endswith("sums"):  # of values of both signs: compared with nothing
            continue
        torch.testing.assert_close(values, exact[name], rtol=0.03, atol=0.03 * float(exact[name].abs().max()))
    moved = [name for name, values in rounded.items() if not torch.equal(values, exact[name])]
    assert any("ffn_channel" in name for name in moved)


def test_neurons_are_scored_too(index: CheckpointIndex, tmp_path: Path) -> None:
    found = {}
    for device in (CPU, ROUNDED):
        folder = score_neurons(
            index, CORPORA, tmp_path / device.dtype, model_hash="m", corpus_hash="c", device=device
        )
        found[device.dtype] = load_file(folder / "layer-00000.safetensors")
    for name, values in found["float32"].items():
        torch.testing.assert_close(
            found["bfloat16"][name], values, rtol=0.03, atol=0.03 * float(values.abs().max())
        )


def test_a_refit_differs_by_rounding_and_its_expert_is_stored_as_ever(
    index: CheckpointIndex, tmp_path: Path
) -> None:
    store = score_model(index, CORPORA, tmp_path / "store", model_hash="m", corpus_hash="c")
    plan = planned(index, store)
    found = {}
    for device in (CPU, ROUNDED):
        out = tmp_path / device.dtype
        out.mkdir()
        write_weights(
            index, plan, out, CORPORA.calibration, settings=RefitSettings(anchors=16), device=device
        )
        found[device.dtype] = tensors_of(out)
    assert found["float32"].keys() == found["bfloat16"].keys()
    changed = 0
    for name, wanted in found["float32"].items():
        values = found["bfloat16"][name]
        assert values.dtype == wanted.dtype
        scale = float(wanted.float().norm()) or 1.0
        assert float((values.float() - wanted.float()).norm()) <= 0.1 * scale, name
        changed += not torch.equal(values, wanted)
    assert changed


def test_likelihoods_and_importances_are_exact_whatever_the_type(
    index: CheckpointIndex, tmp_path: Path
) -> None:
    exact, rounded = (
        measure_likelihood(index, CORPORA.held_out, index, device=device) for device in (CPU, ROUNDED)
    )
    assert exact == rounded
    ids = [document.token_ids for document in CORPORA.held_out]
    means, again = (importance_of(index, ids, device=device) for device in (CPU, ROUNDED))
    assert all((means[name] == again[name]).all() for name in means)


def test_scores_of_one_type_never_stand_in_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    index = open_checkpoint(save_model(tmp_path / "model"))
    stores = [
        scored(OpenModel(index, "m", "tiny", device), EXPERT, CORPORA, SILENT)
        for device in (CPU, ROUNDED, CPU)
    ]
    assert stores[0] == stores[2] != stores[1]
    assert '"cpu, bfloat16"' in (stores[1] / "store.json").read_text(encoding="utf-8")


def test_a_block_takes_less_memory(index: CheckpointIndex) -> None:
    half, whole = block_bytes(index, "bfloat16"), block_bytes(index)
    held = sum(
        values.numel() * values.element_size()
        for values in DecoderShell(index, ROUNDED).load_block(0).parameters()
    )
    assert held < half
    copies = 9 * (token_bytes(index, [9], "bfloat16") - token_bytes(index, [9]))
    assert scoring(index, [9], "bfloat16").least_bytes - scoring(index, [9]).least_bytes == pytest.approx(
        1.1 * (half - whole + copies), abs=1
    )


def test_unknown_types_are_refused_with_the_nearest() -> None:
    with pytest.raises(DeviceError, match="did you mean 'bfloat16'"):
        open_device("cpu", dtype="bfloat")
    with pytest.raises(DeviceError, match="known: bfloat16, float32"):
        open_device("cpu", dtype="int4")


def test_a_recipe_names_a_type(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = "model: model\nexpert: expert.yaml\nout: out\n"
    path.write_text(f"{text}dtype: bfloat16\n", encoding="utf-8")
    assert load_recipe(path).dtype == "bfloat16"
    assert recipe_tree(load_recipe(path))["dtype"] == "bfloat16"
    path.write_text(f"{text}dtype: bfloat\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe.yaml:4.*did you mean 'bfloat16'"):
        load_recipe(path)


def test_a_processor_without_bfloat16_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cusprun")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert open_device("cpu", dtype="bfloat16") == ROUNDED
    assert not caplog.messages
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert open_device("cpu", dtype="bfloat16") == ROUNDED
    assert "float32 is faster" in caplog.text
