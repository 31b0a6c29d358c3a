"""FLAP's biases in memory, for families whose last projections have no place for one in a checkpoint.

The rule ``variance+bias`` is refused for them, and is measured beside the others all the same: stock
transformers loads the cut model, and every cut projection gets the mean output of the channels that went,
over the calibration tokens of the uncut model (arXiv 2312.11983, section 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import stock_model
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import PlanError
from cusprun.pruning.biases import bias_flags
from cusprun.pruning.refit import mean_bias
from cusprun.pruning.slicing import kept_positions
from cusprun.records import Plan, TokenizedDocument

RULE = "variance+bias"


def has_place_for_biases(index: CheckpointIndex) -> bool:
    """Tell whether a checkpoint of the family can hold the biases of the rule."""
    try:
        bias_flags(index.family, RULE)
    except PlanError:
        return False
    return True


def biased_model(
    index: CheckpointIndex, plan: Plan, folder: Path, documents: Sequence[TokenizedDocument]
) -> Any:
    """Return the expert in ``folder``, written by ``plan`` without compensation, with biases added."""
    biases = dict(_biases(index, plan, documents))
    expert = stock_model(folder)
    for name, bias in biases.items():
        projection = expert.get_submodule(name)
        own = 0 if projection.bias is None else projection.bias.detach()
        projection.bias = nn.Parameter(own + bias, requires_grad=False)
    return expert


def _biases(
    index: CheckpointIndex, plan: Plan, documents: Sequence[TokenizedDocument]
) -> Mapping[str, torch.Tensor]:
    """Return the bias of every cut projection by the module's name in the expert, float32 [features]."""
    family = index.family
    cut: dict[str, tuple[str, list[int]]] = {}
    for number, (layer, kept) in enumerate(zip(plan.kept_blocks, plan.layers, strict=True)):
        for axis, projection in (
            ("heads", family.modules.attention_output),
            ("ffn", family.modules.mlp_output),
        ):
            keep = kept_positions(axis, kept, index.shape)
            if keep is not None:
                name = f"{family.layer_prefix(layer)}{projection}"
                cut[name] = (f"{family.layer_prefix(number)}{projection}", keep)
    model = stock_model(index.folder)
    means = _mean_inputs(model.get_submodule(family.modules.decoder), model, list(cut), documents)
    return {
        written: mean_bias(model.get_submodule(name).weight.detach(), means[name], keep)
        for name, (written, keep) in cut.items()
    }


@torch.inference_mode()
def _mean_inputs(
    decoder: Any, model: Any, names: Sequence[str], documents: Sequence[TokenizedDocument]
) -> dict[str, torch.Tensor]:
    """Return the mean over all tokens of what some projections are given: float64 [channels] by name."""
    sums: dict[str, torch.Tensor] = {}

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            added = args[0].double().sum(dim=(0, 1))
            sums[name] = sums[name] + added if name in sums else added

        handle: torch.utils.hooks.RemovableHandle = model.get_submodule(name).register_forward_pre_hook(hook)
        return handle

    handles = [keep(name) for name in names]
    for document in documents:
        decoder(input_ids=torch.tensor([document.token_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    tokens = sum(len(document.token_ids) for document in documents)
    return {name: total.clone() / tokens for name, total in sums.items()}
