"""What the refit knows of a projection's inputs, over all calibration tokens and all ranks.

Attention sinks write activations whose squares are 10^6 times a usual token's. In float32 their rounding
error alone would drown what the other tokens say, and the matrix would lose its Cholesky factor; so rows
far above the median are added in float64, which costs little because they are few. Nor do they count in
what a ridge is measured in, or among the tokens that are judged on: they are fitted all but exactly, and
their energy would hide what is lost of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cusprun.pruning.gram import Gram
from cusprun.pruning.refit import DEFAULT_RIDGE, RIDGES, Refitted, refit
from cusprun.pruning.refit_documents import TokenWeights
from cusprun.pruning.rows import Rows
from cusprun.pruning.surgeon import choose_channels
from cusprun.walk.device import CPU, Device
from cusprun.walk.ranks import ALONE, Ranks
from cusprun.walk.scratch import IN_MEMORY, Scratch

_OUTLIER = 30.0
"""Rows whose squared norm is this many times a usual row's are outliers."""
_FEW = 0.5
"""Tokens that are fitted are kept as rows where they are fewer than this share of the channels."""
_APART = 2
"""Tokens that are judged on are kept as rows up to this many times the channels: as large as their sums."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens with a weight, of each rank: those that are fitted, and those that are only judged on."""

    fit: tuple[int, ...]
    apart: tuple[int, ...]


def count_tokens(weights: TokenWeights, ranks: Ranks = ALONE) -> TokenCounts:
    """Count the tokens that weigh, given the weights of this rank's batches."""
    counts = torch.zeros(2, ranks.size, dtype=torch.int64)
    for row, own in enumerate((weights.fit, weights.apart)):
        counts[row, ranks.rank] = sum(int((batch > 0).sum()) for batch in own)
    fit, apart = ranks.add(counts).tolist()
    return TokenCounts(tuple(fit), tuple(apart))


