"""The importance of input features in the form that llama.cpp's quantiser takes: an importance matrix."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cusprun.errors import ExportError
from exporters.gguf_tensors import PlannedTensor

log = logging.getLogger(__name__)

HEAD = "lm_head"
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_FLOOR = 1e-6
"""Least importance over the mean: a block of inputs that no document used is rounded, not set to zero."""


def importance_matrix(
    importance: Mapping[str, NDArray[np.float32]], tensors: Sequence[PlannedTensor]
) -> dict[str, NDArray[np.float32]]:
    """Return one vector per matrix, float32 ``[row length]``, by GGUF tensor name.

    The order of the inputs is the same on both sides: where llama.cpp wants the rows of Q and K permuted,
    the columns stay. A model without a head of its own uses the embedding as head, whose importance is then
    that of the head's input; an embedding that is only looked up in has none. llama.cpp passes over a vector
    that is missing or zero in silence, so that is said here.

    Raises:
        ExportError: a vector has another length than the rows, or holds values that are negative or not
            finite.
    """
    has_output = any(tensor.name == _OUTPUT for tensor in tensors)
    vectors: dict[str, NDArray[np.float32]] = {}
    without = []
    for tensor in tensors:
        if len(tensor.shape) < 2 or (tensor.name == _EMBEDDING and has_output):
            continue
        key = HEAD if tensor.name in (_EMBEDDING, _OUTPUT) else tensor.source.removesuffix(".weight")
        vector = _checked(importance[key], key, tensor) if key in importance else None
        if vector is None or not vector.any():
            without.append(tensor.name)
        else:
            vectors[tensor.name] = vector
    if without:
        log.info(
            "note: %d of %d matrices (%s, ...) have no importance and are rounded without",
            len(without), len(without) + len(vectors), without[0],
        )  # fmt: skip
    return vectors


def _checked(vector: NDArray[np.float32], key: str, tensor: PlannedTensor) -> NDArray[np.float32]:
    """Return the vector as C floats, its smallest values raised to the floor."""
    found = np.asarray(vector)
    if found.shape != (tensor.shape[-1],):
        raise ExportError(
            f"the importance of {key} has the shape {found.shape} where {tensor.name} has rows of "
            f"{tensor.shape[-1]}; take it on the model that is exported"
        )
    if not np.isfinite(found).all() or (found < 0).any():
        raise ExportError(
            f"the importance of {key} holds values that are negative or not finite; take it again"
        )
    raised = np.maximum(found, _FLOOR * found.mean(dtype=np.float64))
    return np.ascontiguousarray(raised, dtype=np.float32)
