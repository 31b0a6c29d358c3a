"""The processes that share one walk: each runs its own batches, and sums are made over all of them.

A batch is never split, so what is computed from one batch has the same bits however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    from cusprun.walk.batches import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a walk; one alone unless a launcher says otherwise."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def share(self, batches: Sequence[Batch]) -> tuple[Batch, ...]:
        """Return the batches that this process runs."""
        return tuple(batches)

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks of a tensor of one shape and type, the same bits on each."""
        return tensor

    def from_first(self, work: Callable[[], T]) -> T:
        """Return on every rank what ``work`` returns on the first; it is called on no other."""
        return work()


ALONE = Ranks()
