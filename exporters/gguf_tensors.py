"""Which tensors a GGUF file gets, in which type, and their bytes, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import ExportError
from cusprun.families import TensorSpec, axis_length
from cusprun.progress import SILENT, Progress
from exporters.gguf_encode import Bits, encode, read_rows, write_all
from exporters.gguf_rope import Rope
from exporters.gguf_support import query_scale, target_of

QUANTS = {
    "f32": (QuantType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (QuantType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (QuantType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (QuantType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Precision by name: the type of the matrices, and what the file calls itself."""

_CHUNK_ELEMENTS = 1 << 19  # 1 MB of bf16: each step finds the result of the last one in the cache
_ROPE_FACTORS = "rope_freqs.weight"
_FUSED_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Names of the parts of fused matrices, in the order of their rows; llama.cpp's names follow from them."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to be written: ``shape[0]`` rows of ``source`` from ``first_row`` on.

    With ``head_dim`` set, the first ``rotated`` rows of each head are reordered (see ``interleave_rope``).
    Values become ``(value + offset) * scale``; only vectors have any.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: QuantType
    first_row: int = 0
    head_dim: int = 0
    rotated: int = 0
    offset: float = 0.0
    scale: float = 1.0

    @property
    def num_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.num_elements // int(block) * int(size)


def plan_tensors(index: CheckpointIndex, quant: str, rope: Rope) -> list[PlannedTensor]:
    """Return every tensor of the file, in the order of writing.

    Matrices take the type of ``quant``, or f16 when their rows do not fill its blocks; vectors are float32.
    Where the file's graph is not the family's own, fused matrices are taken apart.

    Raises:
        ExportError: llama.cpp has no name for a tensor.
    """
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    target = target_of(index)
    names = gguf.get_tensor_name_map(architectures[target.architecture], index.shape.num_hidden_layers)
    planned = []
    if rope.frequency_factors is not None:
        planned.append(PlannedTensor(_ROPE_FACTORS, "", rope.frequency_factors.shape, QuantType.F32))
    specs = {spec.name: spec for spec in index.family.specs(index.shape.num_hidden_layers)}
    takes_apart = target.architecture != index.family.gguf_architecture
    for source in index.tensors:
        for alias, first_row, shape in _parts(index, specs[source], takes_apart):
            name = names.get_name(alias, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ExportError(f"{index.folder}: llama.cpp has no name for the tensor {source}")
            part = name.split(".")[-2]
            turned = target.rotates_pairs and part in ("attn_q", "attn_k")
            planned.append(
                PlannedTensor(
                    name,
                    source,
                    shape,
                    type_of(shape, quant),
                    first_row,
                    head_dim=index.shape.head_dim if turned else 0,
                    rotated=rope.dimensions if turned else 0,
                    offset=index.family.norm_offset if specs[source].is_norm else 0.0,
                    scale=query_scale(index) if part == "attn_q_norm" else 1.0,
                )
            )
    return planned


def _parts(
    index: CheckpointIndex, spec: TensorSpec, takes_apart: bool
) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield a name, the first row and the shape of each part that a tensor is written as."""
    shape = index.tensors[spec.name].shape
    fused = next((name for name in _FUSED_PARTS if f".{name}." in spec.name), None)
    if not takes_apart or fused is None:
        yield spec.name, 0, shape
        return
    first_row = 0
    for part, axis in zip(_FUSED_PARTS[fused], spec.axes[0].split("+"), strict=True):
        rows = axis_length(axis, index.shape)
        yield spec.name.replace(f".{fused}.", f".{part}."), first_row, (rows, *shape[1:])
        first_row += rows


def type_of(shape: tuple[int, ...], quant: str) -> QuantType:
    """Return the type that a tensor gets under ``quant``."""
    wanted = QUANTS[quant][0]
    if len(shape) < 2:
        return QuantType.F32
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if shape[-1] % block == 0 else QuantType.F16


def tensor_chunks(index: CheckpointIndex, planned: PlannedTensor, rope: Rope) -> Iterator[Bits]:
    """Yield the bytes of one tensor in the planned type, a few rows at a time.

    An array is valid until the next one is asked for. Memory is some 10 MB, however large the tensor.

    Raises:
        ModelError: the tensor cannot be read, or holds NaN or infinite values.
        ExportError: a value lies outside the range of the type.
    """
    if not planned.source:
        assert rope.frequency_factors is not None
        yield rope.frequency_factors.view(np.uint8)
        return
    info = index.tensors[planned.source]
    row_elements = math.prod(planned.shape[1:])
    step = max(1, _CHUNK_ELEMENTS // row_elements)
    if planned.head_dim:
        step = -(-step // planned.head_dim) * planned.head_dim
    for rows in read_rows(info, planned.first_row, planned.shape[0], step):
        turned = interleave_rope(rows, planned.head_dim, planned.rotated) if planned.head_dim else rows
        yield encode(turned, info, planned.type, offset=planned.offset, scale=planned.scale)


def tensor_data(index: CheckpointIndex, planned: PlannedTensor, rope: Rope) -> NDArray[np.generic]:
    """Return one whole tensor: float32 or float16 in its shape, other types as uint8 rows of their bytes.

    Raises:
        ModelError, ExportError: as ``tensor_chunks``.
    """
    data = np.empty(planned.num_bytes, np.uint8)
    position = 0
    for chunk in tensor_chunks(index, planned, rope):
        data[position : position + chunk.size] = chunk
        position += chunk.size
    plain = {QuantType.F32: np.float32, QuantType.F16: np.float16}.get(planned.type)
    return data.view(plain).reshape(planned.shape) if plain else data.reshape(planned.shape[0], -1)


def append_tensors(
    path: Path,
    index: CheckpointIndex,
    tensors: Sequence[PlannedTensor],
    rope: Rope,
    *,
    stage: str,
    progress: Progress = SILENT,
) -> None:
    """Write the data of all tensors behind the header of a GGUF file, each padded to the alignment.

    Raises:
        ModelError, ExportError: as ``tensor_chunks``.
        OSError: the disk is full.
    """
    alignment = int(gguf.GGUF_DEFAULT_ALIGNMENT)
    with path.open("ab", buffering=0) as out, progress.stage(stage, len(tensors), "tensor") as advance:
        out.write(bytes(-out.tell() % alignment))
        for planned in tensors:
            for chunk in tensor_chunks(index, planned, rope):
                write_all(out, chunk)
            out.write(bytes(-planned.num_bytes % alignment))
            advance(1)


def interleave_rope(rows: NDArray[np.generic], head_dim: int, rotated: int) -> NDArray[np.generic]:
    """Reorder the rows of each head from halves (x0 x1 .. y0 y1 ..) to pairs (x0 y0 x1 y1 ..).

    ``rows`` has shape ``[heads * head_dim, ...]``; of each head the first ``rotated`` rows are reordered.
    Hugging Face rotates feature i with i + rotated / 2, llama.cpp's ``llama`` rotates 2i with 2i + 1.
    """
    order = np.arange(head_dim)
    order[:rotated] = order[:rotated].reshape(2, -1).T.reshape(-1)
    return rows.reshape(-1, head_dim, *rows.shape[1:])[:, order].reshape(rows.shape)
