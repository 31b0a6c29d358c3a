"""Optimal brain surgeon on a projection's channels: which ones the refit can best do without.

In the refit's own metric A = G + ridge * I, removing channel k and re-solving the others costs
|W_k|^2 / (A^-1)_kk (Hassibi and Stork, 1993, for all output features at once). The cheapest channels go in a
few rounds; after each, W and A^-1 are those of the smaller problem, by block elimination.
"""

from __future__ import annotations

import torch

from cusprun.pruning.refit import DEFAULT_RIDGE, factor

ROUNDS = 16
"""One channel at a time would be exact, and slow; each round sees what the last one left."""


def choose_channels(
    weight: torch.Tensor,
    gram: torch.Tensor,
    count: int,
    *,
    cross: torch.Tensor | None = None,
    unit: float | None = None,
    ridge: float = DEFAULT_RIDGE,
    rounds: int = ROUNDS,
) -> list[int]:
    """Return the ``count`` channels to keep, ascending.

    Args:
        weight: the projection, [features, n], on the device of ``gram``.
        gram: a^T a over calibration tokens, symmetric float64 [n, n].
        count: channels that stay.
        cross: d^T a, [features, n], where the target is d beyond the projection's own output: then W is
            what would be solved for with all channels, W + cross A^-1.
        unit: what a ridge of one adds to the diagonal; the mean diagonal of ``gram`` when it is not given.
        ridge: share of ``unit``.
        rounds: in how many steps the others go.
    """
    width = gram.shape[0]
    kept = torch.arange(width, device=gram.device)
    current = weight.double()
    unit = float(gram.diagonal().mean()) if unit is None else unit
    inverse = torch.cholesky_inverse(factor(gram.double(), ridge * unit))
    if cross is not None:
        current = current + cross.double() @ inverse
    for step in range(1, rounds + 1):
        stay = width - round((width - count) * step / rounds)
        leaving = len(kept) - stay
        if not leaving:
            continue
        cost = current.square().sum(dim=0) / inverse.diagonal()
        order = torch.sort(cost, stable=True).indices
        gone, left = order[:leaving], order[leaving:].sort().values
        spread = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, left])
        current = current[:, left] - current[:, gone] @ spread
        inverse = inverse[left][:, left] - inverse[left][:, gone] @ spread
        kept = kept[left]
    return [int(channel) for channel in kept.tolist()]
