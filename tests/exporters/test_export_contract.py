"""What holds for the GGUF export of every family: the same logits, the same tokens, complete metadata."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import (
    QWEN2_PATTERN,
    TinyConfig,
    documents,
    make_folder,
    sentencepiece_tokenizer,
    split_then_bytes,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from cusprun.checkpoint.gguf_import import import_gguf
from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import UnsupportedModelError
from cusprun.families import families
from exporters.gguf import check, export
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


def gemma3(blocks: str, **config: Any) -> TinyConfig:
    """A Gemma 3 with a sliding window of 32 in the blocks marked ``s``; those marked ``f`` see everything."""
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    return TinyConfig(
        "gemma3_text",
        {
            "num_hidden_layers": len(blocks),
            "layer_types": [kinds[block] for block in blocks],
            "sliding_window": 32,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
            **config,
        },
    )


def phi3(partial_rotary_factor: float = 1.0, **config: Any) -> TinyConfig:
    """A Phi 3, of whose heads a part may be left unrotated."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial_rotary_factor}
    return TinyConfig("phi3", {"pad_token_id": 0, "rope_parameters": rope, **config})


GEMMA3_SCALED_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
}
FEWER_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
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
    "qwen2 llama3 rope": TinyConfig("qwen2", {"rope_parameters": LLAMA3_ROPE}, QWEN2),
    "mistral window that no text reaches": TinyConfig("mistral", {"sliding_window": 512}),
    "gemma3": gemma3("ssssssf"),
    "gemma3 other pattern": gemma3("sfs"),
    "gemma3 windows everywhere": gemma3("ss"),
    "gemma3 no windows": gemma3("ff"),
    "gemma3 fewer heads": gemma3("sf", num_attention_heads=2, num_key_value_heads=1, head_dim=24),
    "gemma3 own query scale": gemma3("sf", query_pre_attn_scalar=40, tie_word_embeddings=False),
    "gemma3 scaled rope": gemma3("sf", rope_parameters=GEMMA3_SCALED_ROPE),
    "phi3": phi3(),
    "phi3 tied": phi3(tie_word_embeddings=True, sliding_window=600),
    "phi3 fewer heads": phi3(**FEWER_HEADS),
    "phi3 partly rotated": phi3(0.75),
    "phi3 partly rotated, fewer heads": phi3(0.5, **FEWER_HEADS),
}
"""Configs that the contract runs for; a further family adds its own here."""


NOT_IMPORTED = {
    "phi3 partly rotated, fewer heads": "rope_freqs.weight",
    "qwen2 head_dim stated": "has no place for",
}
"""Files that llama.cpp runs and import refuses: rope factors that no parameters of transformers give, and
biases in a model whose heads only mistral's config takes."""

Exported = Callable[[str], Path]


def test_every_family_keeps_the_contract() -> None:
    assert {tiny.model_type for tiny in FAMILIES.values()} == families().keys()


