"""The contract every family keeps: the folder that pruning writes computes what it should, in stock code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, build_model, documents, save_model
from transformers import AutoModelForCausalLM

from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.checkpoint.reader import read_tensor
from cusprun.codec import Indices, load_json
from cusprun.errors import OutputError, PlanError
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.plan_check import checked_plan
from cusprun.pruning.planner import make_plan
from cusprun.pruning.refit import DEFAULT_RIDGE, RefitSettings
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.records import Corpora, Expert, Manifest, Plan, Source

CORPORA = Corpora(documents(8, 0, "domain") + documents(6, 1, "task"), documents(3, 2))
PLAIN = RefitSettings(revise=False, held_out=0, anchors=0)
"""The refit on the calibration documents alone, of the planned channels."""
RATIOS = {"ffn and heads": 0.5, "little": 0.1}


def make_expert(
    root: Path,
    family: str,
    ratio: float,
    *,
    refit: bool,
    units: tuple[str, ...] = (),
    rule: str = "mean",
    **options: object,
) -> tuple[Path, Plan]:
    folder = root / "model" if (root / "model").exists() else save_model(root / "model", family)
    index = open_checkpoint(folder)
    digest = model_hash(index)
    if not (root / "store").exists():
        score_model(index, CORPORA, root / "store", model_hash=digest, corpus_hash="c")
    plan = make_plan(
        index,
        open_store(root / "store"),
        model_hash=digest,
        ratio=ratio,
        rule=rule,
        targets=("gguf:f16",),
        units=units,
    )
    options.setdefault("settings", PLAIN if refit else RefitSettings(mode="none"))
    source = Source(path=str(root / "private" / "maths.jsonl"))
    provenance = Provenance("tiny", digest, "c", Expert("test expert", {"domain": (source,)}), {})
    write_expert(index, plan, root / "expert", corpora=CORPORA, provenance=provenance, **options)  # type: ignore[arg-type]
    return root / "expert", plan


def load_strictly(folder: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: torch.nn.Module
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    assert not any(info.values()), info
    return model.eval()


def logits_of(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([d.token_ids])).logits[0] for d in CORPORA.held_out]


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilyContract:
    @pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS.keys())
    def test_without_refit_the_expert_equals_the_original_with_units_silenced(
        self, family: str, ratio: float, tmp_path: Path
    ) -> None:
        folder, plan = make_expert(tmp_path, family, ratio, refit=False, measure=False)
        original = build_model(family)
        d = plan.before.head_dim
        for block, kept in zip(original.model.layers, plan.layers, strict=True):
            silent = torch.ones(plan.before.intermediate_size, dtype=torch.bool)
            silent[list(kept.ffn_channels)] = False
            block.mlp.down_proj.weight.data[:, silent] = 0
            for head in set(range(plan.before.num_attention_heads)) - set(kept.query_heads):
                block.self_attn.o_proj.weight.data[:, head * d : (head + 1) * d] = 0
        for ours, theirs in zip(logits_of(load_strictly(folder)), logits_of(original), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_refit_equals_an_independent_one_with_the_whole_model_in_memory(
        self, family: str, tmp_path: Path
    ) -> None:
        folder, plan = make_expert(tmp_path, family, 0.5, refit=True, measure=False)
        model = build_model(family)
        for number, kept in enumerate(plan.layers):
            block = model.model.layers[number]
            d = plan.before.head_dim
            columns = [head * d + c for head in kept.query_heads for c in range(d)]
            _solve_in_place(model, block.self_attn.o_proj, columns)
            _solve_in_place(model, block.mlp.down_proj, list(kept.ffn_channels))
        for ours, theirs in zip(logits_of(load_strictly(folder)), logits_of(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

    def test_sharded_weights_are_the_same_weights(self, family: str, tmp_path: Path) -> None:
        folder, _ = make_expert(tmp_path, family, 0.5, refit=True, measure=False)
        whole = open_checkpoint(folder)
        (tmp_path / "expert").rename(tmp_path / "whole")
        sharded, _ = make_expert(tmp_path, family, 0.5, refit=True, measure=False, max_shard_bytes=20_000)
        assert len(list(sharded.glob("*.safetensors"))) > 1
        assert (sharded / "model.safetensors.index.json").is_file()
        whole = open_checkpoint(tmp_path / "whole")
        assert model_hash(open_checkpoint(sharded)) == model_hash(whole)
        load_strictly(sharded)

    @pytest.mark.parametrize("units", [("block",), ("block", "ffn_channel")], ids=["whole", "and narrower"])
    def test_without_some_blocks_the_expert_equals_the_stock_model_with_its_list_cut(
        self, family: str, units: tuple[str, ...], tmp_path: Path
    ) -> None:
        folder, plan = make_expert(
            tmp_path, family, 0.5 if units == ("block",) else 0.7, refit=False, measure=False, units=units
        )
        assert len(plan.kept_blocks) < 3
        original = without_blocks(build_model(family), plan.kept_blocks)
        for block, kept in zip(original.model.layers, plan.layers, strict=True):
            silent = torch.ones(plan.before.intermediate_size, dtype=torch.bool)
            silent[list(kept.ffn_channels)] = False
            block.mlp.down_proj.weight.data[:, silent] = 0
        loaded = load_strictly(folder)
        assert loaded.config.num_hidden_layers == len(plan.kept_blocks)
        for ours, theirs in zip(logits_of(loaded), logits_of(original), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def without_blocks(model: Any, kept: Sequence[int]) -> Any:
    """Cut a stock model's list of blocks by hand, and the kinds of attention that go with it."""
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in kept)
    model.config.num_hidden_layers = len(kept)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = [kinds[number] for number in kept]
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("kept", [(0, 1), (0, 2), (1, 2), (2,)])
@pytest.mark.parametrize("family", ["gemma3", "qwen3-sliding-biased"])
def test_every_block_keeps_its_own_kind_of_attention(
    family: str, kept: tuple[int, ...], tmp_path: Path
) -> None:
    """Whatever blocks go, also where the source's config leaves the pattern to be worked out."""
    folder = save_model(tmp_path / "model", family)
    config = json.loads((folder / "config.json").read_text())
    if family != "gemma3":
        del config["layer_types"]
        (folder / "config.json").write_text(json.dumps(config))
    index = open_checkpoint(folder)
    score_model(index, CORPORA, tmp_path / "store", model_hash="m", corpus_hash="c")
    plan = make_plan(index, open_store(tmp_path / "store"), model_hash="m", ratio=0.1, units=("block",))
    layer = plan.layers[0]
    edited = replace(plan, kept_blocks=Indices(kept), layers=(layer,) * len(kept))
    edited = checked_plan(edited, index, "m")
    provenance = Provenance("tiny", "m", "c", Expert("test", {}), {})
    none = RefitSettings(mode="none")
    out = tmp_path / "expert"
    write_expert(index, edited, out, corpora=CORPORA, provenance=provenance, settings=none, measure=False)
    original = without_blocks(build_model(family), kept)
    for ours, theirs in zip(logits_of(load_strictly(out)), logits_of(original), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_lists_of_a_config_with_one_entry_for_each_block_are_cut(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen2")
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": [1, 2, 3], "per_block": ["a", "b", "c"], "max_window_layers": 2, "other": [1]}
    (folder / "config.json").write_text(json.dumps(config))
    expert, plan = make_expert(tmp_path, "qwen2", 0.3, refit=False, measure=False, units=("block",))
    cut = json.loads((expert / "config.json").read_text())
    assert len(plan.kept_blocks) == cut["num_hidden_layers"] == 2
    assert cut["per_block"] == ["abc"[number] for number in plan.kept_blocks]
    assert cut["max_window_layers"] == sum(number < 2 for number in plan.kept_blocks)
    assert cut["eos_token_id"] == [1, 2, 3]
    assert cut["other"] == [1]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_refit_walks_past_blocks_that_go(family: str, tmp_path: Path) -> None:
    units = ("block", "ffn_channel")
    folder, plan = make_expert(tmp_path, family, 0.7, refit=True, measure=False, units=units)
    assert len(plan.kept_blocks) < 3
    assert plan.after.intermediate_size < 80
    model = without_blocks(build_model(family), plan.kept_blocks)
    for block, kept in zip(model.model.layers, plan.layers, strict=True):
        _solve_in_place(model, block.mlp.down_proj, list(kept.ffn_channels))
    for ours, theirs in zip(logits_of(load_strictly(folder)), logits_of(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    manifest = load_json(Manifest, folder / "cusprun.json")
    assert {report.layer for report in manifest.refit} == set(plan.kept_blocks)


BIASED = {"rule": "variance+bias", "settings": RefitSettings(mode="bias")}


@pytest.mark.parametrize("family", ["llama", "llama-untied-biased", "llama-wide-heads"])
def test_a_rule_that_adds_biases_writes_all_that_the_config_then_calls_for(
    family: str, tmp_path: Path
) -> None:
    folder, _ = make_expert(tmp_path, family, 0.3, refit=True, measure=False, **BIASED)
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] is config["mlp_bias"] is True
    tensors = open_checkpoint(folder).tensors
    biases = [name for name in tensors if name.endswith(".bias")]
    assert len(biases) == 3 * 7
    load_strictly(folder)
    if family == "llama":
        for name in biases:
            if "o_proj" not in name and "down_proj" not in name:
                assert not read_tensor(open_checkpoint(folder), name).any()


def test_biases_are_the_mean_of_what_went_block_by_block(tmp_path: Path) -> None:
    settings = RefitSettings(mode="bias", held_out=0, anchors=0)
    options = {"rule": "variance+bias", "settings": settings, "units": ("ffn_channel", "kv_group", "block")}
    folder, plan = make_expert(tmp_path, "llama", 0.7, refit=True, measure=False, **options)
    model = without_blocks(build_model("llama"), plan.kept_blocks)
    for block, kept in zip(model.model.layers, plan.layers, strict=True):
        columns = [head * 8 + c for head in kept.query_heads for c in range(8)]
        for linear, keep in ((block.self_attn.o_proj, columns), (block.mlp.down_proj, kept.ffn_channels)):
            gone = sorted(set(range(linear.in_features)) - set(keep))
            means = _calibration_inputs(model, linear).mean(dim=0)
            bias = linear.weight.data.double()[:, gone] @ means[gone]
            linear.bias = torch.nn.Parameter(bias.float())
            linear.weight.data[:, gone] = 0
    for ours, theirs in zip(logits_of(load_strictly(folder)), logits_of(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert load_json(Manifest, folder / "cusprun.json").compensation == "bias"


@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3-sliding-biased", "gemma3", "phi3"])
def test_a_family_without_a_place_for_biases_is_refused_before_any_work(family: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no place"):
        make_expert(tmp_path, family, 0.3, refit=True, measure=False, **BIASED)
    assert not (tmp_path / "expert").exists()
    make_expert(tmp_path, family, 0.3, refit=False, measure=False, rule="variance+bias")


def _calibration_inputs(model: torch.nn.Module, linear: torch.nn.Linear) -> torch.Tensor:
    """Return what flows into a projection of a whole model: float64 [tokens, channels]."""
    rows: list[torch.Tensor] = []
    handle = linear.register_forward_hook(lambda _m, args, _o: rows.append(args[0][0].double()))
    with torch.no_grad():
        for document in CORPORA.calibration:
            model(torch.tensor([document.token_ids]))
    handle.remove()
    return torch.cat(rows)


def _solve_in_place(model: torch.nn.Module, linear: torch.nn.Linear, keep: list[int]) -> None:
    """Refit one projection of a whole model by augmented least squares on what flows into it."""
    if len(keep) == linear.in_features:
        return
    channels, weight = _calibration_inputs(model, linear), linear.weight.data.double()
    if hasattr(model.model.layers[0], "post_feedforward_layernorm"):
        # A norm behind the projection brings every token's output to one size.
        channels = channels / (channels @ weight.T).square().mean(1, keepdim=True).sqrt()
    survivors = channels[:, keep]
    # The unit of the ridge is what usual tokens have on the diagonal; sinks are far above the median.
    squares = (channels**2).sum(1)
    usual = channels[squares <= 30 * squares.median()]
    ridge = DEFAULT_RIDGE * float((usual**2).sum(0).mean())
    a = torch.cat([survivors, ridge**0.5 * torch.eye(len(keep), dtype=torch.float64)])
    b = torch.cat([channels @ weight.T, ridge**0.5 * weight[:, keep].T])
    linear.weight.data.zero_()
    linear.weight.data[:, keep] = torch.linalg.lstsq(a, b, driver="gelsd").solution.T.float()


def test_config_carried_files_manifest_and_card(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    odd = b'{"a":  1,\n\n "chat": "{{ x }}" }\r\n'
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes(odd)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    expert, plan = make_expert(tmp_path, "llama", 0.5, refit=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (expert / name).read_bytes() == odd
    config = json.loads((expert / "config.json").read_text())
    assert config["head_dim"] == 8
    assert config["intermediate_size"] == plan.after.intermediate_size
    manifest = load_json(Manifest, expert / "cusprun.json")
    assert manifest.plan == plan
    assert manifest.measurements["held_out"]["documents"] == 3
    assert {report.projection for report in manifest.refit} <= {"self_attn.o_proj", "mlp.down_proj"}
    for report in manifest.refit:
        assert report.relative_error_after <= report.relative_error_before
    for text in ((expert / "cusprun.json").read_text(), (expert / "README.md").read_text()):
        assert "private" not in text
        assert "maths.jsonl" in text


def test_channels_that_the_refit_chose_again_are_those_of_all_matrices_and_of_the_manifest(
    tmp_path: Path,
) -> None:
    folder, plan = make_expert(
        tmp_path, "llama", 0.4, refit=True, measure=False, settings=RefitSettings(anchors=0)
    )
    kept = load_json(Manifest, folder / "cusprun.json").plan.layers
    source, written = open_checkpoint(tmp_path / "model"), open_checkpoint(folder)
    assert [layer.query_heads for layer in kept] == [layer.query_heads for layer in plan.layers]
    for number, layer in enumerate(kept):
        assert len(layer.ffn_channels) == plan.after.intermediate_size
        for name in ("gate_proj", "up_proj"):
            name_ = f"model.layers.{number}.mlp.{name}.weight"
            rows = read_tensor(source, name_)[list(layer.ffn_channels)]
            assert torch.equal(read_tensor(written, name_), rows)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    expert, _ = make_expert(tmp_path, "llama", 0.5, refit=False, measure=False)
    assert "lm_head.weight" not in open_checkpoint(expert).tensors
    model = load_strictly(expert)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()  # type: ignore[union-attr]


def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists already"):
        make_expert(tmp_path, "llama", 0.5, refit=False)
    assert (tmp_path / "expert" / "mine.txt").read_text() == "keep"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cusprun.pruning.folder.model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        make_expert(tmp_path, "llama", 0.5, refit=False, measure=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]
