"""Tiny models built in code, seeded, saved as the stock folders that users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cusprun.records import TokenizedDocument

VOCAB = 96
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied-biased": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-wide-heads": {"model_type": "llama", "tie_word_embeddings": False, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None},
    "mistral-sliding": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 4},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 12},
    "qwen3-sliding-biased": {
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "head_dim": 8,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False, "pad_token_id": 0},
    "phi3-partial-rotary": {
        "model_type": "phi3",
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}
"""One entry for each shape of family that the contract covers."""


def build_model(name: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """Build a tiny stock model in float32 with weights large enough that every unit matters."""
    settings = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **FAMILIES[name],
        **overrides,
    }
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name_, parameter in model.named_parameters():
        if "norm" in name_:
            parameter.data += 0.1 * torch.randn(parameter.shape)
        elif parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def save_model(folder: Path, name: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model as a Hugging Face folder and return the folder."""
    build_model(name, seed, **overrides).save_pretrained(folder)
    return folder


def documents(count: int = 6, seed: int = 0, dimension: str = "domain") -> tuple[TokenizedDocument, ...]:
    """Return random documents of 5 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(5, 31, (1,), generator=generator))
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        made.append(TokenizedDocument(dimension, f"{dimension}-{seed}-{number}", tuple(ids.tolist())))
    return tuple(made)
