"""Scales of 4-bit weight groups, chosen so that the rounded weights change the layer's output least."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOWEST, HIGHEST = -8, 7
"""The integers of 4 bits, symmetric around -0.5."""

_RATIOS = tuple(0.28 + 0.03 * step for step in range(29))
_REFINEMENTS = 2
_FLOOR = 1e-4
"""Least weight of an input feature, as a share of the mean: a feature that no calibration token used keeps a
say, so that its weights are not thrown away."""


def search_scales(
    weight: torch.Tensor, group_size: int, importance: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return a scale for each group of ``group_size`` weights of a row, ``[rows, groups]`` in ``dtype``.

    ``weight`` is float32 ``[rows, columns]``; ``importance``, float32 ``[columns]``, is the mean squared
    input of each column (all equal when None). Each scale s minimises

        sum_j h_j (w_j - s q_j)^2   with   q_j = clamp(round(w_j / s), -8, 7)

    over 29 ratios r of s = r max|w| / 7.5, from 0.28 to 1.12, and then over the least-squares optimum for
    fixed q, s = sum h w q / sum h q^2, rounded to ``dtype`` before it is judged. With h_j = E[x_j^2] the sum
    is the expected squared change of the layer's output for uncorrelated input features: the diagonal of the
    second moment that GPTQ (arXiv 2210.17323) takes whole, and llama.cpp's importance matrix.
    """
    import torch

    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group_size, group_size)
    share = None
    if importance is not None:
        share = (importance / importance.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(_FLOOR)
        share = share.reshape(1, columns // group_size, group_size)
    largest = groups.abs().amax(dim=-1)
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for scale in _candidates(groups, share, largest, best, dtype):
        error = _error(groups, share, scale)
        better = error < least
        best.copy_(torch.where(better, scale, best))
        least = torch.where(better, error, least)
    return best.to(dtype)


def _candidates(
    groups: torch.Tensor,
    share: torch.Tensor | None,
    largest: torch.Tensor,
    best: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[torch.Tensor]:
    """Yield the scales to try; ``best`` is read again for each refinement, after it was judged."""
    import torch

    # A group of zeros takes any scale; one keeps the division harmless.
    step = torch.where(largest > 0, largest / ((HIGHEST - LOWEST) / 2), torch.ones_like(largest))
    tiny = torch.finfo(dtype).tiny
    for ratio in _RATIOS:
        yield (step * ratio).clamp_min(tiny).to(dtype).float()
    for _ in range(_REFINEMENTS):
        rounded = _rounded(groups, best)
        weighted = rounded if share is None else rounded * share
        optimum = (weighted * groups).sum(dim=-1) / (weighted * rounded).sum(dim=-1).clamp_min(tiny)
        yield torch.where(optimum > 0, optimum, step).clamp_min(tiny).to(dtype).float()


def _rounded(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (groups / scale[..., None]).round_().clamp_(LOWEST, HIGHEST)


def _error(groups: torch.Tensor, share: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    change = _rounded(groups, scale).mul_(scale[..., None]).sub_(groups).square_()
    return (change if share is None else change.mul_(share)).sum(dim=-1)
