"""What to do when a device runs out of memory: the same work in smaller batches, once, or a refusal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from cusprun.errors import DeviceError
from cusprun.walk.batches import DEFAULT_BATCH_TOKENS
from cusprun.walk.device import Device
from cusprun.walk.ranks import ALONE, Ranks

log = logging.getLogger(__name__)
T = TypeVar("T")

_SMALLER = 4
"""A second try has batches smaller by this; activations, and no weights, shrink with them."""


@dataclass(frozen=True)
class Batching:
    """How documents are batched; ``note`` follows the name of the stage and says why it is begun again."""

    tokens: int = DEFAULT_BATCH_TOKENS
    note: str = ""

    def smaller(self, note: str) -> Batching:
        """Return a quarter of it, for a second try that ``note`` gives the reason of."""
        return Batching(max(1, self.tokens // _SMALLER), note)

    def share_of(self, count: int) -> int:
        """Return how many of the ``count`` things of a usual batch make one of these, at least 1."""
        return max(1, count * self.tokens // DEFAULT_BATCH_TOKENS)


DEFAULT_BATCHING = Batching()

_SIGNS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def with_smaller_batches(
    device: Device,
    work: Callable[[Batching], T],
    batching: Batching = DEFAULT_BATCHING,
    ranks: Ranks = ALONE,
) -> T:
    """Return what ``work`` returns, done again from its start in smaller batches when memory is short.

    ``batching`` is that of the first try. Where ``ranks`` share the work, all begin it again together.

    Raises:
        DeviceError: the device runs out of memory again.
    """
    try:
        with _told_as_one():
            done = work(batching)
            ranks.meet()  # one that goes on could not begin again with the others
            return done
    except torch.OutOfMemoryError:
        pass  # and out of the clause, for the error keeps the tensors of its frames alive
    device.free()
    ranks.begin_again()
    short = device.name if ranks.size == 1 else "the device of a process"
    note = f", again in smaller batches because {short} ran out of memory"
    try:
        with _told_as_one():
            return work(batching.smaller(note))
    except torch.OutOfMemoryError:
        raise DeviceError(
            f"{device.name} has too little memory, for a quarter of the usual batch too; free some of it, "
            "lower 'max_tokens' of the expert, or take another device or the cpu"
        ) from None


@contextmanager
def _told_as_one() -> Iterator[None]:
    """Make ``OutOfMemoryError`` of what libraries and drivers say, which torch passes on as plain errors."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(sign in str(error) for sign in _SIGNS):
            raise
        raise torch.OutOfMemoryError(str(error)) from None


def on_device_or_host(device: Device, on_device: Callable[[], T], on_host: Callable[[], T]) -> T:
    """Return what ``on_device`` returns or, where the device has too little memory for it, ``on_host``."""
    try:
        with _told_as_one():
            return on_device()
    except torch.OutOfMemoryError:
        pass
    device.free()
    log.info("note: %s has too little memory to solve a refit, which the CPU does", device.name)
    return on_host()
