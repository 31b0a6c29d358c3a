"""The type in which a block's products are made, beside the float32 of all else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Linear = Callable[[torch.Tensor], torch.Tensor]


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    """Return what applies a weight [features, n] to float32 [..., n], with products in ``dtype``.

    Sums are float32, which torch's kernels keep for bfloat16 too; each result is rounded to ``dtype`` once.
    """
    if dtype == torch.float32:
        return lambda rows: nn.functional.linear(rows, weight, bias)
    rounded = weight.to(dtype)

    def apply(rows: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(rows.to(dtype), rounded).float()
        return product if bias is None else product.add_(bias)

    return apply


class RoundedLinear(nn.Module):
    """Stands in for a linear layer: its weight and what it is given are rounded, its bias is not."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., features] for float32 [..., n]."""
        return linear_of(self.weight, self.bias, self.weight.dtype)(rows)


def is_linear_weight(module: nn.Module, name: str) -> bool:
    """Tell whether a parameter, by its path, is the weight of a linear layer."""
    path, _, own = name.rpartition(".")
    return own == "weight" and isinstance(module.get_submodule(path), nn.Linear)


def round_products(block: nn.Module) -> None:
    """Put a :class:`RoundedLinear` in the place of every linear layer whose weight is not float32."""
    for path, module in list(block.named_modules()):
        if isinstance(module, nn.Linear) and module.weight.dtype != torch.float32:
            block.set_submodule(path, RoundedLinear(module.weight, module.bias))
