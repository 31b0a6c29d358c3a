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
        if parameter.dim() == 1 and "norm" not in name_:
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
