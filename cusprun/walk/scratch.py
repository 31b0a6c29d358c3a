"""Tensors for intermediate results, which need no memory of their own once they are large."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cusprun.errors import OutputError
from cusprun.walk.workspace import Workspace

_SHARE = 64
"""Of a bound on memory, the part that one tensor may take before it gets a file: a solve has a dozen."""


@dataclass(frozen=True)
class Scratch:
    """Where intermediate results lie.

    Those of more than ``limit_bytes`` are mapped from files without a name in ``folder`` (the system's
    temporary folder when not given), so that the kernel can write them out instead of running short; None
    keeps all in memory. So are tensors of a device, whatever the limit.
    """

    folder: Path | None = None
    limit_bytes: int | None = None

    def zeros(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Return a contiguous tensor of zeros, float32 or float64; its file goes with it.

        Raises:
            OutputError: the folder cannot hold it.
        """
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        away = torch.device(device).type != "cpu"
        if away or not num_bytes or self.limit_bytes is None or num_bytes <= self.limit_bytes:
            return torch.zeros(*shape, dtype=dtype, device=device)
        folder = self.folder or Path(tempfile.gettempdir())
        kind = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
        try:
            with tempfile.TemporaryFile(dir=folder, prefix=".cusprun-scratch-") as file:
                reserve(file.fileno(), num_bytes)
                return torch.from_numpy(np.memmap(file, dtype=kind, mode="r+", shape=tuple(shape)))
        except OSError as error:
            raise OutputError(
                f"the work folder {folder} cannot hold {num_bytes / 1e6:,.0f} MB ({error.strerror}); "
                "free some space or name a folder on a larger disk"
            ) from None

    def copied(self, tensor: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Return a copy of a tensor, beside it, in another type."""
        copy = self.zeros(tensor.shape, dtype, tensor.device)
        copy[:] = tensor
        return copy


IN_MEMORY = Scratch()


def scratch_of(workspace: Workspace) -> Scratch:
    """Return the scratch of a walk: all in memory unless that is bounded."""
    limit = None if workspace.memory_bytes is None else workspace.memory_bytes // _SHARE
    return Scratch(workspace.folder, limit)


def reserve(descriptor: int, num_bytes: int) -> None:
    """Give a file its size, with disk behind it: a mapped page for which there is none kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.ftruncate(descriptor, num_bytes)
