"""Folders for vLLM, read back by stock transformers and by the compressed-tensors library; no vLLM needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_exports import TinyConfig, documents, make_folder, rewrite_config
from tiny_vllm import FAMILIES, GEMMA3, ODD, QWEN2, SIZES, load, weights_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ExportError
from exporters import vllm_schemes
from exporters.parity_records import limits_for
from exporters.registry import FORMATS
from exporters.vllm import Options, check, export, locate, quant_of
from exporters.vllm_scales import search_scales
from exporters.vllm_schemes import PRECISIONS, compress
from exporters.vllm_support import tensor_parallel_sizes

pytest.importorskip("compressed_tensors")
torch.set_num_threads(1)

QUANTISED = tuple(name for name, precision in PRECISIONS.items() if precision.preset)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("vllm") / request.param, FAMILIES[request.param])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "llama", FAMILIES["llama"])


def logits(source: Any, ids: list[int]) -> torch.Tensor:
    model = source if isinstance(source, torch.nn.Module) else load(source)
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids])).logits[0]


def importance_for(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Mean squared inputs that differ by orders of magnitude, as those of real models do."""
    generator = np.random.default_rng(seed)
    return {
        name.removesuffix(".weight"): generator.lognormal(0, 1.5, tensor.shape[1]).astype(np.float32)
        for name, tensor in load_file(folder / "model.safetensors").items()
        if tensor.ndim == 2
    }


