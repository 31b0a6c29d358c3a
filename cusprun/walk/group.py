"""Ranks that are processes of their own, joined by torch.distributed: gloo between hosts, nccl between GPUs.

Every wait is a loop that looks whether the run still stands: no collective outlives a peer that died, and a
signal is seen at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from cusprun.errors import UserError
from cusprun.walk.ranks import Ranks, fair_shares
from cusprun.walk.watch import LOST_CODE, RESUME, Failure, Watch
from cusprun.walk.wire import packed, unpacked

if TYPE_CHECKING:
    from cusprun.walk.batches import Batch
    from cusprun.walk.launch import Launch

T = TypeVar("T")

NEVER = timedelta(days=365)
"""How long a collective may take: the watch sees what has died, and what lives may compute for hours."""

_c10d: Any = dist
"""The same module; its type hints leave out what it is made of."""

_CHUNK_BYTES = 1 << 26
"""One collective at the most: what gloo holds beside the tensor is of this size."""

_PAUSE_S = (0.00005, 0.005)
"""Pauses between looks at a collective, doubled from the first to the second."""


@dataclass(frozen=True, eq=False)
class GroupRanks(Ranks):
    """One process of a group; made by :func:`cusprun.walk.shared_run.SharedRun.ranks`."""

    links: Links = None  # type: ignore[assignment]
    watch: Watch = None  # type: ignore[assignment]

    def share(self, batches: Sequence[Batch]) -> tuple[Batch, ...]:
        """Return the batches that this process runs: about as many padded tokens as any other's."""
        order = json.dumps([[*batch.token_ids.shape, *batch.documents] for batch in batches])
        self.require_same({"division of the documents into batches": _digest(order)})
        shares = fair_shares([batch.num_padded_tokens for batch in batches], self.size)
        return tuple(batches[position] for position in shares[self.rank])

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks, added in place where the tensor is contiguous.

        On GPUs of their own the ranks add there, else on the hosts.
        """
        if tensor.is_cuda and not self.links.have_nccl(self, tensor):
            return self.add(tensor.cpu()).to(tensor.device)
        group = self.links.nccl if tensor.is_cuda else self.links.gloo
        whole = tensor.contiguous()
        with torch.inference_mode():
            for chunk in _chunks(whole):
                self._wait(partial(group.allreduce, [chunk]))
        return whole

    def from_first(self, work: Callable[[], T]) -> T:
        """Return on every rank what ``work`` returns on the first."""
        if self.is_first:
            value = work()
            header, tensors = packed(value)
            self._send(torch.tensor([len(header)]))
            self._send(torch.frombuffer(bytearray(header), dtype=torch.uint8))
            for tensor in tensors:
                self._send(tensor.detach().cpu().contiguous())
            return value
        size = torch.zeros(1, dtype=torch.int64)
        self._send(size)
        received = torch.empty(int(size), dtype=torch.uint8)
        self._send(received)
        arrived: T = unpacked(received.numpy().tobytes(), self._send)
        return arrived

    def one_by_machine(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns here; the first process of each machine does it before the others."""
        value = work() if self.local_rank == 0 else None
        self.meet()
        return work() if value is None else value

    def meet(self) -> None:
        """Go on when every rank has come to this point."""
        self.add(torch.zeros(1))

    def begin_again(self) -> None:
        """Leave this work with all other ranks; return when each has."""
        again = self.links.generation + 1
        self.watch.call_again(again)
        self.watch.wait_for(f"again/{again}", self.size)
        self.links.renew()

    def require_same(self, values: Mapping[str, str]) -> None:
        """Compare named values of all ranks; raises ``UserError`` on every one when they differ."""
        found = [json.loads(text) for text in self.gathered(json.dumps(dict(values)))]
        require_equal(found)

    def gathered(self, text: str) -> tuple[str, ...]:
        """Return the texts of all ranks, in their order."""
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(own)
        lengths = self.add(lengths)
        rows = torch.zeros(self.size, int(lengths.max()), dtype=torch.uint8)
        rows[self.rank, : len(own)] = own
        rows = self.add(rows)
        return tuple(
            row[:length].numpy().tobytes().decode()
            for row, length in zip(rows, lengths.tolist(), strict=True)
        )

    def _send(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous host tensor of any type with the first rank's."""
        # As bytes, because gloo does not know every type; of no dimension there is no view of another type.
        flat = tensor.view(-1) if tensor.dim() else tensor.view(1)
        for chunk in _chunks(flat.view(torch.uint8)):
            self._wait(partial(self.links.gloo.broadcast, chunk, 0))

    def _wait(self, begin: Callable[[], Any]) -> None:
        """Begin a collective and wait for its end; raises ``RankError`` when the run fails meanwhile."""
        self._check()
        pause = _PAUSE_S[0]
        try:
            work = begin()
            while not work.is_completed():
                self._check()
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE_S[1])
            work.wait()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._check(now=True)
            reason = " ".join(str(error).split())
            cause = self.watch.explain() or self.watch.post(_broken(self.rank, reason))
            raise cause.error() from None

    def _check(self, *, now: bool = False) -> None:
        """Raise what ends this rank's work: a failure elsewhere, or that all are to begin it again."""
        self.watch.check()
        if self.watch.asked_again(now=now) > self.links.generation:
            raise torch.OutOfMemoryError("the device of another process ran out of memory")