class Inputs:
    """Tokens that are fitted and tokens that are only judged on, as sums or as rows, whichever is smaller.

    Both give the same columns but for rounding. With ranks, each makes one for the same projection and adds
    its own tokens; :meth:`add_over` follows before anything is asked.
    """

    def __init__(
        self,
        width: int,
        counts: TokenCounts,
        features: int = 0,
        *,
        device: Device = CPU,
        scratch: Scratch = IN_MEMORY,
        ranks: Ranks = ALONE,
    ) -> None:
        def kept(own: Sequence[int], *, as_rows: bool) -> Gram | Rows:
            if not as_rows:
                return Gram(width, features, device=device, scratch=scratch)
            first = sum(own[: ranks.rank])
            return Rows(width, sum(own), features, first=first, device=device, scratch=scratch)

        few = sum(counts.fit) < _FEW * width
        self._fit = kept(counts.fit, as_rows=few)
        self._apart = kept(counts.apart, as_rows=few or sum(counts.apart) <= _APART * width)
        self._sums = torch.zeros(width, dtype=torch.float64, device=device.name)
        self._totals = torch.zeros(3, dtype=torch.float64)
        self._limits: tuple[float, float] | None = None
        self._ranks, self._scratch = ranks, scratch

    def add(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        judged: torch.Tensor,
        drift: torch.Tensor | None = None,
    ) -> None:
        """Add rows: float32 [tokens, n], with their weights [tokens] and their drift [tokens, features].

        ``judged`` is true at tokens that are only judged on: bool [tokens].
        """
        if not len(rows):
            return
        fitted = torch.where(judged, 0.0, weights)
        self._sums += (fitted.to(rows.dtype) @ rows).double()
        if not bool((weights == 1).all()):  # else as most are: no copy of them
            roots = weights.sqrt().unsqueeze(-1)
            rows, drift = rows * roots, None if drift is None else drift * roots
        squares = torch.linalg.vector_norm(rows, dim=-1).square()
        usual = self._usual(squares, drift)
        self._totals += torch.tensor(
            [float(fitted.sum()), float((weights - fitted).sum()), float(squares[usual & ~judged].sum())],
            dtype=torch.float64,
        )
        for tokens, chosen, dtype in (
            (self._fit, usual & ~judged, torch.float32),
            (self._fit, ~usual & ~judged, torch.float64),
            (self._apart, usual & judged, torch.float32),
        ):
            if bool(chosen.all()):  # as of most batches; no copy of them
                tokens.add(rows.to(dtype), drift)
            elif bool(chosen.any()):
                tokens.add(rows[chosen].to(dtype), None if drift is None else drift[chosen])

    def _usual(self, of_rows: torch.Tensor, drift: torch.Tensor | None) -> torch.Tensor:
        """Return which weighted rows are outliers neither by their channels' squares nor by their drift.

        The activations of a sink are those of any token behind a norm, while its drift can be 10^6 times
        another's, as its stream is.
        """
        squares = [of_rows]
        if drift is not None:
            squares.append(torch.linalg.vector_norm(drift, dim=-1).square())
        if self._limits is None and not bool((squares[0] > 0).any()):
            return torch.ones_like(squares[0], dtype=torch.bool)
        limits = self._limits_by(lambda: [_limit(each) for each in squares])
        usual = [each <= limit for each, limit in zip(squares, limits, strict=False)]
        return usual[0] if drift is None else torch.logical_and(*usual)

    def _limits_by(self, squares: Callable[[], list[float]]) -> tuple[float, float]:
        """Return the limits of the first rank's first batch with tokens, whatever this one's are.

        Batches come longest documents first, and a batch of first tokens alone would hold nothing but
        outliers. A limit that every batch had its own of would depend on how they are spread over ranks.
        """
        if self._limits is None:
            found = self._ranks.from_first(squares)
            self._limits = (found[0], found[-1])
        return self._limits

    def add_over(self) -> None:
        """Add what all ranks have; every one calls it once, also one without tokens."""
        self._limits_by(lambda: [torch.inf])
        if self._ranks.size > 1:
            self._sums, self._totals = self._ranks.add(self._sums), self._ranks.add(self._totals)
            self._fit.add_over(self._ranks)
            self._apart.add_over(self._ranks)

    def fetched(self, device: Device) -> Inputs:
        """Return the same on the host."""
        moved = copy.copy(self)
        moved._fit, moved._apart = self._fit.fetched(device), self._apart.fetched(device)
        moved._sums = device.fetch(self._sums)
        return moved

    @property
    def is_judged(self) -> bool:
        """Whether there are tokens to judge on."""
        return float(self._totals[1]) > 0

    def means(self) -> torch.Tensor:
        """Return the weighted mean of the rows that are fitted: float64 [n]."""
        return self._sums / (float(self._totals[0]) or 1.0)

    def unit(self) -> float:
        """Return what a ridge of one adds to the diagonal: the mean diagonal of usual tokens' Gram matrix.

        That of all would be the outliers', next to which a usual token weighs nothing.
        """
        return float(self._totals[2]) / max(1, len(self._sums))

    def chosen_channels(self, weight: torch.Tensor, count: int) -> list[int]:
        """Return the channels that the refit can best keep; ``weight`` [features, n] is beside the tokens."""
        metric = self._fit.metric(DEFAULT_RIDGE * self.unit())
        return choose_channels(weight, metric, count, scratch=self._scratch)

    def refitted(self, weight: torch.Tensor, keep: Sequence[int]) -> Refitted:
        """Solve for the columns ``keep`` of ``weight`` [features, n], which is beside the tokens."""
        return refit(
            weight,
            self._fit,
            keep,
            apart=self._apart if self.is_judged else None,
            ridges=RIDGES if self.is_judged else (DEFAULT_RIDGE,),
            unit=self.unit(),
        )


def _limit(squares: torch.Tensor) -> float:
    """Return what outliers are above, 30 times the median of the squared norms that are not zero."""
    given = squares[squares > 0]
    return _OUTLIER * float(given.median()) if len(given) else float("inf")
