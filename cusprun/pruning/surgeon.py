"""Optimal brain surgeon on a projection's channels: which ones the refit can best do without.

In the refit's own metric A = G + ridge * I, removing channel k and re-solving the others costs
|W_k|^2 / (A^-1)_kk (Hassibi and Stork, 1993, for all output features at once). The cheapest channels go in a
few rounds; after each, W and A^-1 are those of the smaller problem, by block elimination. Of A^-1 that takes
its diagonal and the columns of channels that go, so it is a pivoted Cholesky factorisation of A^-1, whose
pivots the costs choose: A^-1 of what is left is A^-1 - E E^T, with as many columns in E as have gone.
"""

from __future__ import annotations

import torch

from cusprun.pruning.least_squares import Metric
from cusprun.pruning.triangle import factored, spans
from cusprun.walk.scratch import IN_MEMORY, Scratch

ROUNDS = 16
"""One channel at a time would be exact, and slow; each round sees what the last one left."""
_JITTER = 1e-14
"""Share of its mean diagonal that lets a block of A^-1 keep its factor in spite of rounding."""


def choose_channels(
    weight: torch.Tensor,
    metric: Metric,
    count: int,
    *,
    rounds: int = ROUNDS,
    scratch: Scratch = IN_MEMORY,
) -> list[int]:
    """Return the ``count`` channels to keep, ascending.

    Costs are compared in float32, to 1e-6: where two are nearer than that, either may go first.

    Args:
        weight: the projection, [features, n], on the device of the metric.
        metric: A^-1 over calibration tokens, and what their drift adds to W where no channel has gone.
        count: channels that stay.
        rounds: in how many steps the others go.
        scratch: where W in float32 and E in float64 lie.
    """
    width = weight.shape[1]
    current = scratch.copied(weight.T, torch.float32)  # of a channel, all is in one place
    if metric.moved is not None:
        for start, stop in spans(width):
            current[start:stop].add_(metric.moved[:, start:stop].T)
    eliminated = scratch.zeros((width, width - count), device=weight.device)
    diagonal = metric.inverse.diagonal()
    stays = torch.ones(width, dtype=torch.bool, device=weight.device)
    done = 0
    for step in range(1, rounds + 1):
        leaving = round((width - count) * step / rounds) - done
        if not leaving:
            continue
        cost = torch.linalg.vector_norm(current, dim=1).double().square() / diagonal.clamp_min(
            torch.finfo(diagonal.dtype).tiny
        )
        gone = torch.sort(torch.where(stays, cost, torch.inf), stable=True).indices[:leaving]
        columns = metric.inverse.columns(gone)
        columns.addmm_(eliminated[:, :done], eliminated[gone][:, :done].T, alpha=-1)
        block = columns[gone]
        factor = factored(block, _JITTER * float(block.diagonal().mean()))
        fresh = factor.forward(columns)
        moved = factor.forward(current[gone].T.double())
        current.addmm_(fresh.float(), moved.T.float(), alpha=-1)
        diagonal -= fresh.square().sum(dim=1)
        eliminated[:, done : done + leaving] = fresh
        stays[gone] = False
        done += leaving
    return [int(channel) for channel in stays.nonzero().flatten().tolist()]
