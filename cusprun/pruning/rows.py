"""Tokens kept as they are: for so few of them that a system of their size is the smaller one."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from cusprun.pruning.least_squares import Judge, Metric, System
from cusprun.pruning.triangle import add_gram, dot, factored, spans
from cusprun.walk.device import CPU, Device
from cusprun.walk.ranks import Ranks
from cusprun.walk.scratch import IN_MEMORY, Scratch

_CHUNK = 1024
"""Rows, or channels, that are gathered or cast at a time."""


class Rows:
    """The channels of up to ``count`` tokens, float32 [count, n], and their drift [count, features].

    Rows that are not given stay zero, which no sum sees. ``first`` is the row to begin at: where ranks share
    the tokens, each fills rows of its own, and the sum over ranks puts them together.
    """

    def __init__(
        self,
        width: int,
        count: int,
        features: int = 0,
        *,
        first: int = 0,
        device: Device = CPU,
        scratch: Scratch = IN_MEMORY,
    ) -> None:
        self.rows = scratch.zeros((count, width), torch.float32, device.name)
        self.drift = scratch.zeros((count, features), torch.float32, device.name) if features else None
        self._next = first
        self._scratch = scratch

    def add(self, rows: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Add rows [tokens, n], and their drift [tokens, features]."""
        stop = self._next + len(rows)
        self.rows[self._next : stop] = rows
        if self.drift is not None and drift is not None:
            self.drift[self._next : stop] = drift
        self._next = stop

    def fetched(self, device: Device) -> Rows:
        """Return the same on the host."""
        moved = copy.copy(self)
        moved.rows = device.fetch(self.rows)
        moved.drift = None if self.drift is None else device.fetch(self.drift)
        return moved

    def add_over(self, ranks: Ranks) -> None:
        """Add what all ranks have."""
        for kept in (self.rows, self.drift):
            for start, stop in spans(0 if kept is None else len(kept), _CHUNK):
                assert kept is not None
                kept[start:stop] = ranks.add(kept[start:stop])

    def system(self, weight: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor) -> System:
        """Return the least squares of the columns ``kept`` of ``weight`` [features, n]."""
        survivors = self._gathered(kept)
        matrix = self._scratch.zeros((len(survivors), len(survivors)), device=weight.device)
        _add_kernel(matrix, survivors)
        target = self._scratch.copied(self._lost(weight, gone, torch.float64).T)
        return _KernelSystem(matrix, target, survivors, self._scratch)

    def judge(self, weight: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor) -> Judge:
        """Return these tokens as those that a solution for ``kept`` is judged on; errors are float32's.

        A difference is taken before it is squared, so that an error of 1e-6 of the energy has three digits.
        """
        survivors, lost = self._gathered(kept), self._lost(weight, gone, torch.float32)
        before = dot(lost, lost)
        columns = self._scratch.copied(weight[:, kept], torch.float32)
        whole = self._scratch.copied(lost, torch.float32).addmm_(survivors, columns.T)
        return _RowsJudge(survivors, lost, before, dot(whole, whole))

    def _gathered(self, kept: torch.Tensor) -> torch.Tensor:
        survivors = self._scratch.zeros((len(self.rows), len(kept)), torch.float32, self.rows.device)
        for start, stop in spans(len(survivors), _CHUNK):
            survivors[start:stop] = self.rows[start:stop][:, kept]
        return survivors

    def _lost(self, weight: torch.Tensor, gone: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return y = a_R W_R^T + d: [tokens, features]."""
        lost = self._scratch.zeros((len(self.rows), len(weight)), dtype, self.rows.device)
        columns = self._scratch.copied(weight[:, gone], dtype)
        for start, stop in spans(len(lost), _CHUNK):
            lost[start:stop] = self.rows[start:stop][:, gone].to(dtype) @ columns.T
            if self.drift is not None:
                lost[start:stop].add_(self.drift[start:stop])
        return lost

    def metric(self, ridge: float) -> Metric:
        """Return (a^T a + ridge * I)^-1, by the factor of a a^T + ridge * I."""
        count, width = self.rows.shape
        matrix = self._scratch.zeros((count, count), device=self.rows.device)
        _add_kernel(matrix, self.rows)
        factor = factored(matrix, ridge)
        roots = factor.forward(self._scratch.copied(self.rows.T))
        moved = None
        if self.drift is not None:
            drift = factor.forward(self._scratch.copied(self.drift.T))
            moved = self._scratch.zeros((len(drift), width), device=self.rows.device)
            moved.addmm_(drift, roots.T)
        return Metric(_KernelInverse(roots, factor.ridge), moved)


@dataclass(frozen=True)
class _KernelInverse:
    """(a^T a + ridge * I)^-1 = (I - B B^T) / ridge with B = a^T L^-T, L L^T = a a^T + ridge * I.

    ``roots`` is B, [n, tokens].
    """

    roots: torch.Tensor
    ridge: float

    def diagonal(self) -> torch.Tensor:
        diagonal: torch.Tensor = (1 - torch.linalg.vector_norm(self.roots, dim=1).square()) / self.ridge
        return diagonal

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        found = self.roots @ self.roots[index].T
        found /= -self.ridge
        found[index] += torch.eye(len(index), dtype=found.dtype, device=found.device) / self.ridge
        return found


class _KernelSystem(System):
    """The least squares by rows: M is K = a_S a_S^T, the target y^T, and the change Z a_S."""

    def __init__(
        self, matrix: torch.Tensor, target: torch.Tensor, survivors: torch.Tensor, scratch: Scratch
    ) -> None:
        super().__init__(matrix, target, scratch)
        self._survivors = survivors

    def seen(self, survivors: torch.Tensor) -> torch.Tensor:
        """Return the products of channels S with those of this system's tokens: float64 [p, tokens]."""
        kernel = self._scratch.zeros((len(survivors), len(self._survivors)), device=survivors.device)
        for start, stop in spans(survivors.shape[1], _CHUNK):
            kernel.addmm_(survivors[:, start:stop].double(), self._survivors[:, start:stop].double().T)
        return kernel

    def change(self, ridge: float) -> torch.Tensor:
        """Return what a ridge adds to the surviving columns: float64 [features, S]."""
        solved, width = self.solved(ridge), self._survivors.shape[1]
        change = self._scratch.zeros((len(solved), width), device=solved.device)
        for start, stop in spans(width, _CHUNK):
            change[:, start:stop].addmm_(solved, self._survivors[:, start:stop].double())
        return change

    def gain(self, change: torch.Tensor) -> float:
        """Return by how much a change [features, S] lessens the squared error on this system's tokens."""
        given = self._scratch.zeros(self.target.shape, torch.float32, change.device)
        for start, stop in spans(change.shape[1], _CHUNK):
            given.addmm_(change[:, start:stop].float(), self._survivors[:, start:stop].T)
        return 2 * dot(given, self.target) - dot(given, given)

    def with_rows(self, survivors: torch.Tensor, lost: torch.Tensor) -> System:
        """Return the system of these tokens and of others."""
        zeros, device = self._scratch.zeros, survivors.device
        own, count = len(self.matrix), len(self.matrix) + len(survivors)
        matrix, target = zeros((count, count), device=device), zeros((lost.shape[1], count), device=device)
        matrix[:own, :own] = self.matrix
        matrix[:own, own:] = self.seen(survivors).T
        _add_kernel(matrix[own:, own:], survivors)
        target[:, :own], target[:, own:] = self.target, lost.T
        rows = zeros((count, survivors.shape[1]), torch.float32, device)
        rows[:own], rows[own:] = self._survivors, survivors
        return _KernelSystem(matrix, target, rows, self._scratch)


class _RowsJudge:
    def __init__(self, survivors: torch.Tensor, lost: torch.Tensor, before: float, energy: float) -> None:
        self._survivors, self._lost, self.before, self.energy = survivors, lost, before, energy

    def error(self, system: System, ridge: float) -> float:
        missing = system.predicted(self._survivors, ridge).sub_(self._lost)
        return dot(missing, missing)

    def joined(self, system: System) -> System:
        return system.with_rows(self._survivors, self._lost)


def _add_kernel(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add ``rows rows^T`` to the upper half of ``total`` in place, in float64."""
    for start, stop in spans(rows.shape[1], _CHUNK):
        add_gram(total, rows[:, start:stop].double().T)
