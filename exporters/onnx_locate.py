"""Where an ONNX graph parts from the folder it was made from: the first tensor that rounding cannot
explain."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.errors import ModelError
from exporters.onnx_build import MODEL_NAME
from exporters.onnx_rope import rotary_tables

if TYPE_CHECKING:
    import torch

_ROUNDING = {32: 1e-6, 16: 1e-3, 8: 0.02, 4: 0.24}
"""Largest relative error (Frobenius norm) that a number of bits explains: about twice what it costs normally
distributed weights, since weights with outliers cost more; those of another tensor are off by 1.4."""

_QUANTISED = "MatMulNBits"
_MATRIX = re.compile(r"/(?:model/layers\.(\d+)/(?:attn|mlp)/|)(\w+)/MatMul(?:_Q\d)?")
_BLOCK = re.compile(
    r"model\.layers\.(\d+)\.(?:attn\.|mlp\.)?(\w+?)\.(?:layernorm\.|Add\.|MatMul\.)?(weight|bias)"
)


@dataclass(frozen=True)
class _Stored:
    """One tensor of the graph as the checkpoint has it, float32 ``[out, in]`` or ``[out]``, and its bits."""

    name: str
    values: NDArray[np.float32]
    bits: int


def locate(folder: Path, artifact: Path, quant: str) -> str | None:
    """Compare a graph with its folder, tensor by tensor in the order of the graph.

    Returns one sentence about the first tensor whose shape or relative error its precision does not explain;
    None when there is none. ``quant`` only names the export: each tensor is judged by its own bits.

    Raises:
        ModelError: one of the two cannot be read.
    """
    index, graph = open_checkpoint(folder), _read_graph(artifact)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for stored, wanted in chain(_weights(index, artifact, graph, tensors), _tables(index, artifact, tensors)):
        found = stored.values
        if found.shape != wanted.shape:
            return f"{stored.name} has the shape {found.shape} where the checkpoint has {wanted.shape}"
        norm = float(np.linalg.norm(wanted))
        error = float(np.linalg.norm(found.astype(np.float64) - wanted)) / (norm or 1.0)
        if not error <= _ROUNDING[stored.bits]:
            return (
                f"{stored.name} is off by {error:.2g} of its norm in {quant}, where {stored.bits} bits "
                f"explain {_ROUNDING[stored.bits]:g}"
            )
    return None


def _read_graph(artifact: Path) -> Any:
    import onnx

    path = artifact / MODEL_NAME
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf raises its own kinds
        raise ModelError(f"{path} cannot be read ({error}); export the model again") from None


def _weights(
    index: CheckpointIndex, artifact: Path, graph: Any, tensors: Mapping[str, Any]
) -> Iterator[tuple[_Stored, NDArray[np.float32]]]:
    """Yield each matrix, norm and bias of the graph, in order, with what the checkpoint has for it."""
    for stored in _stored(artifact, graph, tensors):
        wanted = _wanted(index, stored.name)
        if wanted is not None:
            yield stored, wanted


def _tables(
    index: CheckpointIndex, artifact: Path, tensors: Mapping[str, Any]
) -> Iterator[tuple[_Stored, NDArray[np.float32]]]:
    """Yield the rotary tables, which hold the first of two equal halves, with what transformers computes."""
    names = [name for name in tensors if name.startswith("cos_cache")]
    if not names:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(index.folder, local_files_only=True, trust_remote_code=False)
    tables = rotary_tables(config, index.shape.head_dim, tensors[names[0]].dims[0])
    # one table, or one for each kind of block: those that see everything first
    for name, pair in zip(sorted(names), tables, strict=True):
        for part, table in zip(("cos", "sin"), pair, strict=True):
            full = name.replace("cos", part, 1)
            values, bits = _values(artifact, tensors[full])
            yield _Stored(full, values, bits), table[:, : table.shape[1] // 2].numpy()


def _stored(artifact: Path, graph: Any, tensors: Mapping[str, Any]) -> Iterator[_Stored]:
    """Yield matrices, norms and biases in the order in which they are computed."""
    for node in graph.node:
        name = _MATRIX.fullmatch(node.name)
        if name and node.op_type == _QUANTISED:
            yield _dequantised(artifact, node, tensors, _matrix_name(name))
        elif name and node.op_type == "MatMul" and node.input[1] in tensors:
            values, bits = _values(artifact, tensors[node.input[1]])
            yield _Stored(_matrix_name(name), values.T, bits)
        else:
            for used in node.input:
                if used in tensors and (used == "model.embed_tokens.weight" or _BLOCK.fullmatch(used)):
                    values, bits = _values(artifact, tensors[used])
                    yield _Stored(used, values, bits)


def _matrix_name(match: re.Match[str]) -> str:
    layer, part = match.groups()
    return "lm_head.weight" if layer is None else f"model.layers.{layer}.{part}.weight"


def _array(artifact: Path, tensor: Any) -> NDArray[Any]:
    import onnx

    where = {entry.key: entry.value for entry in tensor.external_data}
    if not where:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file = artifact / Path(where["location"]).name
    try:
        return np.memmap(file, dtype, "r", int(where.get("offset", 0)), tuple(tensor.dims))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}); export the model again") from None


def _values(artifact: Path, tensor: Any) -> tuple[NDArray[np.float32], int]:
    array = _array(artifact, tensor)
    return array.astype(np.float32), array.itemsize * 8


def _dequantised(artifact: Path, node: Any, tensors: Mapping[str, Any], name: str) -> _Stored:
    """Undo ``MatMulNBits``: blocks along the input, low half of a byte first, zero point 2^(bits-1) unless
    given."""
    settings = {attribute.name: int(attribute.i) for attribute in node.attribute}
    bits, outputs, inputs = settings["bits"], settings["N"], settings["K"]
    packed, scales, *zero = [_array(artifact, tensors[used]) for used in node.input[1:4] if used]
    codes = _unpacked(packed.reshape(outputs, -1, packed.shape[-1]), bits)
    blocks = codes.shape[1]
    zero_points = _unpacked(zero[0].reshape(outputs, -1), bits)[:, :blocks] if zero else None
    offsets = 2.0 ** (bits - 1) if zero_points is None else zero_points[:, :, None]
    values = (codes - offsets) * scales.astype(np.float32).reshape(outputs, blocks, 1)
    return _Stored(name, values.reshape(outputs, -1)[:, :inputs], bits)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    if bits == 8:
        return packed.astype(np.float32)
    halves = np.stack((packed & 15, packed >> 4), axis=-1)
    return halves.reshape(*packed.shape[:-1], -1).astype(np.float32)


def _wanted(index: CheckpointIndex, name: str) -> NDArray[np.float32] | None:
    """Return what the checkpoint has for a tensor of the graph, None when it has no such tensor."""
    if name == "lm_head.weight":
        return _read(index, index.head_name)
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _read(index, name)
    layer, part, kind = int(match[1]), match[2], match[3]
    if part == "final_norm_layernorm":
        return _read(index, index.family.final_norm_name())
    prefix = index.family.layer_prefix(layer)
    for group in ("self_attn.", "mlp.", ""):
        full = f"{prefix}{group}{part}.{kind}"
        if full in index.tensors:
            return _read(index, full)
    return _packed(index, prefix, part, kind)


def _packed(index: CheckpointIndex, prefix: str, part: str, kind: str) -> NDArray[np.float32] | None:
    """Return Q, K and V under each other, or half of the joined gate and up projections."""
    if part == "qkv_proj":
        names = [f"{prefix}self_attn.{letter}_proj.{kind}" for letter in "qkv"]
        return np.concatenate([_read(index, name) for name in names]) if names[0] in index.tensors else None
    joined = f"{prefix}mlp.gate_up_proj.{kind}"
    if part in ("gate_proj", "up_proj") and joined in index.tensors:
        gate, up = np.split(_read(index, joined), 2)
        return gate if part == "gate_proj" else up
    return None


def _read(index: CheckpointIndex, name: str) -> NDArray[np.float32]:
    import torch

    from cusprun.checkpoint.reader import read_tensor

    tensor: torch.Tensor = read_tensor(index, name, torch.float32)
    is_norm = name.endswith("norm.weight")
    values: NDArray[np.float32] = tensor.numpy() + np.float32(index.family.norm_offset if is_norm else 0.0)
    return values
