"""Folders whose files contradict each other: read as stock transformers reads them, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model
from transformers import AutoModelForCausalLM

from cusprun.checkpoint.index import open_checkpoint
from cusprun.checkpoint.reader import read_tensor
from cusprun.errors import ModelError

NORM = "model.norm.weight"


def test_a_single_file_counts_before_an_index(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    stock = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
    assert torch.equal(read_tensor(open_checkpoint(folder), NORM), stock)


@pytest.mark.parametrize("change", ["values", "dtype"])
def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused(tmp_path: Path, change: str) -> None:
    folder = save_model(tmp_path / "tiny", "qwen2")
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    assert "lm_head.weight" not in open_checkpoint(folder).tensors
    other = head.flip(0).contiguous() if change == "values" else head.half()
    save_file({**weights, "lm_head.weight": other}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"ties the embeddings, and the folder holds another lm_head\.weight"
    ):
        open_checkpoint(folder)
