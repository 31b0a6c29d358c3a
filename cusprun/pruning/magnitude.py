"""Squared norms of the weights that belong to each unit, by the meaning of the tensors' axes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch

from cusprun.families import TensorSpec, axis_length
from cusprun.records import Shape

_UNIT_AXES = ("ffn", "heads", "kv")
_CHUNK_ELEMENTS = 1 << 20
"""Weights that are squared in float64 at one time, 16 MB: a whole matrix of an 8B model would be 0.9 GB."""


def axis_squares(tensors: Iterable[tuple[TensorSpec, torch.Tensor]], shape: Shape) -> dict[str, torch.Tensor]:
    """Return, for the axes ``ffn``, ``heads`` and ``kv``, the squared weights at each position, added up.

    Every tensor with such an axis counts, biases too; a fused axis (parts joined by ``+``) counts for each
    of its parts. Float64 [length of the axis].
    """
    squares: dict[str, torch.Tensor] = {}
    for spec, tensor in tensors:
        for axis, name in enumerate(spec.axes):
            parts = name.split("+")
            if not set(parts) & set(_UNIT_AXES):
                continue
            along = squares_along(tensor, axis)
            for part, piece in zip(
                parts, along.split_with_sizes([axis_length(p, shape) for p in parts]), strict=True
            ):
                if part in _UNIT_AXES:
                    squares[part] = squares[part] + piece if part in squares else piece
    return squares


def squares_along(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Return the squares of a tensor's entries, added up over every axis but one: float64 [length]."""
    others = [other for other in range(tensor.dim()) if other != axis]
    if not others:
        return tensor.double().square()
    step = max(1, _CHUNK_ELEMENTS // max(1, tensor[0].numel()))
    parts = (chunk.double().square().sum(dim=others) for chunk in torch.split(tensor, step))
    return torch.cat(list(parts)) if axis == 0 else reduce(torch.add, parts)


def unit_squares(tensors: Iterable[tuple[TensorSpec, torch.Tensor]], shape: Shape) -> dict[str, torch.Tensor]:
    """Return the squared norm of all weights of every unit, float64 [units] per kind of unit.

    A KV group holds its query heads, and the block holds them all (norms, which no unit owns, left out).
    """
    squares = axis_squares(tensors, shape)
    heads = squares["heads"].view(-1, shape.head_dim).sum(dim=1)
    groups = squares["kv"].view(-1, shape.head_dim).sum(dim=1)
    groups = groups + heads.view(-1, shape.queries_per_group).sum(dim=1)
    return {
        "ffn_channel": squares["ffn"],
        "query_head": heads,
        "kv_group": groups,
        "block": (squares["ffn"].sum() + groups.sum()).unsqueeze(0),
    }
