"""Gram matrices of channels over many tokens, exact enough for tokens of very different size.

Attention sinks write activations whose squares are 10^6 times a usual token's. In float32 their rounding
error alone would drown what the other tokens say, and the matrix would lose its Cholesky factor; so rows
far above the median are added in float64, which costs little because they are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cusprun.walk.device import CPU, Device

_BLOCK = 512
_OUTLIER = 30.0
"""Rows whose squared norm is this many times a usual row's are added in float64."""


@dataclass(frozen=True)
class Drift:
    """How a projection's target t differs from its own output over some tokens: d = t - a W^T.

    ``cross`` is d^T a, [features, n], any float type; ``energy`` is the squared norm of d.
    """

    cross: torch.Tensor
    energy: float

    def joined(self, other: Drift | None) -> Drift:
        """Return that of the tokens of both, in float64."""
        if other is None:
            return self
        return Drift(self.cross.double() + other.cross.double(), self.energy + other.energy)


class Gram:
    """a^T a over rows that come in batches, on their device, and d^T a where rows come with a drift.

    That is 4 bytes for each of n * n entries, and 8 more as soon as one row is an outlier; with ``features``,
    the length of a drift, as much again for each of features * n.
    """

    def __init__(self, width: int, device: Device = CPU, features: int = 0) -> None:
        self._usual = torch.zeros(width, width, device=device.name)
        self._outliers: torch.Tensor | None = None
        self._sums = torch.zeros(width, dtype=torch.float64, device=device.name)
        self._weight = 0.0
        self._usual_square = float("inf")
        self._cross = _Cross(features, width, device) if features else None

    def add(self, rows: torch.Tensor, weights: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Add rows: float32 [tokens, n], each with its weight [tokens] and its drift [tokens, features]."""
        self._sums += (weights.to(rows.dtype) @ rows).double()
        self._weight += float(weights.sum())
        roots = weights.sqrt().unsqueeze(-1)
        rows = rows * roots
        squares = rows.square().sum(dim=-1)
        if len(rows):
            # The smallest batch median: a batch of first tokens alone holds nothing but outliers.
            self._usual_square = min(self._usual_square, float(squares.median()))
        outliers = squares > _OUTLIER * self._usual_square
        if self._cross is not None and drift is not None:
            outliers = self._cross.add(rows, drift * roots, outliers)
        if bool(outliers.any()):
            if self._outliers is None:
                self._outliers = torch.zeros_like(self._usual, dtype=torch.float64)
            exact = rows[outliers].double()
            self._outliers.addmm_(exact.T, exact)
            rows = rows[~outliers]
        add_to_gram(self._usual, rows)

    def fetched(self, device: Device) -> Gram:
        """Return the same matrix on the host."""
        moved = Gram(0)
        moved._usual, moved._sums = device.fetch(self._usual), device.fetch(self._sums)
        moved._outliers = None if self._outliers is None else device.fetch(self._outliers)
        moved._weight, moved._usual_square = self._weight, self._usual_square
        moved._cross = None if self._cross is None else self._cross.fetched(device)
        return moved

    @property
    def is_empty(self) -> bool:
        """Whether no row with a weight was added."""
        return self._weight == 0

    def means(self) -> torch.Tensor:
        """Return the weighted mean of the rows: float64 [n]."""
        return self._sums / (self._weight or 1.0)

    def usual(self) -> torch.Tensor:
        """Return the symmetric matrix of the rows that are no outliers: float64 [n, n]."""
        return mirror(self._usual.double())

    def usual_scale(self) -> float:
        """Return the mean diagonal of :meth:`usual`: the unit that a ridge is measured in.

        That of the whole matrix would be the outliers', next to which a usual token weighs nothing.
        """
        return float(self._usual.diagonal().mean())

    def total(self) -> torch.Tensor:
        """Return the whole symmetric matrix: float64 [n, n]."""
        total = self.usual()
        return total if self._outliers is None else total.add_(self._outliers)

    def usual_drift(self) -> Drift | None:
        """Return the drift of the rows of :meth:`usual`; None where none is collected."""
        return None if self._cross is None else self._cross.usual

    def total_drift(self) -> Drift | None:
        """Return the drift of all rows; None where none is collected."""
        return None if self._cross is None else self._cross.usual.joined(self._cross.outliers)


class _Cross:
    """d^T a beside a Gram matrix, in float32 and, of outliers, in float64."""

    def __init__(self, features: int, width: int, device: Device = CPU) -> None:
        self.usual = Drift(torch.zeros(features, width, device=device.name), 0.0)
        self.outliers: Drift | None = None
        self._usual_square = float("inf")

    def add(self, rows: torch.Tensor, drift: torch.Tensor, outliers: torch.Tensor) -> torch.Tensor:
        """Add weighted rows with their drift; return the outliers by either: bool [tokens].

        The activations of a sink are those of any token behind a norm, while its drift can be 10^6 times
        another's, as its stream is.
        """
        squares = drift.square().sum(dim=-1)
        if len(rows):
            self._usual_square = min(self._usual_square, float(squares.median()))
        if self._usual_square > 0:  # most tokens of a stream that nothing has moved have none
            outliers = torch.logical_or(outliers, squares > _OUTLIER * self._usual_square)
        if bool(outliers.any()):
            if self.outliers is None:
                self.outliers = Drift(torch.zeros_like(self.usual.cross, dtype=torch.float64), 0.0)
            self.outliers = _added(self.outliers, rows[outliers].double(), drift[outliers])
        self.usual = _added(self.usual, rows[~outliers], drift[~outliers])
        return outliers

    def fetched(self, device: Device) -> _Cross:
        """Return the same on the host."""
        moved = _Cross(0, 0)
        moved.usual = Drift(device.fetch(self.usual.cross), self.usual.energy)
        if self.outliers is not None:
            moved.outliers = Drift(device.fetch(self.outliers.cross), self.outliers.energy)
        moved._usual_square = self._usual_square
        return moved


def _added(sum_: Drift, rows: torch.Tensor, drift: torch.Tensor) -> Drift:
    """Add rows to a sum, in place of its matrix and in its type."""
    return Drift(
        sum_.cross.addmm_(drift.to(rows.dtype).T, rows),
        sum_.energy + float(drift.double().square().sum()),
    )


def add_to_gram(gram: torch.Tensor, channels: torch.Tensor) -> None:
    """Add ``channels^T channels`` to the upper block triangle of ``gram`` in place.

    ``channels`` is [tokens, n]; ``gram`` [n, n]. Only blocks on and above the diagonal are computed, which
    halves the work for large n; :func:`mirror` fills in the rest once.
    """
    size = gram.shape[0]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        gram[start:stop, start:].addmm_(channels[:, start:stop].T, channels[:, start:])


def mirror(gram: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrix whose upper triangle ``gram`` holds."""
    upper = torch.triu(gram)
    return upper + torch.triu(gram, 1).T