def rescale(folder: Path, *, norms: float = 0.0, gates: float = 1.0) -> None:
    """Add ``norms`` to the weights of all norms, and multiply those of the FFN's gates."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        if "norm" in name:
            weights[name] += norms
        if "gate_proj" in name:
            weights[name] *= gates
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = FAMILIES[name]
    tokenizer = sentencepiece_tokenizer(prepend=False) if tiny.model_type == "gemma3_text" else None
    path = make_folder(tmp_path_factory.mktemp("model") / "tiny", tiny, tokenizer)
    if families()[tiny.model_type].norm_offset:
        rescale(path, norms=-1.0)  # stock code adds one to them
    return path


@pytest.fixture(scope="module")
def exported(folder: Path) -> Exported:
    """Export once for each precision."""

    def file(quant: str) -> Path:
        out = folder.parent / f"{quant}.gguf"
        return out if out.exists() else export(folder, out, quant=quant)

    return file


def torch_logits(folder: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def llama_cpp_logits(file: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    runtime = LlamaCppRuntime(file, n_threads=1, kv_cache="f32")
    try:
        return runtime.logits(ids)
    finally:
        runtime.close()


class TestExportContract:
    """Every family keeps all of this."""

    def test_f32_computes_the_same_as_transformers(
        self, folder: Path, exported: Exported, tmp_path: Path
    ) -> None:
        """llama.cpp looks GELU up in a table of float16, except beyond 10: there the rest is compared."""
        index = open_checkpoint(folder)
        file = exported("f32")
        if index.family.activation != "silu":
            shutil.copytree(folder, tmp_path / "large")
            rescale(tmp_path / "large", gates=300.0)
            folder, file = tmp_path / "large", export(tmp_path / "large", tmp_path / "m.gguf", quant="f32")
        ids = documents(index.shape.vocab_size, count=1, length=300)[0]
        wanted = torch_logits(folder, ids)
        assert np.abs(wanted).max() > 1
        assert np.abs(wanted - llama_cpp_logits(file, ids)).max() <= 1e-3

    @pytest.mark.parametrize("quant", ["f32", "f16"])
    def test_passes_the_gate(self, folder: Path, exported: Exported, quant: str) -> None:
        index = open_checkpoint(folder)
        limits = limits_for("gguf", quant, index.family.activation)
        reference = TorchRuntime(folder)
        candidate = LlamaCppRuntime(exported(quant), n_threads=1, kv_cache=limits.kv_cache or "f16")
        texts = probe_texts() if quant == "f32" else probe_texts()[::8]
        report = compare(reference, candidate, texts, documents(candidate.vocab_size), limits)
        candidate.close()
        assert report.failures == ()
        assert report.text.mismatch_count == 0
        assert bool(report.text.explained) == any("NFC" in loss for loss in check(index, quant))

    def test_import_gives_the_same_model_back(
        self, name: str, folder: Path, exported: Exported, tmp_path: Path
    ) -> None:
        if name in NOT_IMPORTED:
            with pytest.raises(UnsupportedModelError, match=NOT_IMPORTED[name]):
                import_gguf(exported("f32"), tmp_path / "back", dtype="float32")
            return
        back = import_gguf(exported("f32"), tmp_path / "back", dtype="float32")
        ids = documents(open_checkpoint(folder).shape.vocab_size, count=1, length=64)[0]
        wanted = torch_logits(folder, ids)
        assert np.abs(wanted - torch_logits(back, ids)).max() <= 1e-3
        texts = [unicodedata.normalize("NFC", text) for text in probe_texts()[::7]]
        before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, back))
        assert [after(text)["input_ids"] for text in texts] == [before(text)["input_ids"] for text in texts]

    def test_metadata_is_complete(self, folder: Path, exported: Exported) -> None:
        fields = {n: entry.contents() for n, entry in gguf.GGUFReader(exported("f16")).fields.items()}
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
            "vocab_size": config.vocab_size,
        }
        assert {key: fields[f"{arch}.{key}"] for key in wanted} == wanted
        rope = config.rope_parameters
        full = rope.get("full_attention", rope)
        share = (
            1.0
            if "rope_freqs.weight" in tensor_names(exported("f16"))
            else full.get("partial_rotary_factor", 1.0)
        )
        assert fields[f"{arch}.rope.dimension_count"] == int(share * head_dim)
        assert fields[f"{arch}.rope.freq_base"] == full["rope_theta"]
        assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
        kinds = getattr(config, "layer_types", None) or []
        if arch == "gemma3" and "sliding_attention" in kinds:
            assert fields[f"{arch}.attention.sliding_window"] == config.sliding_window
            assert fields[f"{arch}.attention.sliding_window_pattern"] == [
                kind == "sliding_attention" for kind in kinds
            ]
            assert fields[f"{arch}.rope.freq_base_swa"] == rope["sliding_attention"]["rope_theta"]
        else:
            assert not fields.get(f"{arch}.attention.sliding_window")

    def test_the_tokenizer_is_complete(self, folder: Path, exported: Exported) -> None:
        fields = {n: entry.contents() for n, entry in gguf.GGUFReader(exported("f16")).fields.items()}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = fields["tokenizer.ggml.tokens"]
        assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        assert len(tokens) == open_checkpoint(folder).shape.vocab_size
        assert fields.get("tokenizer.chat_template") == tokenizer.chat_template
        assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
        assert fields["tokenizer.ggml.add_bos_token"] == (
            tokenizer("x")["input_ids"] != tokenizer("x", add_special_tokens=False)["input_ids"]
        )

    @pytest.mark.parametrize(
        ("quant", "bound"),
        [("f32", 0.0), ("f16", 2.0**-11), ("bf16", 2.0**-8), ("q8_0", 1 / 127)],
    )
    def test_values_are_within_the_rounding_of_the_type(
        self, folder: Path, exported: Exported, quant: str, bound: float
    ) -> None:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(exported(quant)).tensors}
        weights = load_file(folder / "model.safetensors")
        offset = 1.0 if any("pre_feedforward" in source for source in weights) else 0.0  # of gemma's norms
        for theirs, ours in (
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
            ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"),
            ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
        ):
            wanted = weights[ours].numpy()
            is_vector = wanted.ndim == 1
            wanted = wanted + np.float32(offset) if is_vector else wanted
            found = gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            assert not is_vector or tensors[theirs].tensor_type == gguf.GGMLQuantizationType.F32
            scale = np.abs(wanted).max()
            assert np.abs(found - wanted).max() <= (0.0 if is_vector else bound * scale)


def tensor_names(file: Path) -> set[str]:
    return {tensor.name for tensor in gguf.GGUFReader(file).tensors}


def test_a_model_with_as_many_blocks_as_the_27b_one_keeps_its_query_scale(tmp_path: Path) -> None:
    """llama.cpp knows the 27B model by its 62 blocks and then scales queries by hidden size over heads."""
    tiny = gemma3("sssssf" * 10 + "ss", query_pre_attn_scalar=24, hidden_size=32, intermediate_size=32)
    folder = make_folder(tmp_path / "deep", tiny)
    rescale(folder, norms=-1.0, gates=300.0)
    ids = documents(200, count=1, length=40)[0]
    found = llama_cpp_logits(export(folder, tmp_path / "m.gguf", quant="f32"), ids)
    assert np.abs(torch_logits(folder, ids) - found).max() <= 1e-3
    back = import_gguf(tmp_path / "m.gguf", tmp_path / "back", dtype="float32")
    assert np.abs(torch_logits(back, ids) - found).max() <= 1e-3
