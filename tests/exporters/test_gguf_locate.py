"""Which tensor of a GGUF file parts from the folder first, found on files that were broken on purpose."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file, save_file
from tiny_exports import TinyConfig, make_folder, rewrite_config

from exporters.gguf import Options, export, locate

pytest.importorskip("llama_cpp")

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
ONE = Options(threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny", TinyConfig("llama", WIDE))


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0", "q6_k", "q4_k_m", "q2_k"])
def test_the_first_tensor_that_is_wrong_is_named(quant: str, folder: Path, tmp_path: Path) -> None:
    out = export(folder, tmp_path / "m.gguf", quant=quant, options=ONE)
    assert locate(folder, out, quant) is None
    wrong = {"blk.1.ffn_up.weight", "blk.1.attn_k.weight"}
    reader = gguf.GGUFReader(out, "r+")
    for tensor in reader.tensors:
        if tensor.name in wrong:  # reversed heads: the same values at the wrong rows
            tensor.data[:] = tensor.data[::-1].copy()
    del reader
    found = locate(folder, out, quant)
    assert found is not None
    assert found.startswith("blk.1.attn_k.weight (model.layers.1.self_attn.k_proj.weight) is off by 1.")


def test_a_scaled_norm_and_another_folder_are_named(folder: Path, tmp_path: Path) -> None:
    out = export(folder, tmp_path / "m.gguf", quant="q4_0", options=ONE)
    reader = gguf.GGUFReader(out, "r+")
    next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight").data[:] *= 1.01
    del reader
    assert str(locate(folder, out, "q4_0")).startswith(
        "output_norm.weight (model.norm.weight) is off by 0.01"
    )


def test_another_model_a_missing_and_a_narrower_tensor_are_named(folder: Path, tmp_path: Path) -> None:
    out = export(folder, tmp_path / "m.gguf", quant="q4_0", options=ONE)
    other = make_folder(tmp_path / "other", TinyConfig("llama", {**WIDE, "intermediate_size": 256}))
    assert "token_embd.weight (model.embed_tokens.weight) is off by 1.4" in str(locate(other, out, "q4_0"))
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if ".layers.1." in name]:
        weights[name.replace(".layers.1.", ".layers.2.")] = weights[name].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(other, num_hidden_layers=3, intermediate_size=512)
    assert "blk.2.attn_norm.weight is missing from m.gguf" in str(locate(other, out, "q4_0"))
    for name in weights:
        if "gate_proj" in name or "up_proj" in name:
            weights[name] = weights[name][:256].clone()
        elif "down_proj" in name:
            weights[name] = weights[name][:, :256].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(other, intermediate_size=256)
    assert "blk.0.ffn_gate.weight has the shape (512, 256) in m.gguf" in str(locate(other, out, "q4_0"))
