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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cusprun.pruning.gram import Drift

MODES = ("refit", "bias", "none")
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, as shares of the mean diagonal of the Gram matrix of usual tokens."""
DEFAULT_RIDGE = 1e-2
"""Ridge where no document is kept apart to choose one."""
_RIDGE_STEPS = 12


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
    fit: torch.Tensor,
    keep: Sequence[int],
    *,
    apart: torch.Tensor | None = None,
    drift: Drift | None = None,
    apart_drift: Drift | None = None,
    ridges: Sequence[float] = RIDGES,
    unit: float | None = None,
) -> Refitted:
    """Solve for the surviving columns.

    With ``apart`` every ridge is fitted on ``fit`` and judged on ``apart``; the best one is then solved for
    on both together, and the errors are those on ``apart`` of the columns that had not seen it. Without, the
    first ridge is taken and the errors are those on ``fit``. When no ridge is better than the original
    columns, those are returned.

    Args:
        weight: the projection, [features, n], any float type, on the device of ``fit``.
        fit: a^T a over the tokens to fit, symmetric [n, n], any float type; it is solved in float64 where it
            is. At the most nine matrices of its size exist in float64 at one time, and with a drift four of
            [features, n] more.
        keep: surviving channels, ascending.
        apart: the same over tokens that are only judged on.
        drift: what the target is beyond the projection's own output, over the tokens of ``fit``; none when it
            is that output.
        apart_drift: the same over the tokens of ``apart``.
        ridges: shares of ``unit``, in the order of preference.
        unit: what a ridge of one adds to the diagonal; the mean diagonal of ``fit`` when it is not given.

    Returns:
        The new columns, rounded to the type of ``weight``.
    """
    whole = weight.double()
    unit = float(fit.diagonal().mean()) if unit is None else unit
    problem = _Problem(whole, fit.double(), keep, drift)
    judge = problem if apart is None else _Problem(whole, apart.double(), keep, apart_drift)
    candidates = ridges if apart is not None else ridges[:1]
    tried = [(judge.error(problem.change(ridge * unit)), ridge) for ridge in candidates]
    after, ridge = min(tried, key=lambda entry: entry[0])
    before = judge.error(None)
    if apart is None:
        final = problem
    else:
        joined = None if drift is None else drift.joined(apart_drift)
        final = _Problem(whole, fit.double() + apart.double(), keep, joined)
    rounded = (final.kept + final.change(ridge * unit)).to(weight.dtype)
    scale = judge.energy if judge.energy > 0 else 1.0
    # Rounding to the type of the weights can cost more than a refit of almost nothing gains.
    sound = after < before and final.error(rounded.double() - final.kept) < final.error(None)
    if not sound:
        return Refitted(final.kept.to(weight.dtype), before / scale, before / scale, None)
    return Refitted(rounded, before / scale, after / scale, ridge)


class _Problem:
    """The least squares of one projection over one set of tokens."""

    def __init__(
        self, weight: torch.Tensor, gram: torch.Tensor, keep: Sequence[int], drift: Drift | None
    ) -> None:
        kept = torch.tensor(list(keep)).to(gram.device)
        gone = torch.ones(gram.shape[0], dtype=torch.bool, device=gram.device)
        gone[kept] = False
        removed = gone.nonzero().flatten()
        lost = weight[:, removed]
        self.kept = weight[:, kept]
        self._gram = gram[kept][:, kept]
        self._target = lost @ gram[removed][:, kept]  # [features, survivors]
        self._lost_energy = float((lost @ gram[removed][:, removed] * lost).sum())
        self.energy = float((weight @ gram * weight).sum())
        if drift is not None:
            cross = drift.cross.double()
            self._target = self._target + cross[:, kept]
            self._lost_energy += 2 * float((cross[:, removed] * lost).sum()) + drift.energy
            self.energy += 2 * float((cross * weight).sum()) + drift.energy

    def change(self, ridge: float) -> torch.Tensor:
        """Return what a ridge adds to the surviving columns, [features, survivors]."""
        solved: torch.Tensor = torch.cholesky_solve(self._target.T, factor(self._gram, ridge)).T
        return solved

    def error(self, change: torch.Tensor | None) -> float:
        """Return the squared norm of what the target lacks with a change of the surviving columns."""
        if change is None:
            return max(self._lost_energy, 0.0)
        gained = 2 * float((change * self._target).sum()) - float((change @ self._gram * change).sum())
        return max(self._lost_energy - gained, 0.0)


def mean_bias(weight: torch.Tensor, means: torch.Tensor, keep: Sequence[int]) -> torch.Tensor:
    """Return the mean output of the channels that go, [features] (FLAP, arXiv 2312.11983, section 3.3).

    ``weight`` is [features, n], ``means`` [n] the mean of every channel over the tokens.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[list(keep)] = False
    gone = gone.to(weight.device)
    return (weight.double()[:, gone] @ means.double()[gone]).to(weight.dtype)


def factor(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the Cholesky factor of ``matrix + ridge * I``, growing the ridge until it exists."""
    ridge = ridge or 1.0
    for step in range(_RIDGE_STEPS):
        ridged = matrix.clone()
        ridged.diagonal().add_(ridge * 10**step)
        found: torch.Tensor
        found, info = torch.linalg.cholesky_ex(ridged)
        if int(info) == 0 and bool(torch.isfinite(found).all()):
            return found
    raise AssertionError("a positive semi-definite matrix plus a ridge has a Cholesky factor")
