"""Weights from a GGUF file: names, the rotary permutation, dequantising in bounded pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch

from cusprun.checkpoint.gguf_config import ROPE_FACTORS
from cusprun.checkpoint.gguf_header import GgufFile, GgufTensor
from cusprun.errors import ModelError, UnsupportedModelError
from cusprun.families import Family, TensorSpec, axis_length
from cusprun.records import Shape

_PLAIN: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}
_PIECE_ELEMENTS = 1 << 21  # 8 MB of float32; the K-quants take some ten times that in temporaries
_RECOMPUTED = (ROPE_FACTORS, "attn_rot_embd.weight")  # tables that stock models compute themselves


@dataclass(frozen=True)
class PlannedWeight:
    """One tensor to write.

    ``source`` is None for a bias of zeros, ``heads`` > 0 undoes the permutation, and ``offset`` is taken off
    every value.
    """

    name: str
    shape: tuple[int, ...]
    source: GgufTensor | None
    heads: int = 0
    offset: float = 0.0


def plan_weights(file: GgufFile, family: Family, shape: Shape) -> tuple[list[PlannedWeight], dict[str, bool]]:
    """Pair each tensor of the family with one of the file; also return the config's bias flags.

    A config flag switches several biases together: where a file has some of them, the others are zeros.

    Raises:
        ModelError: a tensor is missing or has another shape than the metadata say.
        UnsupportedModelError: the file holds a tensor that the family has no place for, or one of a type that
            cannot be dequantised.
    """
    names = _gguf_names(family, shape.num_hidden_layers)
    specs = list(family.specs(shape.num_hidden_layers))
    flags, zeros = {}, set()
    for flag, patterns in family.bias_flags.items():
        biases = {
            pattern.replace("{layer}", str(n)) for pattern in patterns for n in range(shape.num_hidden_layers)
        }
        flags[flag] = any(names[bias] in file.tensors for bias in biases)
        zeros |= biases if flags[flag] else set()
    known = set(names.values())
    for name in file.tensors:
        if name not in known and not name.endswith(_RECOMPUTED):
            raise UnsupportedModelError(
                f"{file.path} holds the tensor {name[:60]!r}, which {family.architecture} has no place for"
            )
    plan = []
    for spec in specs:
        source = file.tensors.get(names[spec.name])
        if source is None and spec.name not in zeros:
            if spec.optional:
                continue
            raise ModelError(f"{file.path} has no tensor {names[spec.name]}; download the file again")
        plan.append(_planned(file, family, shape, spec, source))
    return plan, flags


def _gguf_names(family: Family, num_hidden_layers: int) -> dict[str, str]:
    """Return the GGUF name of each tensor of the family."""
    architecture = next(
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf_architecture
    )
    table = gguf.get_tensor_name_map(architecture, num_hidden_layers)
    return {
        spec.name: table.get_name(spec.name, try_suffixes=(".weight", ".bias"))
        for spec in family.specs(num_hidden_layers)
    }


def _planned(
    file: GgufFile, family: Family, shape: Shape, spec: TensorSpec, source: GgufTensor | None
) -> PlannedWeight:
    wanted = tuple(axis_length(axis, shape) for axis in spec.axes)
    if source is not None:
        if source.shape != wanted:
            raise ModelError(
                f"{file.path}: {source.name} has the shape {source.shape} where the metadata say {wanted}"
            )
        if source.type.name not in _PLAIN and not _can_dequantise(source.type):
            raise UnsupportedModelError(
                f"{file.path}: {source.name} is of the type {source.type.name}, which cannot be dequantised; "
                "use a file in another type, such as Q8_0"
            )
    rotated = family.gguf_permutes_rope and any(part in spec.name for part in (".q_proj.", ".k_proj."))
    heads = {"heads": shape.num_attention_heads, "kv": shape.num_key_value_heads}.get(spec.axes[0], 0)
    offset = family.norm_offset if spec.is_norm else 0.0
    return PlannedWeight(spec.name, wanted, source, heads if rotated else 0, offset)


@cache
def _can_dequantise(kind: Any) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of Q or K, ``(heads * head_dim, ...)``, from adjacent pairs back into two halves per head.

    llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + head_dim / 2.
    """
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def read_weight(file: GgufFile, stream: BinaryIO, weight: PlannedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Read, dequantise and cast one tensor; memory beyond the result is bounded by a piece.

    Raises:
        ModelError: the file ended early, or a value is NaN, infinite or beyond the range of ``dtype``.
    """
    if weight.source is None:
        return torch.zeros(weight.shape, dtype=dtype)
    result = torch.empty(weight.shape, dtype=dtype)
    flat, position = result.view(-1), 0
    for piece in _pieces(file, stream, weight.source):
        values = torch.from_numpy(piece - weight.offset if weight.offset else piece)
        rounded = flat[position : position + len(values)].copy_(values)
        position += len(values)
        if not torch.isfinite(rounded).all():
            raise _not_finite(file, weight.source.name, bool(torch.isfinite(values).all()), dtype)
    return unpermute(result, weight.heads) if weight.heads else result


def _not_finite(file: GgufFile, name: str, sound: bool, dtype: torch.dtype) -> ModelError:
    if sound:
        return ModelError(
            f"{file.path}: {name} holds values beyond the range of {dtype}; import with dtype float32"
        )
    return ModelError(f"{file.path}: {name} holds NaN or infinite values; start from a sound file")


def _pieces(file: GgufFile, stream: BinaryIO, tensor: GgufTensor) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the tensor as flat float32 arrays of at most about ``_PIECE_ELEMENTS`` values."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
    blocks_left = tensor.num_elements // block_elements
    step = max(1, _PIECE_ELEMENTS // block_elements)
    stream.seek(tensor.offset)
    while blocks_left:
        blocks = min(step, blocks_left)
        raw = stream.read(blocks * block_bytes)
        if len(raw) != blocks * block_bytes:
            raise ModelError(f"{file.path} ended early while {tensor.name} was read; copy the file again")
        blocks_left -= blocks
        with np.errstate(all="ignore"):  # overflow gives infinity, which is reported above
            if tensor.type.name in _PLAIN:
                yield np.frombuffer(raw, _PLAIN[tensor.type.name]).astype(np.float32)
            else:
                packed = np.frombuffer(raw, np.uint8).reshape(1, -1)
                yield np.ascontiguousarray(
                    gguf.quants.dequantize(packed, tensor.type).reshape(-1), np.float32
                )


def source_types(plan: Sequence[PlannedWeight]) -> dict[str, int]:
    """Return how many elements of matrices are stored in each GGUF type."""
    types: dict[str, int] = {}
    for weight in plan:
        if weight.source is not None and len(weight.shape) == 2:
            types[weight.source.type.name] = types.get(weight.source.type.name, 0) + math.prod(weight.shape)
    return types