def _broken(rank: int, reason: str) -> Failure:
    return Failure(
        rank,
        LOST_CODE,
        f"rank {rank} lost its connection to another process ({reason:.200}); check the network, then "
        f"{RESUME}",
    )


def joined_by_gloo(store: Any, launch: Launch, timeout: timedelta) -> Any:
    """Return the group between the hosts; on one machine nothing listens to the network.

    Raises:
        RankError: the processes cannot reach one another within ``timeout``.
    """
    wanted: Any = timeout  # then torch chooses the network, as GLOO_SOCKET_IFNAME says
    if launch.is_on_one_machine:
        wanted = _c10d.ProcessGroupGloo._Options()
        wanted._timeout = timeout
        wanted._devices = [_c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    store = _c10d.PrefixStore("gloo", store)
    try:
        group = _c10d.ProcessGroupGloo(store, launch.rank, launch.size, wanted)
    except RuntimeError as error:
        raise _broken(launch.rank, " ".join(str(error).split())).error() from None
    group.set_timeout(NEVER)
    return group


def _chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views of a contiguous tensor, each small enough for one collective."""
    rows = max(1, _CHUNK_BYTES // tensor.element_size())
    return torch.split(tensor.view(-1), rows) if tensor.numel() else ()


def require_equal(found: Sequence[Mapping[str, str]]) -> None:
    """Raise ``UserError`` when the values of a rank differ from those of the first, naming both."""
    for rank, values in enumerate(found):
        for name, value in values.items():
            first = found[0].get(name, "nothing")
            if value != first:
                raise UserError(
                    f"rank {rank} differs from rank 0 in the {name} ({value:.60} and {first:.60}); give "
                    "every process the same"
                )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Links:
    """The groups between the ranks: gloo, and nccl from the first sum on GPUs on."""

    def __init__(self, store: Any, launch: Launch, timeout: timedelta) -> None:
        """Connect all ranks; raises ``RankError`` when that takes longer than ``timeout``."""
        self._store, self._launch, self._timeout = store, launch, timeout
        self.gloo: Any = None
        self.nccl: Any = None
        self.generation = -1
        self.renew()

    def renew(self) -> None:
        """Make new groups; the old ones are left as they are, for a collective in them may never end."""
        if self.generation >= 0:
            self.abandon()
        self.generation += 1
        self._part = _c10d.PrefixStore(f"group/{self.generation}", self._store)
        self.gloo = joined_by_gloo(self._part, self._launch, self._timeout)
        self.nccl = None
        self._has_nccl: bool | None = None

    def have_nccl(self, ranks: GroupRanks, tensor: torch.Tensor) -> bool:
        """Tell whether every rank has a GPU of its own and torch has nccl; all ranks hear the same."""
        if self._has_nccl is None:
            own = dist.is_nccl_available() and tensor.device.index == ranks.local_rank
            self._has_nccl = int(ranks.add(torch.tensor([int(own)]))) == ranks.size
            if self._has_nccl:
                options = _c10d.ProcessGroupNCCL.Options()
                options._timeout = NEVER
                store = _c10d.PrefixStore("nccl", self._part)
                self.nccl = _c10d.ProcessGroupNCCL(store, ranks.rank, ranks.size, options)
        return self._has_nccl

    def abandon(self) -> None:
        """Leave the groups as they are when a collective in them may never end.

        Gloo's destructor waits for it, with the interpreter's lock held: so the group outlives all else.
        """
        self.close()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.gloo))

    def close(self) -> None:
        """End what is between the GPUs without waiting for collectives that are under way."""
        if self.nccl is not None:
            self.nccl.abort()
