"""Tiny models of every family in sizes that vLLM's schemes take, and how the library reads the exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_exports import QWEN2_PATTERN, TinyConfig, split_then_bytes
from transformers import AutoModelForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 96}
QWEN2 = {"pre": split_then_bytes(QWEN2_PATTERN), "nfc": True, "bos": False}
GEMMA3 = {
    "head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
FAMILIES = {
    "llama": TinyConfig("llama", SIZES),
    "mistral": TinyConfig("mistral", {**SIZES, "sliding_window": None}),
    "qwen2": TinyConfig("qwen2", {**SIZES, "tie_word_embeddings": True}, QWEN2),
    "qwen3": TinyConfig("qwen3", {**SIZES, "head_dim": 32}, QWEN2),
    "gemma3": TinyConfig("gemma3_text", {**SIZES, **GEMMA3}),
    "phi3": TinyConfig("phi3", {**SIZES, "pad_token_id": 0, "sliding_window": None}),
}
ODD = {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}


def load(folder: Path) -> Any:
    """Stock transformers, which hands quantised folders to compressed-tensors."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights as the library decompresses them; those of a tied head left out."""
    model = load(folder)
    model(torch.tensor([[1]]))  # quantised weights are decompressed when they are first used
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name.endswith(".weight")}
