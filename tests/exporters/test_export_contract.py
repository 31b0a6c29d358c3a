"""What holds for the GGUF export of every family: the same logits, the same tokens, complete metadata."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_exports import QWEN2_PATTERN, TinyConfig, documents, make_folder, split_then_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

from cusprun.checkpoint.index import open_checkpoint
from exporters.gguf import check, export_gguf
from exporters.gguf_tensors import FAMILIES as WRITABLE
from exporters.parity import compare
from exporters.parity_records import limits_for
from exporters.parity_text import probe_texts
from serve.runtimes.llamacpp import LlamaCppRuntime
from serve.runtimes.torch_runtime import TorchRuntime

pytest.importorskip("llama_cpp")
torch.set_num_threads(1)

QWEN2 = {"pre": split_then_bytes(QWEN2_PATTERN), "nfc": True, "bos": False}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": TinyConfig("llama"),
    "llama tied": TinyConfig("llama", {"tie_word_embeddings": True}),
    "llama head_dim stated": TinyConfig("llama", {"head_dim": 32}),
    "llama one head per group": TinyConfig("llama", {"num_key_value_heads": 4, "head_dim": 8}),
    "llama biases": TinyConfig("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama llama3 rope": TinyConfig("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": TinyConfig(
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}
    ),
    "llama yarn rope": TinyConfig("llama", {"rope_parameters": YARN_ROPE}),
    "llama yarn magnitude": TinyConfig("llama", {"rope_parameters": {**YARN_ROPE, "attention_factor": 1.5}}),
    "llama padded vocabulary": TinyConfig("llama", padded_vocab=24),
    "qwen2": TinyConfig("qwen2", tokenizer=QWEN2),
    "qwen2 tied": TinyConfig("qwen2", {"tie_word_embeddings": True}, QWEN2),
    "qwen2 head_dim stated": TinyConfig("qwen2", {"head_dim": 24, "num_attention_heads": 6}, QWEN2),
    "mistral": TinyConfig("mistral", {"sliding_window": None}),
    "mistral odd heads": TinyConfig(
        "mistral", {"sliding_window": None, "num_attention_heads": 6, "head_dim": 12}
    ),
    "qwen3": TinyConfig("qwen3", {"head_dim": 16}, QWEN2),
    "qwen3 odd heads": TinyConfig(
        "qwen3", {"head_dim": 32, "num_attention_heads": 6, "tie_word_embeddings": True}, QWEN2
    ),
}
"""Configs that the contract runs for; a further family adds its own here."""


def test_every_family_that_can_be_written_keeps_the_contract() -> None:
    assert {tiny.model_type for tiny in FAMILIES.values()} == WRITABLE.keys()


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny", FAMILIES[request.param])


class TestExportContract:
    """Every family keeps all of this."""

    def test_f32_computes_the_same_as_transformers(self, folder: Path, tmp_path: Path) -> None:
        out = export_gguf(folder, tmp_path / "m.gguf", quant="f32")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        runtime = LlamaCppRuntime(out, n_threads=1, kv_cache="f32")
        ids = documents(runtime.vocab_size, count=1, length=300)[0]
        with torch.inference_mode():
            wanted = model(torch.tensor([ids])).logits[0].numpy()
        found = runtime.logits(ids)
        runtime.close()
        assert np.abs(wanted).max() > 1
        assert np.abs(wanted - found).max() <= 1e-3

    @pytest.mark.parametrize("quant", ["f32", "f16"])
    def test_passes_the_gate(self, folder: Path, tmp_path: Path, quant: str) -> None:
        out = export_gguf(folder, tmp_path / "m.gguf", quant=quant)
        limits = limits_for("gguf", quant)
        reference = TorchRuntime(folder)
        candidate = LlamaCppRuntime(out, n_threads=1, kv_cache=limits.kv_cache)
        report = compare(reference, candidate, probe_texts(), documents(candidate.vocab_size), limits)
        candidate.close()
        assert report.failures == ()
        assert report.text.mismatch_count == 0
        losses = check(open_checkpoint(folder), quant)
        assert bool(report.text.explained) == any("NFC" in loss for loss in losses)

    def test_metadata_is_complete(self, folder: Path, tmp_path: Path) -> None:
        out = export_gguf(folder, tmp_path / "m.gguf", quant="f16")
        fields = {name: entry.contents() for name, entry in gguf.GGUFReader(out).fields.items()}
        config = AutoModelForCausalLM.from_pretrained(folder).config
        arch = fields["general.architecture"]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        wanted = {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": head_dim,
            "vocab_size": config.vocab_size,
        }
        assert {key: fields[f"{arch}.{key}"] for key in wanted} == wanted
        assert fields[f"{arch}.rope.freq_base"] == config.rope_parameters["rope_theta"]
        assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = fields["tokenizer.ggml.tokens"]
        assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        assert len(tokens) == config.vocab_size
        assert fields["tokenizer.chat_template"] == tokenizer.chat_template
        assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
        assert fields["tokenizer.ggml.add_bos_token"] == (
            tokenizer("x")["input_ids"] != tokenizer("x", add_special_tokens=False)["input_ids"]
        )

    @pytest.mark.parametrize(
        ("quant", "bound"),
        [("f32", 0.0), ("f16", 2.0**-11), ("bf16", 2.0**-8), ("q8_0", 1 / 127)],
    )
    def test_values_are_within_the_rounding_of_the_type(
        self, folder: Path, tmp_path: Path, quant: str, bound: float
    ) -> None:
        out = export_gguf(folder, tmp_path / "m.gguf", quant=quant)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
        weights = load_file(folder / "model.safetensors")
        for theirs, ours in (
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
            ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
            ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ):
            wanted = weights[ours].numpy()
            found = gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            is_vector = wanted.ndim == 1
            assert not is_vector or tensors[theirs].tensor_type == gguf.GGMLQuantizationType.F32
            scale = np.abs(wanted).max()
            assert np.abs(found - wanted).max() <= (0.0 if is_vector else bound * scale)
