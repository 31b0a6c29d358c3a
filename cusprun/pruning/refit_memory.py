"""What the refit takes of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.families import axis_length
from cusprun.pruning.refit import RefitSettings
from cusprun.walk.budget import FLOAT, MARGIN, Demand, block_bytes, kept_bytes, token_bytes
from cusprun.walk.device import DEFAULT_DTYPE

_DOUBLE = 8
_SHARE = 12 / 64
"""Of a bound on memory, what a solve takes: a dozen tensors of up to a 64th, as larger ones lie in files."""


def refitting(
    index: CheckpointIndex,
    lengths: Sequence[int],
    settings: RefitSettings,
    memory_bytes: int | None = None,
    dtype: str = DEFAULT_DTYPE,
) -> Demand:
    """Return what the refit takes within a bound on memory, or without, with products in ``dtype``.

    ``lengths`` are those of the documents, in tokens.
    """
    fixed = {**kept_bytes(index, lengths), f"one block in {dtype}": block_bytes(index, dtype)}
    demand = Demand("the refit", fixed, token_bytes(index, lengths, dtype), max(lengths, default=1))
    solving = _solving_bytes(index, lengths, settings)
    if memory_bytes is not None:
        # The least that would do is where the solve's share of it and all else just fill it.
        least = demand.least_bytes / (1 - MARGIN * _SHARE)
        solving = min(solving, round(_SHARE * max(memory_bytes, least)))
    return replace(demand, fixed={**fixed, "the least squares": solving})


def mapped_bytes(
    index: CheckpointIndex, lengths: Sequence[int], settings: RefitSettings, memory_bytes: int | None
) -> int:
    """Return the bytes of the refit's matrices that lie in files within a bound on memory; 0 without."""
    whole = _solving_bytes(index, lengths, settings)
    return 0 if memory_bytes is None else max(0, whole - round(_SHARE * memory_bytes))


def _solving_bytes(index: CheckpointIndex, lengths: Sequence[int], settings: RefitSettings) -> int:
    """Return the bytes of the least squares of the widest projection with everything in memory."""
    if settings.mode != "refit":
        return 0
    hidden = index.shape.hidden_size
    width = max(axis_length(axis, index.shape) for axis in ("ffn", "heads"))
    tokens = sum(lengths) + min(settings.anchors, index.shape.vocab_size)
    weights = _DOUBLE * width * hidden * (3 if settings.target == "output" else 5)
    if 2 * tokens < width:
        return weights + FLOAT * tokens * width + 3 * _DOUBLE * tokens * tokens
    return weights + (FLOAT + 3 * _DOUBLE) * width * width
