"""Cutting tensors to the units that survive, by the meaning of their axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cusprun.families import TensorSpec, axis_length
from cusprun.records import LayerPlan, Shape


def kept_positions(axis: str, plan: LayerPlan, shape: Shape) -> list[int] | None:
    """Return the surviving positions along an axis of the uncut shape, or None when all survive.

    A fused axis (parts joined by ``+``) is the concatenation of its parts, each cut by itself.
    """
    parts = axis.split("+")
    cuts = [_part_positions(part, plan, shape) for part in parts]
    if all(cut is None for cut in cuts):
        return None
    positions: list[int] = []
    start = 0
    for part, cut in zip(parts, cuts, strict=True):
        length = axis_length(part, shape)
        positions.extend(start + position for position in (range(length) if cut is None else cut))
        start += length
    return positions


def _part_positions(part: str, plan: LayerPlan, shape: Shape) -> Sequence[int] | None:
    kept = {"heads": plan.query_heads, "kv": plan.kv_groups, "ffn": plan.ffn_channels}.get(part)
    if kept is None:
        return None
    width = 1 if part == "ffn" else shape.head_dim
    if len(kept) * width == axis_length(part, shape):
        return None
    return [unit * width + offset for unit in kept for offset in range(width)]


def cut_tensor(tensor: torch.Tensor, spec: TensorSpec, plan: LayerPlan, shape: Shape) -> torch.Tensor:
    """Return the surviving part of one tensor of a block; ``shape`` is the uncut model's."""
    for axis, name in enumerate(spec.axes):
        positions = kept_positions(name, plan, shape)
        if positions is not None:
            tensor = tensor.index_select(axis, torch.tensor(positions))
    return tensor
