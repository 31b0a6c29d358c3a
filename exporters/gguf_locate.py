"""Where a GGUF file parts from the folder it was made from: the first tensor that rounding cannot explain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

from cusprun.checkpoint.gguf_header import GgufFile, GgufTensor, read_gguf
from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from exporters.gguf_rope import Rope, rope_of
from exporters.gguf_tensors import PlannedTensor, plan_tensors, tensor_chunks

log = logging.getLogger(__name__)

_ROUNDING = {
    QuantType.F32: 1e-6,
    QuantType.F16: 1e-3,
    QuantType.BF16: 4e-3,
    QuantType.Q8_0: 0.02,
    QuantType.Q6_K: 0.06,
    QuantType.Q5_1: 0.12,
    QuantType.Q5_0: 0.12,
    QuantType.Q5_K: 0.12,
    QuantType.Q4_1: 0.24,
    QuantType.Q4_0: 0.24,
    QuantType.Q4_K: 0.24,
    QuantType.IQ4_NL: 0.24,
    QuantType.IQ4_XS: 0.24,
    QuantType.Q3_K: 0.45,
    QuantType.Q2_K: 0.75,
}
"""Largest relative error (Frobenius norm) that a type explains. About twice what it costs normally
distributed weights, since weights with outliers cost more; those of another tensor are off by 1.4."""

_ORDER = (
    "token_embd", "attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_norm", "attn_k_norm",
    "attn_output", "post_attention_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm",
)  # fmt: skip
"""Parts in the order in which they are computed; the last norm and the head come after all blocks."""


def locate(folder: Path, artifact: Path, quant: str) -> str | None:
    """Compare a file with its folder, tensor by tensor in the order of the graph.

    Returns one sentence about the first tensor that is missing, has another shape, or whose relative error
    is larger than its type explains; None when there is none. ``quant`` only names the file: each tensor is
    judged by its own type. The folder's side is brought to the file's layout (the order of the rows of Q and
    K) by the code that writes files.

    Raises:
        ModelError: one of the two cannot be read.
        ExportError: the folder is of a kind that cannot be written as GGUF.
    """
    index = open_checkpoint(folder)
    rope = rope_of(index, str(index.folder / "config.json"))
    file = read_gguf(artifact)
    skipped = []
    for planned in sorted(plan_tensors(index, "f32", rope), key=_place):
        tensor = file.tensors.get(planned.name)
        if tensor is None or tensor.shape != planned.shape:
            found = "is missing from" if tensor is None else f"has the shape {tensor.shape} in"
            return f"{planned.name} {found} {artifact.name} (the checkpoint has {planned.shape})"
        if tensor.type not in _ROUNDING:
            skipped.append(planned.name)
            continue
        error = _relative_error(index, planned, rope, file, tensor)
        if not error <= _ROUNDING[tensor.type]:
            return (
                f"{planned.name} ({planned.source or 'computed from the config'}) is off by {error:.2g} of "
                f"its norm in {quant}, where {tensor.type.name.lower()} explains {_ROUNDING[tensor.type]:g}"
            )
    if skipped:
        log.info("note: %d tensors (%s, ...) are of types that cannot be read back", len(skipped), skipped[0])
    return None


def _place(planned: PlannedTensor) -> tuple[int, int, str]:
    parts = planned.name.split(".")
    part = parts[-2]
    block = int(parts[1]) if parts[0] == "blk" else (-1 if part in ("token_embd", "rope_freqs") else 1 << 30)
    return block, _ORDER.index(part) if part in _ORDER else len(_ORDER), planned.name


def _relative_error(
    index: CheckpointIndex, planned: PlannedTensor, rope: Rope, file: GgufFile, tensor: GgufTensor
) -> float:
    """Return the norm of the difference over the norm of the checkpoint's tensor; NaN stays NaN."""
    row = planned.shape[-1]
    num_rows = planned.num_elements // row
    data = np.memmap(file.path, np.uint8, "r", tensor.offset, (num_rows, tensor.num_bytes // num_rows))
    off = size = 0.0
    start = 0
    for chunk in tensor_chunks(index, replace(planned, type=QuantType.F32), rope):
        wanted = chunk.view(np.float32).reshape(-1, row)
        found = _values(data[start : start + len(wanted)], tensor.type, wanted.shape)
        off += float(np.square(found - wanted, dtype=np.float64).sum())
        size += float(np.square(wanted, dtype=np.float64).sum())
        start += len(wanted)
    return float(np.sqrt(off / size)) if size else float(np.sqrt(off))


def _values(data: NDArray[np.uint8], kind: QuantType, shape: Sequence[int]) -> NDArray[np.float32]:
    raw = np.ascontiguousarray(data)
    plain = {QuantType.F32: np.float32, QuantType.F16: np.float16}.get(kind)
    values = raw.view(plain) if plain else gguf.quants.dequantize(raw, kind)
    found: NDArray[np.float32] = np.asarray(values, dtype=np.float32).reshape(tuple(shape))
    return found
