"""Weights of a graph to 4 or 8 bits, one matrix after the other.

onnxruntime's quantiser takes a whole model in float32 and copies it; given one matrix at a time it needs no
more than that matrix, whatever the size of the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cusprun.progress import Advance

_CHUNK_ELEMENTS = 1 << 22  # 16 MB in float32: the quantiser makes ten copies and more; protobuf ends at 2 GB
_AXIS_ATTRIBUTE = "N"  # the number of output features, which chunks divide

_Quantised = tuple[str, list[str], dict[str, int], list[NDArray[Any]]]
"""Name of a node, names of its tensors, its attributes, and the tensors."""


def is_weight_product(node: Any) -> bool:
    """Return whether a node multiplies with a stored matrix."""
    return node.op_type == "MatMul" and node.inputs[1].const_value is not None


def quantise_graph(builder: Any, advance: Advance) -> Any:
    """Replace each product with a stored matrix by ``MatMulNBits``, in place; return the graph's model.

    ``builder`` is a model of onnxruntime-genai's builder after ``make_model``: its ``quant_attrs`` say how
    many bits, its ``make_algo_config`` which algorithm, and names of tensors are those that it expects.
    """
    chosen = builder.int4_customized_weight_config or {}
    for node in [node for node in builder.model.graph if is_weight_product(node)]:
        bits = chosen.get(node.name, {}).get("bits", builder.quant_attrs["bits"])
        _quantise_node(builder, node, bits)
        advance(1)
    return builder.model


def _quantise_node(builder: Any, node: Any, bits: int) -> None:
    weight = node.inputs[1]
    matrix = weight.const_value.numpy()
    step = max(1, _CHUNK_ELEMENTS // matrix.shape[0])
    parts = [
        _in_even_blocks(builder, node.name, weight.name, matrix[:, start : start + step], bits)
        for start in range(0, matrix.shape[1], step)
    ]
    name, names, attributes, _ = parts[0]
    tensors = [np.concatenate(arrays) for arrays in zip(*(part[3] for part in parts), strict=True)]
    _splice(builder, node, name, dict(zip(names, tensors, strict=True)))
    _set_attributes(node, {**attributes, _AXIS_ATTRIBUTE: matrix.shape[1]})
    del builder.model.graph.initializers[weight.name]
    weight.const_value = None


def _in_even_blocks(
    builder: Any, node_name: str, weight_name: str, matrix: NDArray[np.float32], bits: int
) -> _Quantised:
    """Quantise a matrix, with a block of zeros more where the number of blocks is odd: k_quant packs the
    4-bit zero points of two blocks in a byte and fails on an odd one."""
    block_size = builder.quant_attrs["matmul_block_size"]
    rows, columns = matrix.shape
    blocks = -(-rows // block_size)
    if bits != 4 or builder.quantization_algo != "k_quant" or blocks % 2 == 0:
        return _quantise(builder, node_name, weight_name, matrix, bits)
    padded = np.zeros(((blocks + 1) * block_size, columns), dtype=matrix.dtype)
    padded[:rows] = matrix
    name, names, attributes, tensors = _quantise(builder, node_name, weight_name, padded, bits)
    packed, scales, *zero_points = tensors
    kept = [
        packed.reshape(columns, blocks + 1, -1)[:, :blocks],
        scales.reshape(columns, blocks + 1)[:, :blocks].reshape((columns, blocks) if scales.ndim > 1 else -1),
        *zero_points,  # the last byte of each row keeps its second half, which nothing reads
    ]
    return name, names, {**attributes, "K": rows}, [np.ascontiguousarray(array) for array in kept]


def _quantise(
    builder: Any, node_name: str, weight_name: str, matrix: NDArray[np.float32], bits: int
) -> _Quantised:
    """Return name, names of tensors, attributes and tensors of the node that replaces ``x @ matrix``.

    ``matrix`` is float32 ``[in_features, out_features]``; the first axis of each tensor runs over the output.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, QuantFormat

    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", weight_name], ["y"], name=node_name)],
        "matrix",
        [onnx.helper.make_tensor_value_info("x", kind, [1, matrix.shape[0]])],
        [onnx.helper.make_tensor_value_info("y", kind, [1, matrix.shape[1]])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(matrix), weight_name)],
    )
    settings = builder.quant_attrs
    quantiser = MatMulNBitsQuantizer(
        model=onnx.helper.make_model(graph),
        bits=bits,
        block_size=settings["matmul_block_size"],
        is_symmetric=settings["is_symmetric"],
        accuracy_level=settings["accuracy_level"],
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=("MatMul",),
        algo_config=builder.make_algo_config(builder.quantization_algo, {node_name: {"bits": bits}}),
    )
    with np.errstate(
        all="ignore"
    ):  # a block of zeros has no range to divide by; its codes are zeros all the same
        quantiser.process()
    made = quantiser.model.model.graph
    (node,) = [node for node in made.node if node.op_type == "MatMulNBits"]
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.initializer}
    names = list(node.input[1:])
    attributes = {attribute.name: int(attribute.i) for attribute in node.attribute}
    return node.name, names, attributes, [stored[name] for name in names]


def _splice(builder: Any, node: Any, name: str, tensors: dict[str, NDArray[Any]]) -> None:
    """Turn ``node`` into a ``MatMulNBits`` on ``tensors``, which keep their order as its inputs."""
    node.name, node.op_type, node.domain = name, "MatMulNBits", "com.microsoft"
    node.resize_inputs(1 + len(tensors))
    for position, (tensor_name, array) in enumerate(tensors.items(), start=1):
        builder.make_initializer(array, tensor_name)
        node.replace_input_with(position, builder.values[tensor_name])


def _set_attributes(node: Any, attributes: dict[str, int]) -> None:
    import onnx_ir

    node.attributes.clear()
    for name, value in attributes.items():
        node.attributes[name] = onnx_ir.AttrInt64(name, value)
