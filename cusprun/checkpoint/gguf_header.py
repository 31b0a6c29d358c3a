"""The GGUF container, read from its header alone and checked before anything is believed.

``gguf.GGUFReader`` trusts the counts and lengths that it reads, which a damaged file makes arbitrary; here
every length is compared with the file's size before it is used. Layout (ggml-org/ggml, docs/gguf.md, versions
2 and 3): magic, version, two counts, key-value pairs, tensor entries, padding to the alignment, tensor data.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from cusprun.errors import ModelError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MIN_ENTRY_BYTES = 24  # the shortest tensor entry; a larger count than the file can hold is a lie
_SCALARS = {
    gguf.GGUFValueType.UINT8: "<u1", gguf.GGUFValueType.INT8: "<i1",
    gguf.GGUFValueType.UINT16: "<u2", gguf.GGUFValueType.INT16: "<i2",
    gguf.GGUFValueType.UINT32: "<u4", gguf.GGUFValueType.INT32: "<i4",
    gguf.GGUFValueType.UINT64: "<u8", gguf.GGUFValueType.INT64: "<i8",
    gguf.GGUFValueType.FLOAT32: "<f4", gguf.GGUFValueType.FLOAT64: "<f8",
    gguf.GGUFValueType.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: ``shape`` slowest axis first (as in torch), ``offset`` in bytes from the file's start."""

    name: str
    type: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """The header of one GGUF file: metadata by key, tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a non-negative integer; a list of equal integers (one per block) counts as one.

        Raises:
            ModelError: the key is missing and has no default, or holds something else.
            UnsupportedModelError: the blocks differ.
        """
        value = self._value(key, default)
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            if len(set(value)) > 1:
                raise UnsupportedModelError(
                    f"{self.path}: {key} differs from block to block, which stock transformers models cannot "
                    "hold; use a model with equal blocks"
                )
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; raises ``ModelError`` otherwise."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; raises ``ModelError`` otherwise."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean; raises ``ModelError`` otherwise."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def array(self, key: str, kind: type | tuple[type, ...], default: list[Any] | None = None) -> list[Any]:
        """Return a list whose items are all of ``kind``; raises ``ModelError`` otherwise."""
        value = self._value(key, default)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self._wrong(key, type(value).__name__, "a list of another kind")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} lacks the metadata {key}; convert or download the file again")
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> ModelError:
        return ModelError(
            f"{self.path}: the metadata {key} must be {wanted}, not {str(value)[:40]!r}; "
            "convert or download the file again"
        )


class _Cursor:
    """Reads the header front to back and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is damaged: {what}; copy or download the file again")

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self.data):
            raise self.damaged(f"its header is cut off at byte {len(self.data):,}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def text(self) -> str:
        piece = self.take(self.u64())
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"the text before byte {self.position:,} of its header is not UTF-8") from None

    def kind(self) -> gguf.GGUFValueType:
        code = self.u32()
        try:
            return gguf.GGUFValueType(code)
        except ValueError:
            raise self.damaged(f"its header holds a value of the unknown type {code}") from None

    def value(self) -> Any:
        kind = self.kind()
        if kind != gguf.GGUFValueType.ARRAY:
            return self._items(kind, 1)[0]
        kind, count = self.kind(), self.u64()
        if kind == gguf.GGUFValueType.ARRAY:
            raise self.damaged("its header holds a list of lists")
        return self._items(kind, count)

    def _items(self, kind: gguf.GGUFValueType, count: int) -> list[Any]:
        if kind == gguf.GGUFValueType.STRING:
            if count * 8 > len(self.data) - self.position:
                raise self.damaged(f"its header is cut off at byte {len(self.data):,}")
            return [self.text() for _ in range(count)]
        dtype = np.dtype(_SCALARS[kind])
        items: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return items


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file; no weight is read.

    Raises:
        ModelError: the file is missing, is no GGUF, is cut off, or its header is corrupt.
        UnsupportedModelError: a version, byte order, split or tensor type that cannot be read.
    """
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a folder; give the GGUF file itself")
        with path.open("rb") as stream:
            start = stream.read(4)
            if start != _MAGIC:
                raise ModelError(
                    f"{path} is not a GGUF file (it does not begin with 'GGUF'); give another file"
                )
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                cursor = _Cursor(path, data)
                cursor.take(4)
                return _parse(cursor)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; give a GGUF file") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check the file") from None


def _parse(cursor: _Cursor) -> GgufFile:
    version = cursor.u32()
    if version not in _VERSIONS:
        why = "is big-endian" if version and not version & 0xFFFF else f"is of GGUF version {version}"
        raise UnsupportedModelError(
            f"{cursor.path} {why}, which cannot be read (known: little-endian, versions 2 and 3); "
            "convert the model again with a current llama.cpp"
        )
    num_tensors, num_pairs = cursor.u64(), cursor.u64()
    if num_tensors * _MIN_ENTRY_BYTES > len(cursor.data):
        raise cursor.damaged(f"its header counts {num_tensors:,} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.text()
        if key in metadata:
            raise cursor.damaged(f"its header holds {key[:60]!r} twice")
        metadata[key] = cursor.value()
    _require_whole(cursor.path, metadata)
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.damaged(f"its alignment is {alignment!r}, not a power of two")
    base = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in entries:
        if name in tensors:
            raise cursor.damaged(f"it holds the tensor {name[:60]!r} twice")
        tensors[name] = _place(cursor, name, kind, shape, base + offset)
    return GgufFile(cursor.path, metadata, tensors)


def _require_whole(path: Path, metadata: Mapping[str, Any]) -> None:
    split = metadata.get("split.count", 0)
    if isinstance(split, int) and split > 1:
        raise UnsupportedModelError(
            f"{path} is one of {split} parts; join them first with `llama-gguf-split --merge`"
        )


def _tensor_entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, num_dimensions = cursor.text(), cursor.u32()
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.damaged(f"the tensor {name[:60]!r} has {num_dimensions:,} axes")
    shape = tuple(reversed([cursor.u64() for _ in range(num_dimensions)]))
    return name, cursor.u32(), shape, cursor.u64()


def _place(cursor: _Cursor, name: str, code: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
    try:
        kind = gguf.GGMLQuantizationType(code)
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UnsupportedModelError(
            f"{cursor.path}: the tensor {name[:60]!r} is of the unknown type {code}; "
            "download the file again, or quantise the model to a type such as Q8_0"
        ) from None
    if shape[-1] % block_elements or 0 in shape:
        raise cursor.damaged(f"the tensor {name[:60]!r} cannot have the shape {shape} in type {kind.name}")
    tensor = GgufTensor(name, kind, shape, offset, math.prod(shape) // block_elements * block_bytes)
    end = offset + tensor.num_bytes
    if end > len(cursor.data):
        raise cursor.damaged(f"{name[:60]} ends at byte {end:,} and the file at {len(cursor.data):,}")
    return tensor
