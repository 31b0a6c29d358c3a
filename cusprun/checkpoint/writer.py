"""Weights written one tensor at a time into bounded safetensors shards.

All names, types and shapes are declared first, so that each shard's header can be written before its data:
the writer holds no tensor longer than the call that hands it over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from cusprun.checkpoint.index import INDEX_NAME, SINGLE_NAME
from cusprun.checkpoint.safetensors_header import DTYPE_BYTES, build_header

DEFAULT_SHARD_BYTES = 2_000_000_000
TORCH_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """One tensor that will be written; ``dtype`` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def plan_shards(tensors: Sequence[Declared], max_shard_bytes: int) -> list[list[Declared]]:
    """Cut the tensors, in order, into shards of at most ``max_shard_bytes``; a larger one stands alone."""
    shards: list[list[Declared]] = []
    used = 0
    for tensor in tensors:
        if not shards or used + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    return shards


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, with no copy of them in memory, into one safetensors file."""
    with path.open("wb") as stream:
        stream.write(
            build_header(
                (name, TORCH_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()
            )
        )
        for tensor in tensors.values():
            _write_data(stream, tensor)


def _write_data(stream: BinaryIO, tensor: torch.Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        stream.write(flat.view(torch.uint8).numpy().data)


class CheckpointWriter:
    """Writes declared tensors in their declared order; a context manager.

    Leaving the block before every declared tensor was written is an error, so a half-written checkpoint can
    never be taken for a whole one.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[Declared], max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._shards = plan_shards(tensors, max_shard_bytes)
        self._queue = [(shard, tensor) for shard, group in enumerate(self._shards) for tensor in group]
        self._next = 0
        self._open_shard = -1
        self._stream: BinaryIO | None = None

    def shard_name(self, shard: int) -> str:
        """Return the file name of a shard, in the hub's convention."""
        count = len(self._shards)
        return SINGLE_NAME if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def __enter__(self) -> CheckpointWriter:
        """Start writing."""
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next declared tensor; name, shape and type must be the declared ones."""
        shard, declared = self._queue[self._next]
        found = Declared(name, TORCH_NAMES[tensor.dtype], tuple(tensor.shape))
        if found != declared:
            raise AssertionError(f"declared {declared}, got {found}")
        if shard != self._open_shard:
            self._close()
            self._stream = (self._folder / self.shard_name(shard)).open("wb")
            self._stream.write(build_header((t.name, t.dtype, t.shape) for t in self._shards[shard]))
            self._open_shard = shard
        assert self._stream is not None
        _write_data(self._stream, tensor)
        self._next += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and, when all went well, write the index of several shards."""
        self._close()
        if kind is not None:
            return
        if self._next != len(self._queue):
            raise AssertionError(f"{len(self._queue) - self._next} declared tensors were not written")
        if len(self._shards) > 1:
            self._write_index()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write_index(self) -> None:
        index = {
            "metadata": {
                "total_size": sum(tensor.num_bytes for _, tensor in self._queue),
                "total_parameters": sum(math.prod(tensor.shape) for _, tensor in self._queue),
            },
            "weight_map": {tensor.name: self.shard_name(shard) for shard, tensor in self._queue},
        }
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
