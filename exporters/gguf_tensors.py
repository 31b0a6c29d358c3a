"""Which tensors a GGUF file gets, in which type, and their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.reader import read_tensor
from cusprun.errors import ExportError
from exporters.gguf_rope import Rope

QUANTS = {
    "f32": (QuantType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (QuantType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (QuantType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (QuantType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Precision by name: the type of the matrices, and what the file calls itself."""

_CHUNK_ELEMENTS = 1 << 24  # rows are quantised 64 MB of float32 at a time; gguf needs about 4 times that
_F16_MAX = 65504.0
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Graph:
    """What llama.cpp's graph of a family computes besides the plain decoder."""

    has_attention_biases: bool


FAMILIES = {
    "llama": Graph(has_attention_biases=True),
    "mistral": Graph(has_attention_biases=True),
    "qwen2": Graph(has_attention_biases=True),
    "qwen3": Graph(has_attention_biases=False),
}
"""The families that can be written, by ``model_type``."""


@dataclass(frozen=True)
class Target:
    """A graph of llama.cpp; with ``permutes_rope`` it rotates adjacent pairs, not halves."""

    architecture: str
    permutes_rope: bool


_WIDE_ATTENTION = {"qwen2": Target("llama", True)}
"""Graphs that insist on heads x head_dim = hidden_size, and the graph that computes the same without."""


def target_of(index: CheckpointIndex) -> Target:
    """Return the graph of llama.cpp that computes the model."""
    own = Target(index.family.gguf_architecture, index.family.gguf_permutes_rope)
    square = index.shape.num_attention_heads * index.shape.head_dim == index.shape.hidden_size
    return own if square else _WIDE_ATTENTION.get(own.architecture, own)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to be written; ``rope_heads`` is the number of heads whose rows are permuted, or 0."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: QuantType
    rope_heads: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(block) * int(size)


def plan_tensors(index: CheckpointIndex, quant: str, rope: Rope) -> list[PlannedTensor]:
    """Return every tensor of the file, in the order of writing.

    Matrices take the type of ``quant``, or f16 when their rows do not fill its blocks; vectors are float32.

    Raises:
        ExportError: llama.cpp has no name for a tensor.
    """
    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    target = target_of(index)
    names = gguf.get_tensor_name_map(architectures[target.architecture], index.shape.num_hidden_layers)
    heads = {"attn_q": index.shape.num_attention_heads, "attn_k": index.shape.num_key_value_heads}
    planned = []
    if rope.frequency_factors is not None:
        planned.append(PlannedTensor(_ROPE_FACTORS, "", rope.frequency_factors.shape, QuantType.F32))
    for source, info in index.tensors.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"{index.folder}: llama.cpp has no name for the tensor {source}")
        part = name.split(".")[-2]
        permuted = heads.get(part, 0) if target.permutes_rope else 0
        planned.append(PlannedTensor(name, source, info.shape, type_of(info.shape, quant), permuted))
    return planned


def type_of(shape: tuple[int, ...], quant: str) -> QuantType:
    """Return the type that a tensor gets under ``quant``."""
    wanted = QUANTS[quant][0]
    if len(shape) < 2:
        return QuantType.F32
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if shape[-1] % block == 0 else QuantType.F16


def tensor_data(index: CheckpointIndex, planned: PlannedTensor, rope: Rope) -> NDArray[np.generic]:
    """Read one tensor and return its bytes in the planned type.

    Raises:
        ModelError: the tensor cannot be read, or holds NaN or infinite values.
        ExportError: a value lies outside the range of f16.
    """
    if planned.name == _ROPE_FACTORS:
        assert rope.frequency_factors is not None
        return rope.frequency_factors
    tensor = read_tensor(index, planned.source)
    if planned.rope_heads:
        tensor = interleave_rope(tensor, planned.rope_heads)
    return encode(tensor, planned.type, f"{index.folder}: {planned.source}")


def interleave_rope(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from halves (x0 x1 .. y0 y1 ..) to pairs (x0 y0 x1 y1 ..).

    Hugging Face rotates feature i with i + head_dim / 2, llama.cpp's ``llama`` rotates 2i with 2i + 1.
    """
    pairs = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, pairs, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def encode(tensor: torch.Tensor, kind: QuantType, where: str) -> NDArray[np.generic]:
    """Return the tensor's values in the GGUF type ``kind``, rounded to nearest.

    Raises:
        ExportError: a value lies outside the range of f16 (also of the f16 scales of q8_0).
    """
    limit = {QuantType.F16: _F16_MAX, QuantType.Q8_0: 127 * _F16_MAX}.get(kind, math.inf)
    if limit < math.inf and tensor.numel() and float(_largest(tensor)) > limit:
        raise ExportError(
            f"{where} holds values beyond {limit:g}, which {kind.name.lower()} cannot hold; use bf16 or f32"
        )
    result: NDArray[np.generic]
    if kind is QuantType.F32:
        result = tensor.float().contiguous().numpy()
    elif kind is QuantType.F16:
        result = tensor.to(torch.float16).contiguous().numpy()
    elif kind is QuantType.BF16:
        result = tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    else:
        result = np.concatenate([gguf.quants.quantize(rows, kind) for rows in _row_chunks(tensor)])
    return result


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """Largest absolute value; aminmax reads the data once, without the copy that ``abs`` makes."""
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high)


def _row_chunks(tensor: torch.Tensor) -> Iterator[NDArray[np.float32]]:
    rows = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows].float().contiguous().numpy()
