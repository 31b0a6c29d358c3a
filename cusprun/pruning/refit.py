"""The refit: surviving columns re-solved so that the projection gives what it is to give.

With channels a [tokens, n] over calibration tokens, y = a W^T the full output, S the survivors, the rest R
and G = a^T a, ridge least squares shrunk towards the original weights

    min over V of |a W^T - a_S V^T|^2 + ridge * |V - W_S|^2

has the closed form V = W_S + W_R G_RS (G_SS + ridge * I)^-1: what the removed channels wrote is spread over
the survivors that vary with them, and a survivor that varies with none keeps its weights.

That is for the target t = a W^T. For any other, t = a W^T + d, the solution is

    V = (t^T a_S + ridge * W_S) (G_SS + ridge * I)^-1 = W_S + (W_R G_RS + D_S) (G_SS + ridge * I)^-1

with D = d^T a: the sum on the right loses no digits where d is small beside t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cusprun.pruning.least_squares import Tokens
from cusprun.pruning.triangle import spans

MODES = ("refit", "bias", "none")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, as shares of the mean diagonal of the Gram matrix of usual tokens."""
DEFAULT_RIDGE = 1e-2
"""Ridge where no document is kept apart to choose one."""


@dataclass(frozen=True)
class RefitSettings:
    """How the last projections make good for what went.

    ``mode`` is ``refit``, ``bias`` (the mean of what went, added as a bias) or ``none``. ``target`` is what
    the least squares aim at, one of ``records.REFIT_TARGETS``: ``output``, what the whole projection gives on
    the cut model's own inputs; ``residual``, what brings the cut model's stream back to the original's there;
    ``auto``, the one whose expert has the lower perplexity on documents set apart. ``weights`` are
    those of the dimensions' tokens in the least squares, 1 where none is given. ``revise`` lets the refit
    choose the FFN channels again, by its own error on the inputs that the cut blocks before give.
    ``held_out`` is the share of calibration documents that the ridge is chosen on. ``anchors`` is the number
    of first tokens that are fitted beside the documents (see ``refit_documents.anchor_documents``).
    """

    mode: str = "refit"
    weights: Mapping[str, float] = field(default_factory=dict)
    revise: bool = False
    held_out: float = 0.1
    anchors: int = 2048
    target: str = "output"


@dataclass(frozen=True)
class Refitted:
    """``weight`` is [features, survivors] in the original type; errors are relative squared norms.

    ``ridge`` is the share of the mean diagonal that was chosen, None where the original columns stay.
    """

    weight: torch.Tensor
    relative_error_before: float
    relative_error_after: float
    ridge: float | None


def refit(
    weight: torch.Tensor,
    fit: Tokens,
    keep: Sequence[int],
    *,
    apart: Tokens | None = None,
    ridges: Sequence[float] = RIDGES,
    unit: float,
) -> Refitted:
    """Solve for the surviving columns.

    With ``apart`` ridges are fitted on ``fit`` and judged on ``apart``; the best one is then solved for on
    both together, and the errors are those on ``apart`` of the columns that had not seen it. Without, the
    first ridge is taken and the errors are those on ``fit``. When the ridge found is no better than
    the original columns, those are returned.

    Args:
        weight: the projection, [features, n], any float type, on the device of the tokens.
        fit: the tokens to fit, and what the target is there beyond the projection's own output.
        keep: surviving channels, ascending.
        apart: tokens that are only judged on.
        ridges: shares of ``unit``, ascending; of equal ones the lower is taken.
        unit: what a ridge of one adds to the diagonal.

    Returns:
        The new columns, rounded to the type of ``weight``.
    """
    kept, gone = _positions(keep, weight)
    system = fit.system(weight, kept, gone)
    judge = (fit if apart is None else apart).judge(weight, kept, gone)
    candidates = ridges if apart is not None else ridges[:1]
    after, ridge = _lowest(candidates, lambda ridge: judge.error(system, ridge * unit))
    before, scale = judge.before, judge.energy if judge.energy > 0 else 1.0
    if apart is not None:
        system = judge.joined(system)
    change = system.change(ridge * unit)
    rounded = _rounded(change, weight, kept)
    # Rounding to the type of the weights can cost more than a refit of almost nothing gains.
    sound = after < before and system.gain(change) > 0
    if not sound:
        return Refitted(weight[:, kept], before / scale, before / scale, None)
    return Refitted(rounded, before / scale, after / scale, ridge)


def _lowest(ridges: Sequence[float], error: Callable[[float], float]) -> tuple[float, float]:
    """Return the least error and its ridge, down the valley from the middle of ``ridges`` (ascending).

    Too small a ridge fits noise and too large a one nothing, with one valley between them in 60 of 60 blocks
    of SmolLM2 at ratios 0.25 and 0.5; so of four ridges, three are tried.
    """
    middle = len(ridges) // 2
    best = error(ridges[middle]), ridges[middle]
    for side in (ridges[:middle][::-1], ridges[middle + 1 :]):
        for ridge in side:
            found = error(ridge), ridge
            if found >= best:
                break
            best = found
        if best[1] != ridges[middle]:
            break
    return best


def _positions(keep: Sequence[int], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the channels that stay and those that go, beside the weight."""
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[list(keep)] = False
    return torch.tensor(list(keep)).to(weight.device), gone.nonzero().flatten().to(weight.device)


def _rounded(change: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the new columns in the type of ``weight``, and leave in ``change`` what that makes of it."""
    rounded = torch.empty(change.shape, dtype=weight.dtype, device=weight.device)
    for start, stop in spans(len(change)):
        own = weight[start:stop][:, kept].double()
        rounded[start:stop] = own + change[start:stop]
        change[start:stop] = rounded[start:stop].double() - own
    return rounded


def mean_bias(weight: torch.Tensor, means: torch.Tensor, keep: Sequence[int]) -> torch.Tensor:
    """Return the mean output of the channels that go, [features] (FLAP, arXiv 2312.11983, section 3.3).

    ``weight`` is [features, n], ``means`` [n] the mean of every channel over the tokens.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[list(keep)] = False
    gone = gone.to(weight.device)
    return (weight.double()[:, gone] @ means.double()[gone]).to(weight.dtype)
