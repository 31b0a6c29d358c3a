"""What the refit takes of memory, and which of its matrices lie in files."""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.families import axis_length
from cusprun.pruning.refit import RefitSettings
from cusprun.walk.batches import DEFAULT_BATCH_TOKENS
from cusprun.walk.budget import FLOAT, Demand, block_bytes, token_bytes

_DOUBLE = 8
_WEIGHTS = 3
"""Matrices of a projection's size in float64 while it is solved."""

MAPPED_BYTES = 1 << 26
"""Matrices that are larger than this, 67 MB, lie in files where memory is short."""


def refitting(index: CheckpointIndex, lengths: Sequence[int], settings: RefitSettings) -> Demand:
    """Return what the refit takes with its large matrices in files.

    ``lengths`` are those of the documents, in tokens.
    """
    return _demand(index, lengths, _solving_bytes(index, lengths, settings, MAPPED_BYTES))


def scratch_limit(
    index: CheckpointIndex, lengths: Sequence[int], settings: RefitSettings, memory_bytes: int | None
) -> int | None:
    """Return how large a matrix may be that is kept in memory; None when all are.

    They are, where they fit beside the usual batches.
    """
    if memory_bytes is None:
        return None
    whole = _demand(index, lengths, _solving_bytes(index, lengths, settings, None))
    return None if whole.total_bytes(DEFAULT_BATCH_TOKENS) <= memory_bytes else MAPPED_BYTES


def _demand(index: CheckpointIndex, lengths: Sequence[int], solving: int) -> Demand:
    fixed = {"one block in float32": block_bytes(index), "the least squares": solving}
    return Demand("the refit", fixed, token_bytes(index, lengths), max(lengths, default=1))


def _solving_bytes(
    index: CheckpointIndex, lengths: Sequence[int], settings: RefitSettings, limit: int | None
) -> int:
    """Return the bytes of the least squares of the widest projection; ``limit`` is that of a matrix."""
    if settings.mode != "refit":
        return 0
    hidden = index.shape.hidden_size
    width = max(axis_length(axis, index.shape) for axis in ("ffn", "heads"))
    rows = sum(lengths) + min(settings.anchors, index.shape.vocab_size)
    matrices = [_DOUBLE * width * hidden] * _WEIGHTS
    if settings.target != "output":
        matrices += [_DOUBLE * width * hidden] * 2
    if rows < width / 2:
        matrices += [FLOAT * rows * width, *[_DOUBLE * rows * rows] * 3]
    else:
        matrices += [FLOAT * width * width, *[_DOUBLE * width * width] * 3]
    return sum(size for size in matrices if limit is None or size <= limit)
