"""The safetensors container, read and laid out from its header alone.

The library reads and writes whole files; here the header is needed by itself, to know every shape before
any weight is read and to stream weights out one at a time. Format: 8 bytes little-endian header length, a
JSON header, then the data of all tensors, back to back (huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.errors import ModelError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: ``offset`` is absolute, ``dtype`` in safetensors' own spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return self.num_elements * DTYPE_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Raises:
        ModelError: the file is missing, is cut off, or its header is corrupt.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ModelError(_damaged(path, "its header is cut off or corrupt"))
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check the folder") from None
    except (ValueError, RecursionError):
        raise ModelError(_damaged(path, "its header is corrupt")) from None
    if not isinstance(header, dict):
        raise ModelError(_damaged(path, "its header is corrupt"))
    header.pop("__metadata__", None)
    found = {name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _require_dense(path, found.values(), 8 + length, size)
    return found


def _tensor_info(path: Path, name: str, entry: Any, base: int, file_size: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ModelError(_damaged(path, f"the header entry of {name} is corrupt")) from None
    if not isinstance(dtype, str):
        raise ModelError(_damaged(path, f"the header entry of {name} is corrupt"))
    if dtype not in DTYPE_BYTES:
        raise ModelError(
            f"{path}: {name} has the type {dtype}, which is not supported; save the model as bfloat16"
        )
    sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    if not sound or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ModelError(_damaged(path, f"the header entry of {name} is corrupt"))
    if base + end > file_size:
        raise ModelError(_damaged(path, f"{name} ends at byte {base + end:,} and the file at {file_size:,}"))
    return TensorInfo(name, dtype, shape, path, base + begin)


def _require_dense(path: Path, tensors: Iterable[TensorInfo], base: int, file_size: int) -> None:
    """Refuse tensors that overlap or leave holes, as the reference implementation does."""
    end = base
    for info in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if info.offset != end:
            raise ModelError(_damaged(path, f"{info.name} does not begin where the tensor before it ends"))
        end += info.num_bytes
    if end != file_size:
        raise ModelError(_damaged(path, f"its tensors end at byte {end:,} and the file at {file_size:,}"))


def _damaged(path: Path, what: str) -> str:
    return f"{path} is damaged: {what}; copy or download the file again"


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return the header bytes (length prefix included) of a file holding ``(name, dtype, shape)``s."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
