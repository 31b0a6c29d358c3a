"""Per-token activations kept in a memory-mapped file, so that they need no memory of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from cusprun.errors import OutputError
from cusprun.walk.batches import Batch
from cusprun.walk.device import CPU, Device


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Give a file its size, with disk behind it: a mapped page for which there is none kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.ftruncate(descriptor, num_bytes)


class Spill:
    """Float32 rows of one width for every padded token of a sequence of batches.

    The file is the host's; rows are read onto ``device``, and written from there or from the host.
    """

    def __init__(self, batches: Sequence[Batch], width: int, folder: Path, device: Device = CPU) -> None:
        self._batches = batches
        self._device = device
        self._width = width
        self._offsets = np.cumsum([0, *(batch.num_padded_tokens for batch in batches)])
        rows = int(self._offsets[-1])
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".cusprun-spill-")  # noqa: SIM115
        try:
            _reserve(self._file.fileno(), max(1, rows * width * 4))
            self._rows = np.memmap(self._file, dtype=np.float32, mode="r+", shape=(rows, width))
        except OSError as error:
            self._file.close()
            raise OutputError(
                f"the work folder {folder} cannot hold {rows * width * 4 / 1e6:,.0f} MB ({error.strerror}); "
                "free some space or set TMPDIR to a larger disk"
            ) from None

    def read(self, batch: int) -> torch.Tensor:
        """Return a copy of one batch's rows: float32 [documents, tokens, width]."""
        return self._copied(self._view(batch))

    def read_document(self, batch: int, row: int, tokens: slice) -> torch.Tensor:
        """Return a copy of some tokens of one document of a batch: float32 [tokens, width]."""
        return self._copied(self._view(batch)[row, tokens])

    def _copied(self, view: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> torch.Tensor:
        rows = torch.from_numpy(view)
        return rows.clone() if self._device.is_host else self._device.put(rows)

    def write(self, batch: int, rows: torch.Tensor) -> None:
        """Store one batch's rows [documents, tokens, width]."""
        self._view(batch)[...] = self._device.fetch(rows).numpy()

    def _view(self, batch: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
        documents, tokens = self._batches[batch].token_ids.shape
        view: np.ndarray[tuple[int, int, int], np.dtype[np.float32]] = self._rows[
            self._offsets[batch] : self._offsets[batch + 1]
        ].reshape(documents, tokens, self._width)
        return view

    def close(self) -> None:
        """Give the file back to the system."""
        del self._rows
        self._file.close()


@contextmanager
def spilled(
    batches: Sequence[Batch], width: int, folder: Path | None = None, *, device: Device = CPU
) -> Iterator[Spill]:
    """Yield a :class:`Spill` in ``folder`` (the system's temporary folder when none is given)."""
    spill = Spill(batches, width, folder or Path(tempfile.gettempdir()), device)
    try:
        yield spill
    finally:
        spill.close()
