"""What the refit and the surgeon ask of tokens, however these are kept: as sums or as rows.

With channels a [tokens, n], survivors S, the rest R, and d what a target is beyond a W^T, what the removed
channels and the target leave to be made good is y = a_R W_R^T + d, and the change X of the surviving columns
solves X (a_S^T a_S + ridge * I) = y^T a_S. That is a system of size S, of which :class:`Gram` keeps the sums.
With K = a_S a_S^T it is X = Z a_S by Z (K + ridge * I) = y^T, a system of the size of the tokens, of which
:class:`Rows` keeps the rows (the kernel form of ridge regression: Saunders, Gammerman and Vovk, 1998).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch

from cusprun.pruning.triangle import Factor, factored, spans
from cusprun.walk.scratch import Scratch


class System(ABC):
    """Z (M + ridge * I) = target for any ridge; M [m, m] by its upper half, target float64 [features, m]."""

    def __init__(self, matrix: torch.Tensor, target: torch.Tensor, scratch: Scratch) -> None:
        self.matrix, self.target, self._scratch = matrix, target, scratch

    @abstractmethod
    def seen(self, survivors: torch.Tensor) -> torch.Tensor:
        """Return what channels S of other tokens [p, S] meet in this system: [p, m]."""

    @abstractmethod
    def change(self, ridge: float) -> torch.Tensor:
        """Return what a ridge adds to the surviving columns: float64 [features, S]."""

    @abstractmethod
    def gain(self, change: torch.Tensor) -> float:
        """Return by how much a change [features, S] lessens the squared error on this system's tokens."""

    @abstractmethod
    def with_rows(self, survivors: torch.Tensor, lost: torch.Tensor) -> System:
        """Return the system of these tokens and of others: [p, S], and y [p, features]; may be self."""

    def predicted(self, survivors: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return what the change of a ridge gives for channels S of others: [p, features] for [p, S].

        The smaller of both sides is solved for, p or the features.
        """
        seen, other = self.seen(survivors), self.target
        if len(seen) < len(other):
            seen = self._factor(ridge).solve(self._scratch.copied(seen))
        else:
            other = self.solved(ridge)
        found = self._scratch.zeros((len(seen), len(other)), survivors.dtype, seen.device)
        for start, stop in spans(len(other)):
            found[:, start:stop] = seen @ other[start:stop].to(seen.dtype).T
        return found

    def solved(self, ridge: float) -> torch.Tensor:
        """Return Z: float64 [features, m]."""
        return self._factor(ridge).solve(self._scratch.copied(self.target))

    def _factor(self, ridge: float) -> Factor:
        return factored(self.matrix, ridge)


class Judge(Protocol):
    """Tokens that a solution is judged on.

    ``before`` is the squared error |y|^2 of the columns as they are, ``energy`` the target's squared norm.
    """

    before: float
    energy: float

    def error(self, system: System, ridge: float) -> float:
        """Return the squared error of a system's solution on these tokens."""

    def joined(self, system: System) -> System:
        """Return the system of its own tokens and of these; the one that is given is no more."""


class InverseMatrix(Protocol):
    """A symmetric matrix [n, n] that is not held as such."""

    def diagonal(self) -> torch.Tensor:
        """Return its diagonal: float64 [n]."""

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        """Return some columns: float64 [n, k] for ``index`` [k]."""


@dataclass(frozen=True)
class Metric:
    """(a^T a + ridge * I)^-1 over all channels, and d^T a times it [features, n] where there is a drift."""

    inverse: InverseMatrix
    moved: torch.Tensor | None


class Tokens(Protocol):
    """Channels and drift of the tokens of one kind."""

    def system(self, weight: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor) -> System:
        """Return the least squares of the columns ``kept`` of ``weight`` [features, n]."""

    def judge(self, weight: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor) -> Judge:
        """Return these tokens as those that a solution for ``kept`` is judged on."""

    def metric(self, ridge: float) -> Metric:
        """Return the metric in which the surgeon measures."""