class TestContract:
    """Every family keeps all of this."""

    def test_float32_computes_the_same_to_the_bit(self, folder: Path, tmp_path: Path) -> None:
        out = export(folder, tmp_path / "out", quant="float32")
        ids = documents(380, count=1)[0]
        assert torch.equal(logits(out, ids), logits(folder, ids))
        assert quant_of(out) == "float32"
        assert locate(folder, out, "float32") is None

    def test_folder_has_all_that_vllm_serves(self, folder: Path, tmp_path: Path) -> None:
        out = export(folder, tmp_path / "out", quant="bfloat16")
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == [type(load(folder)).__name__]
        assert config["dtype"] == "bfloat16"
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
        ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(folder)
        text = "Hello <|im_start|> Wörld"
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.chat_template == theirs.chat_template
        assert json.loads((out / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == 3

    @pytest.mark.parametrize("quant", QUANTISED)
    def test_library_decompresses_to_within_the_rounding(
        self, folder: Path, tmp_path: Path, quant: str
    ) -> None:
        out = export(folder, tmp_path / "out", quant=quant)
        original, found = weights_of(folder), weights_of(out)
        assert original.keys() == found.keys()
        stored = load_file(out / "model.safetensors")
        quantised = {f"{name.removesuffix('_scale')}" for name in stored if name.endswith("weight_scale")}
        assert quantised == {name for name in original if original[name].ndim == 2 and ".layers." in name}
        for name, wanted in original.items():
            if name not in quantised:
                assert torch.equal(found[name], wanted.to(torch.bfloat16).float()), name
                continue
            scale = (
                stored[f"{name}_scale"]
                .float()
                .repeat_interleave(wanted.shape[1] // stored[f"{name}_scale"].shape[1], dim=1)
            )
            error = (found[name] - wanted).abs()
            if quant == "fp8":  # 3 bits after the point; 2^-10 of the scale below the normal numbers
                allowed = torch.maximum(wanted.abs() / 16, scale / 1024)
            else:
                lowest, highest = (-128, 127) if quant == "int8" else (-8, 7)
                clipped = wanted.clamp(lowest * scale, highest * scale)
                error, allowed = (found[name] - clipped).abs(), scale / 2
            # found is rounded once more: to the bfloat16 that scales and weights have in the folder
            assert bool((error <= allowed + wanted.abs() / 128 + 1e-6).all()), name
        assert quant_of(out) == quant
        assert locate(folder, out, quant) is None

    @pytest.mark.parametrize("quant", PRECISIONS)
    def test_check_says_everything_before_any_work(self, folder: Path, quant: str) -> None:
        index = open_checkpoint(folder)
        if index.family.overflows_float16 and quant == "float16":
            with pytest.raises(ExportError, match="bfloat16 or float32"):
                check(index, quant)
            return
        notes = check(index, quant)
        assert any("tensor parallelism that divide it: 1" in note for note in notes)
        assert any("rounded" in note or "--dtype float32" in note or "zero" in note for note in notes)


def test_the_registry_and_the_limits_know_every_precision() -> None:
    assert set(FORMATS["vllm"].quants) == set(PRECISIONS)
    assert all(limits_for("vllm", quant).perplexity_ratio_max for quant in PRECISIONS)


def test_int4_nibbles_are_what_the_layout_says(llama: Path, tmp_path: Path) -> None:
    """An unpacking of our own: eight values to an int32, lowest bits first, stored plus eight."""
    out = export(llama, tmp_path / "out", quant="int4")
    stored, found = load_file(out / "model.safetensors"), weights_of(out)
    stem = "model.layers.1.mlp.down_proj.weight"
    packed = stored[f"{stem}_packed"].numpy().view(np.uint32)
    values = np.stack([(packed >> (4 * i)) & 15 for i in range(8)], axis=-1).reshape(64, 96).astype(int) - 8
    scale = stored[f"{stem}_scale"].float().numpy().repeat(32, axis=1)
    assert stored[f"{stem}_shape"].tolist() == [64, 96]
    assert np.allclose(values * scale, found[stem].numpy(), rtol=1 / 128)


class TestCalibration:
    """The scales of 4-bit groups."""

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from([32, 64, 128]), st.booleans())
    def test_search_finds_what_a_fine_grid_finds(self, seed: int, group: int, weighted: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(48, group, generator=generator) * torch.rand(48, 1, generator=generator)
        share = torch.rand(group, generator=generator) ** 4 + 0.01 if weighted else None
        scale = search_scales(weight, group, share, torch.float32)
        ones = torch.ones(group) if share is None else share

        def error(s: torch.Tensor) -> torch.Tensor:
            return (ones * (weight - s * (weight / s).round().clamp(-8, 7)) ** 2).sum(dim=1)

        largest = weight.abs().amax(dim=1, keepdim=True)
        fine = torch.stack([error(largest * ratio / 7.5) for ratio in np.linspace(0.3, 1.2, 500)])
        assert float(error(scale).sum()) <= 1.1 * float(fine.amin(dim=0).sum())
        assert bool((error(scale) <= error(largest / 7.5) * (1 + 1e-6)).all())

    def test_zeros_and_unused_features_are_harmless(self) -> None:
        weight = torch.zeros(2, 64)
        weight[1, :32] = torch.linspace(-1, 1, 32)
        parts = compress(weight, PRECISIONS["int4"], 32, torch.zeros(64))
        assert torch.isfinite(parts["weight_scale"]).all()
        assert (parts["weight_scale"] > 0).all()

    def test_importance_lowers_the_weighted_error_of_every_layer(self, llama: Path, tmp_path: Path) -> None:
        importance = importance_for(llama)
        plain = weights_of(export(llama, tmp_path / "plain", quant="int4"))
        weighed = weights_of(export(llama, tmp_path / "weighed", quant="int4", importance=importance))
        original = weights_of(llama)
        for name in original:
            if ".layers." in name and original[name].ndim == 2:
                h = torch.from_numpy(importance[name.removesuffix(".weight")])
                before, after = (
                    float((h * (side[name] - original[name]) ** 2).sum()) for side in (plain, weighed)
                )
                assert after < 0.9 * before, name
        assert locate(llama, tmp_path / "weighed", "int4") is None

    @pytest.mark.parametrize(
        ("change", "reason"), [("missing", "no entry"), ("short", "96 finite"), ("nan", "96 finite")]
    )
    def test_importance_that_does_not_fit_is_refused(
        self, llama: Path, tmp_path: Path, change: str, reason: str
    ) -> None:
        importance = importance_for(llama)
        key = "model.layers.1.mlp.down_proj"
        if change == "missing":
            del importance[key]
        elif change == "short":
            importance[key] = importance[key][:-1]
        else:
            importance[key][3] = np.nan
        with pytest.raises(ExportError, match=reason):
            export(llama, tmp_path / "out", quant="int4", importance=importance)
        assert not (tmp_path / "out").exists()

    def test_rows_in_chunks_equal_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(0))
        for quant, group in (("int4", 32), ("int8", None), ("fp8", None)):
            whole = compress(weight, PRECISIONS[quant], group)
            monkeypatch.setattr(vllm_schemes, "_CHUNK_ELEMENTS", 64 * 5)
            chunked = compress(weight, PRECISIONS[quant], group)
            monkeypatch.undo()
            assert all(torch.equal(whole[name].float(), chunked[name].float()) for name in whole)


class TestShapes:
    """Groups, ranks and head counts."""

    def test_rows_that_no_group_fills_stay_bfloat16(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "m", TinyConfig("llama", {**SIZES, "intermediate_size": 80}))
        notes = check(open_checkpoint(folder), "int4")
        assert any("mlp.down_proj stay bfloat16" in note for note in notes)
        out = export(folder, tmp_path / "out", quant="int4")
        found, wanted = weights_of(out), weights_of(folder)
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(found[name], wanted[name].to(torch.bfloat16).float())
        assert quant_of(out) == "int4"
        assert locate(folder, out, "int4") is None

    @pytest.mark.parametrize(("wanted", "ffn", "group"), [(128, 256, 128), (64, 256, 64), (128, 192, 64)])
    def test_group_is_the_largest_that_fills_rows(
        self, tmp_path: Path, wanted: int, ffn: int, group: int
    ) -> None:
        config = {"hidden_size": 128, "intermediate_size": ffn, "num_hidden_layers": 1}
        folder = make_folder(tmp_path / "m", TinyConfig("llama", config))
        out = export(folder, tmp_path / "out", quant="int4", options=Options(group_size=wanted))
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == group

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "ffn", "group", "sizes"),
        [
            (8, 2, 256, None, (1, 2, 4, 8)),
            (8, 4, 96, None, (1, 2, 4, 8)),
            (8, 4, 96, 32, (1,)),
            (8, 2, 256, 32, (1, 2, 4, 8)),
            (9, 3, 1536, None, (1, 3)),
        ],
    )
    def test_tensor_parallel_sizes(
        self, tmp_path: Path, heads: int, kv_heads: int, ffn: int, group: int | None, sizes: tuple[int, ...]
    ) -> None:
        config = {
            "hidden_size": 8 * heads, "head_dim": 32, "num_attention_heads": heads, "num_hidden_layers": 1,
            "num_key_value_heads": kv_heads, "intermediate_size": ffn,
        }  # fmt: skip
        folder = make_folder(tmp_path / "m", TinyConfig("llama", config))
        # the vocabulary of 387 is padded to 448 = 7 x 64, which 3 does not divide
        wanted = tuple(size for size in sizes if 448 % size == 0)
        assert tensor_parallel_sizes(open_checkpoint(folder), group) == wanted

    def test_head_counts_that_llama_refuses_go_to_a_sibling(self, tmp_path: Path) -> None:
        cases = {
            "mistral": ("mistral", {**ODD, "sliding_window": None}),
            "seed_oss": (
                "seed_oss",
                {**ODD, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
            ),
        }
        for sibling, (made_as, config) in cases.items():
            folder = make_folder(tmp_path / sibling, TinyConfig(made_as, config))
            rewrite_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
            with pytest.raises(Exception, match="not a multiple"):
                load(folder)
            notes = check(open_checkpoint(folder), "float32")
            assert any(f"the folder says {sibling!r}" in note for note in notes)
            out = export(folder, tmp_path / f"{sibling}-out", quant="float32")
            ids = documents(380, count=1)[0]
            assert torch.allclose(logits(out, ids), logits(unchecked_llama(folder), ids), atol=1e-5)

    def test_wide_attention_of_qwen2_goes_to_a_sibling(self, tmp_path: Path) -> None:
        config = {**ODD, "num_attention_heads": 6, "num_key_value_heads": 2}
        folder = make_folder(tmp_path / "m", TinyConfig("qwen2", config, QWEN2))
        out = export(folder, tmp_path / "out", quant="float32")
        assert json.loads((out / "config.json").read_text(encoding="utf-8"))["model_type"] == "seed_oss"
        ids = documents(380, count=1)[0]
        assert torch.allclose(logits(out, ids), logits(folder, ids), atol=1e-5)

    def test_head_counts_without_a_sibling_are_refused(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "m", TinyConfig("gemma3_text", {**SIZES, **GEMMA3}))
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if "q_proj" in name:
                weights[name] = weights[name][:96].clone()
            elif "o_proj" in name:
                weights[name] = weights[name][:, :96].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name in list(weights):
            if "k_proj" in name or "v_proj" in name:
                weights[name] = weights[name][:32].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        rewrite_config(folder, num_attention_heads=3, num_key_value_heads=1)
        with pytest.raises(ExportError, match="no other family computes the same"):
            check(open_checkpoint(folder), "float32")


def unchecked_llama(folder: Path) -> Any:
    """The stock llama code with the folder's head count, past the check of its config."""
    plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = plain.pop("num_attention_heads")
    config = LlamaConfig(**{**plain, "num_attention_heads": 4, "num_key_value_heads": 1})
    object.__setattr__(config, "num_attention_heads", heads)
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model
