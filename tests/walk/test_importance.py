"""The importance of input features against hooks on the stock model that holds everything at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, documents, save_model
from transformers import AutoModelForCausalLM

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import CorpusError, ModelError
from cusprun.walk.importance import importance_of


def by_hooks(folder: Path, token_ids: list[tuple[int, ...]]) -> dict[str, np.ndarray[Any, Any]]:
    """Run one document at a time, without padding, and keep every input of every linear layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _module, args, _output, name=name: seen.setdefault(name, []).append(args[0][0])
            )
    with torch.no_grad():
        for ids in token_ids:
            model(torch.tensor([ids]))
    return {name: torch.cat(rows).double().square().mean(dim=0).numpy() for name, rows in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_mean_square_that_hooks_on_the_stock_model_see(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", family)
    token_ids = [document.token_ids for document in documents(7)]
    wanted = by_hooks(folder, token_ids)
    found = importance_of(open_checkpoint(folder), token_ids)
    assert found.keys() == wanted.keys()
    assert "lm_head" in found
    for name, mean in found.items():
        assert mean.dtype == np.float32
        np.testing.assert_allclose(mean, wanted[name], rtol=1e-3, atol=1e-6 * wanted[name].max())


def test_fused_projections_have_one_entry_each(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "phi3")
    found = importance_of(open_checkpoint(folder), [(3, 4, 5)])
    names = {name.partition("layers.0.")[2] for name in found} - {""}
    assert names == {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}


def test_documents_of_no_tokens_count_for_nothing(tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model"))
    alone = importance_of(index, [(5, 6, 7)])
    among = importance_of(index, [(), (5, 6, 7), ()])
    assert all(np.array_equal(alone[name], among[name]) for name in alone)
    for none in ([], [()]):
        with pytest.raises(CorpusError, match="calibration"):
            importance_of(index, none)


def test_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="block 1"):
        importance_of(open_checkpoint(folder), [(1, 2, 3)])
