"""Tokens kept as sums: the Gram matrix of their channels, and its product with their drift."""

from __future__ import annotations

import copy

import torch

from cusprun.pruning.least_squares import Judge, Metric, System
from cusprun.pruning.triangle import add_gram, add_product, columns_of, dot, factored, quadratic, spans
from cusprun.walk.device import CPU, Device
from cusprun.walk.ranks import Ranks
from cusprun.walk.scratch import IN_MEMORY, Scratch


class Gram:
    """a^T a over rows that come in batches, on their device, and d^T a where they come with a drift d.

    ``matrix`` is float64 [n, n], its upper half; ``cross`` float64 [features, n], None where none is
    collected; ``drift_energy`` the squared norm of d. That is 8 bytes for each of n * n and of features * n
    entries, and solving for all channels takes no other matrix of this size, since half of it is free.
    """

    def __init__(
        self, width: int, features: int = 0, *, device: Device = CPU, scratch: Scratch = IN_MEMORY
    ) -> None:
        self.matrix = scratch.zeros((width, width), device=device.name)
        self.cross = scratch.zeros((features, width), device=device.name) if features else None
        self.drift_energy = 0.0
        self._scratch = scratch

    def add(self, rows: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Add rows [tokens, n], and their drift [tokens, features].

        Products are made in the type of the rows: float32 rounds to 1e-7 of the largest of a batch.
        """
        add_gram(self.matrix, rows)
        if self.cross is not None and drift is not None:
            add_product(self.cross, drift.to(rows.dtype), rows)
            self.drift_energy += float(drift.double().square().sum())

    def fetched(self, device: Device) -> Gram:
        """Return the same on the host."""
        moved = copy.copy(self)
        moved.matrix = device.fetch(self.matrix)
        moved.cross = None if self.cross is None else device.fetch(self.cross)
        return moved

    def add_over(self, ranks: Ranks) -> None:
        """Add what all ranks have; a few rows at a time, for the sum needs memory of its own."""
        for start, stop in spans(len(self.matrix)):
            self.matrix[start:stop, start:] = ranks.add(self.matrix[start:stop, start:].contiguous())
        if self.cross is not None:
            for start, stop in spans(len(self.cross)):
                self.cross[start:stop] = ranks.add(self.cross[start:stop])
            self.drift_energy = float(ranks.add(torch.tensor(self.drift_energy, dtype=torch.float64)))

    def system(self, weight: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor) -> GramSystem:
        """Return the least squares of the columns ``kept`` of ``weight`` [features, n]."""
        matrix = self._scratch.zeros((len(kept), len(kept)), device=weight.device)
        target = self._scratch.zeros((len(weight), len(kept)), device=weight.device)
        lost = self._scratch.copied(weight[:, gone])
        for start, stop in spans(len(kept)):
            columns = columns_of(self.matrix, kept[start:stop])
            matrix[:stop, start:stop] = columns[kept[:stop]]
            target[:, start:stop] = lost @ columns[gone]
            if self.cross is not None:
                target[:, start:stop] += self.cross[:, kept[start:stop]]
        return GramSystem(matrix, target, self._scratch)

    def judge(self, weight: torch.Tensor, kept: torch.Tensor, gone: torch.Tensor) -> Judge:
        """Return these tokens as those that a solution for ``kept`` is judged on."""
        lost = self._scratch.copied(weight)
        energy = self._energy(lost)
        lost[:, kept] = 0
        return _GramJudge(self.system(weight, kept, gone), max(self._energy(lost), 0.0), energy)

    def _energy(self, weight: torch.Tensor) -> float:
        """Return the squared norm of a W^T + d."""
        energy = quadratic(self.matrix, weight)
        if self.cross is not None:
            energy += 2 * dot(self.cross, weight) + self.drift_energy
        return energy

    def metric(self, ridge: float) -> Metric:
        """Return (a^T a + ridge * I)^-1, which stands in the lower half of ``matrix`` until the next call."""
        factor = factored(self.matrix, ridge)
        moved = None if self.cross is None else factor.solve(self._scratch.copied(self.cross))
        return Metric(factor.inverted(), moved)


class GramSystem(System):
    """The least squares by sums: M is a_S^T a_S, the target y^T a_S, and its solution the change itself."""

    def seen(self, survivors: torch.Tensor) -> torch.Tensor:
        """Return the channels themselves."""
        return survivors

    def change(self, ridge: float) -> torch.Tensor:
        """Return what a ridge adds to the surviving columns: float64 [features, S]."""
        return self.solved(ridge)

    def gain(self, change: torch.Tensor) -> float:
        """Return by how much a change [features, S] lessens the squared error on this system's tokens."""
        return 2 * dot(change, self.target) - quadratic(self.matrix, change)

    def with_rows(self, survivors: torch.Tensor, lost: torch.Tensor) -> System:
        """Add other tokens to this one's."""
        add_gram(self.matrix, survivors)
        add_product(self.target, lost, survivors)
        return self

    def with_sums(self, other: System) -> System:
        """Add the tokens of another to this one's."""
        for start, stop in spans(len(self.matrix)):
            self.matrix[start:stop, start:].add_(other.matrix[start:stop, start:])
        self.target += other.target
        return self


class _GramJudge:
    def __init__(self, own: GramSystem, before: float, energy: float) -> None:
        self._own, self.before, self.energy = own, before, energy

    def error(self, system: System, ridge: float) -> float:
        return max(self.before - self._own.gain(system.change(ridge)), 0.0)

    def joined(self, system: System) -> System:
        assert isinstance(system, GramSystem), "tokens judged on are rows where those fitted are"
        return system.with_sums(self._own)
