"""The processes that share one walk: each runs its own batches, and sums are made over all of them.

A batch is never split, so what is computed from one batch has the same bits however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

    from cusprun.walk.batches import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a walk; one alone unless a launcher says otherwise.

    ``local_rank`` counts the processes of one machine, and is the number of the GPU that this one takes.
    Every method is called by all ranks, in one order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def share(self, batches: Sequence[Batch]) -> tuple[Batch, ...]:
        """Return the batches that this process runs, which may be none.

        Raises:
            UserError: the ranks have other batches.
        """
        return tuple(batches)

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks of a tensor of one shape and type, the same bits on each.

        ``tensor`` itself may hold the sum afterwards: a Gram matrix of gigabytes is not copied. Adding zeros
        changes no bit, so arrays that each rank fills in its own places become whole.
        """
        return tensor

    def from_first(self, work: Callable[[], T]) -> T:
        """Return on every rank what ``work`` returns on the first; it is called on no other.

        The value may be made of numbers, texts, paths, lists, tuples, dictionaries, tensors and this
        package's dataclasses. Tensors arrive on the host.
        """
        return work()

    def one_by_machine(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns here; on each machine one rank does it before the others begin.

        For what is made once and then found, like an imported model in the cache.
        """
        return work()

    def meet(self) -> None:
        """Go on when every rank has come to this point."""

    def begin_again(self) -> None:
        """Leave the work that this rank is in, and make every other rank leave it at its next wait.

        There :class:`torch.OutOfMemoryError` is raised, upon which each calls this too. It returns when all
        have.
        """

    def require_same(self, values: Mapping[str, str]) -> None:
        """Compare named values of all ranks; the names are those that an error says.

        Raises:
            UserError: one differs, on every rank alike.
        """


ALONE = Ranks()


def fair_shares(sizes: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    """Return for each of ``count`` ranks the positions of its batches, whose ``sizes`` are padded tokens.

    The largest that is left goes to whoever has least so far (R. L. Graham, Bounds on multiprocessing timing
    anomalies, 1969). The first batch is always the first rank's: what a refit takes for a usual token is read
    from it.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    order = sorted(range(len(sizes)), key=lambda position: (position != 0, -sizes[position], position))
    for position in order:
        rank = loads.index(min(loads))
        shares[rank].append(position)
        loads[rank] += sizes[position]
    return tuple(tuple(sorted(share)) for share in shares)
