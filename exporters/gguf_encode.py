"""Weights as safetensors stores them, read a few rows at a time and rounded to a type of GGUF.

numpy alone: importing torch would take longer than writing a small model, and more memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numpy.typing import NDArray

from cusprun.checkpoint.safetensors_header import TensorInfo
from cusprun.errors import ExportError, ModelError

Bits = NDArray[np.uint8]

_STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no such type: the bits
}
_INFINITY: dict[str, tuple[Any, int, int]] = {
    "F64": (np.uint64, (1 << 63) - 1, 0x7FF0 << 48),
    "F32": (np.uint32, (1 << 31) - 1, 0x7F80 << 16),
    "F16": (np.uint16, (1 << 15) - 1, 0x7C00),
    "BF16": (np.uint16, (1 << 15) - 1, 0x7F80),
}
"""Per stored type: integers of its size, all bits but the sign, and infinity, which all finite are below."""

_F16_MAX = 65504.0
_LIMITS = {
    QuantType.F32: float(np.finfo(np.float32).max),
    QuantType.F16: _F16_MAX,
    QuantType.BF16: 3.3895313892515355e38,
    QuantType.Q8_0: 127 * _F16_MAX,
}
"""The largest value of a type; q8_0 keeps f16 scales."""


def read_rows(info: TensorInfo, first_row: int, num_rows: int, step: int) -> Iterator[NDArray[np.generic]]:
    """Yield ``num_rows`` rows from ``first_row`` on, ``step`` at a time, into one array that is used again.

    Raises:
        ModelError: the file cannot be read any more, or ended early.
    """
    row_shape, dtype = info.shape[1:], _STORED[info.dtype]
    row_bytes = math.prod(row_shape) * dtype.itemsize
    buffer = np.empty((min(step, num_rows), *row_shape), dtype)
    try:
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.offset + first_row * row_bytes)
            for start in range(0, num_rows, step):
                rows = buffer[: min(step, num_rows - start)]
                _fill(stream, rows.data.cast("B"), info)
                yield rows
    except OSError as error:
        raise ModelError(f"{info.file}: {info.name} cannot be read ({error}); copy the file again") from None


def _fill(stream: BinaryIO, wanted: memoryview, info: TensorInfo) -> None:
    while wanted:
        count = stream.readinto(wanted)  # type: ignore[attr-defined]
        if not count:
            raise ModelError(f"{info.file} ended early while {info.name} was read; copy the file again")
        wanted = wanted[count:]


def write_all(out: BinaryIO, data: Bits) -> None:
    """Write all bytes to an unbuffered file, which takes no more than 2 GB in one call."""
    left = data.data
    while left:
        left = left[out.write(left) :]


def largest_bits(values: NDArray[np.generic], stored: str) -> int:
    """Return the largest of the values' bits without their sign: floats of one type sort like integers."""
    integers, magnitude, _ = _INFINITY[stored]
    return int((values.view(integers) & integers(magnitude)).max(initial=0))


def _as_number(bits: int, stored: str) -> float:
    integers = _INFINITY[stored][0]
    return float(_to_float32(np.array([bits], integers).view(_STORED[stored]), stored)[0])


def encode(
    values: NDArray[np.generic],
    info: TensorInfo,
    kind: QuantType,
    *,
    offset: float = 0.0,
    scale: float = 1.0,
) -> Bits:
    """Return ``(values + offset) * scale`` as bytes of the GGUF type ``kind``, rounded to nearest.

    ``values`` are rows of the tensor ``info`` in its stored type, bits where that is bf16.

    Raises:
        ModelError: a value is NaN or infinite.
        ExportError: a value lies outside the range of ``kind`` (also of the f16 scales of q8_0).
    """
    stored = info.dtype
    bits = largest_bits(values, stored)
    if bits >= _INFINITY[stored][2]:
        raise ModelError(
            f"{info.file}: {info.name} holds NaN or infinite values; start from a sound checkpoint"
        )
    limit = _LIMITS[kind]
    if _as_number(bits, stored) > limit:
        raise ExportError(
            f"{info.file}: {info.name} holds values beyond {limit:g}, which {kind.name.lower()} cannot hold; "
            "use bf16 or f32"
        )
    if offset or scale != 1.0:
        changed = ((_to_float32(values, stored) + np.float32(offset)) * np.float32(scale)).astype(np.float32)
        return _rounded(changed, "F32", kind)
    return _rounded(values, stored, kind)


def _rounded(values: NDArray[np.generic], stored: str, kind: QuantType) -> Bits:
    if kind.name == stored:
        result: NDArray[Any] = values
    elif kind is QuantType.F16:
        result = _to_float16(values, stored)
    elif kind is QuantType.F32:
        result = _to_float32(values, stored)
    else:
        result = gguf.quants.quantize(_to_float32(values, stored), kind)
    return np.ascontiguousarray(result).view(np.uint8).reshape(-1)


def _to_float32(values: NDArray[Any], stored: str) -> NDArray[np.float32]:
    if stored == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _to_float16(values: NDArray[Any], stored: str) -> NDArray[np.float16]:
    if stored == "BF16":  # every value looked up: four times as fast as by way of float32
        return np.take(_float16_of_bfloat16(), values, mode="clip")
    return values.astype(np.float16)


@cache
def _float16_of_bfloat16() -> NDArray[np.float16]:
    with np.errstate(over="ignore", invalid="ignore"):
        return _to_float32(np.arange(1 << 16, dtype=np.uint16), "BF16").astype(np.float16)
