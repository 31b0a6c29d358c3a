"""The first blocks of a model, pruned for a trial: what the whole will take is worked out from it.

With l blocks and t tokens a stage takes once + a t + l (b + c t) seconds: opening and writing what is not a
block; the embedding, the head and the files of the streams; loading a block and solving for it; its products.
Two numbers of blocks with two numbers of tokens tell all four; with all tokens one number of them is enough.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.records import TokenizedDocument

T = TypeVar("T")

_SAMPLE_S = 0.003
_SHORT_S = 2.0
"""A trial that takes less is repeated, and the faster one counts."""


def first_blocks(index: CheckpointIndex, count: int) -> CheckpointIndex:
    """Return the index of a model's first ``count`` blocks, with its embedding and its head."""
    from cusprun.pruning.folder import cut_blocks

    names = {spec.name for spec in index.family.specs(count)}
    cut = cut_blocks(index, range(count)) if count < index.shape.num_hidden_layers else {}
    return replace(
        index,
        config={**index.config, **cut},
        shape=replace(index.shape, num_hidden_layers=count),
        tensors={name: info for name, info in index.tensors.items() if name in names},
    )


def spread(documents: Sequence[TokenizedDocument], tokens: int) -> tuple[TokenizedDocument, ...]:
    """Return documents of all lengths alike, of about ``tokens`` tokens together; all, if they have fewer.

    One at the least.
    """
    every = min(len(documents), max(1, num_tokens(documents) // max(1, tokens)))
    ordered = sorted(documents, key=lambda document: -len(document.token_ids))
    return tuple(ordered[every // 2 :: every])


def num_tokens(documents: Sequence[TokenizedDocument]) -> int:
    """Return the tokens of documents."""
    return sum(len(document.token_ids) for document in documents)


def predicted_seconds(times: Mapping[tuple[int, int], float], layers: int, tokens: int) -> float:
    """Return how long a stage takes with ``layers`` blocks and ``tokens`` tokens.

    ``times`` are measured, by blocks (1, and more unless the model has one) and tokens (one number or two). A
    number of tokens that was not tried with every number of blocks counts for nothing.
    """
    counts = sorted({count for count, _ in times})
    every = {size for _, size in times}
    sizes = sorted(size for size in every if all((count, size) in times for count in counts))
    most = counts[-1]
    if most == 1:
        return _along(sizes, [times[1, size] for size in sizes], tokens)
    by_layer = [max(0.0, times[most, size] - times[1, size]) / (most - 1) for size in sizes]
    rest = [max(0.0, times[1, size] - each) for size, each in zip(sizes, by_layer, strict=True)]
    return _along(sizes, rest, tokens) + layers * _along(sizes, by_layer, tokens)


def _along(sizes: Sequence[int], values: Sequence[float], tokens: int) -> float:
    """Return the value at ``tokens`` of the line through two points; of one, that of the point."""
    if len(sizes) == 1 or sizes[-1] == sizes[0]:
        return values[0]
    slope = max(0.0, (values[-1] - values[0]) / (sizes[-1] - sizes[0]))
    return max(0.0, values[0] + slope * (tokens - sizes[0]))


def timed(work: Callable[[], T], before: Callable[[], None] = lambda: None) -> tuple[T, float]:
    """Return what ``work`` returns and how long it took, the faster of two when that is short."""
    best = float("inf")
    for _ in range(2):
        before()
        started = time.perf_counter()
        result = work()
        took = time.perf_counter() - started
        best = min(best, took)
        if took > _SHORT_S:
            break
    return result, best


def drop_cached(index: CheckpointIndex) -> None:
    """Let the system forget the pages of a model's files, as it does itself with one larger than memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for info in index.tensors.values():
        with suppress(OSError), info.file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), info.offset, info.num_bytes, os.POSIX_FADV_DONTNEED)


@dataclass
class MemoryWatch:
    """The most memory of this process that no file stands behind, by stage; empty where it is not told."""

    highest: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Watch as long as the context lasts."""
        done = threading.Event()

        def watch() -> None:
            while True:
                now = anonymous_bytes()
                if now is None:
                    return
                self.highest[stage] = max(self.highest.get(stage, 0), now)
                if done.wait(_SAMPLE_S):
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def anonymous_bytes() -> int | None:
    """Return the kernel's ``RssAnon`` of this process; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)
