"""Models that cannot be pruned: refused by what their config or tensors give away, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import UnsupportedModelError
from cusprun.families import families
from cusprun.families.features import unsupported_feature


def edited(tmp_path: Path, family: str, **changes: Any) -> Path:
    folder = save_model(tmp_path / "model", family)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"model_type": "gpt_oss", "num_local_experts": 32}, "mixture of experts"),
        ("qwen3", {"num_experts": 64}, r"mixture of experts \(num_experts = 64\)"),
        ("llama", {"model_type": "deepseek_v3", "n_routed_experts": 256}, "mixture of experts"),
        ("llama", {"add_swa_attention_sink_bias": True}, "attention sinks"),
        ("llama", {"is_encoder_decoder": True}, r"cross-attention.*is_encoder_decoder"),
        ("llama", {"model_type": "t5", "is_encoder_decoder": True}, "cross-attention"),
        ("llama", {"add_cross_attention": True}, "cross-attention"),
        ("llama", {"cross_attention_layers": [1]}, "cross-attention"),
        ("gemma3", {"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, "text model.*gemma3_text"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "caps its logits"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "caps its logits"),
        ("gemma3", {"use_bidirectional_attention": True}, "see later ones"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'.*length"),
        ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, "'su'"),
        ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "'yarn'"),
        ("llama", {"model_type": "mamba"}, r"'mamba', which is not supported \(supported: .*gemma3_text"),
    ],
)
def test_features_of_a_config(tmp_path: Path, family: str, changes: dict[str, Any], words: str) -> None:
    refused(edited(tmp_path, family, **changes), words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.sinks", "attention sink"),
        ("model.layers.0.mlp.experts.0.down_proj.weight", "mixture of experts"),
        ("model.layers.0.cross_attn.q_proj.weight", "cross-attention"),
        ("vision_tower.embeddings.weight", "text model"),
    ],
)
def test_features_of_a_tensor(tmp_path: Path, name: str, words: str) -> None:
    folder = save_model(tmp_path / "model", "llama")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(4)}, path, metadata={"format": "pt"})
    refused(folder, f"{name}.*{words}")


@pytest.mark.parametrize("model_type", families())
def test_what_stock_configs_write_by_default_is_no_feature(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type).to_dict()
    assert unsupported_feature(config, families()[model_type].length_dependent_rope_types) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 0, "num_local_experts": 1},
        {"is_encoder_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"vision_config": None, "final_logit_softcapping": None},
    ],
)
def test_keys_that_switch_a_feature_off(changes: dict[str, Any]) -> None:
    assert unsupported_feature(changes) is None
