"""Per-token activations kept in a memory-mapped file, so that they need no memory of their own."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from cusprun.errors import OutputError
from cusprun.walk.batches import Batch
from cusprun.walk.device import CPU, Device
from cusprun.walk.scratch import reserve


def _opened(folder: Path, name: str | None) -> IO[bytes]:
    """Open a file of that name to read and write, made if need be; without one a file that nobody sees."""
    if name is None:
        return tempfile.TemporaryFile(dir=folder, prefix=".cusprun-spill-")
    return os.fdopen(os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600), "r+b")


class Spill:
    """Float32 rows of one width for every padded token of a sequence of batches.

    The file is the host's; rows are read onto ``device``, and written from there or from the host. It goes
    with the process unless it has a ``name``, under which its rows are found again.

    Raises:
        OutputError: the folder cannot hold the file.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        width: int,
        folder: Path,
        device: Device = CPU,
        name: str | None = None,
    ) -> None:
        self._batches = batches
        self._device = device
        self._width = width
        self._offsets = np.cumsum([0, *(batch.num_padded_tokens for batch in batches)])
        rows = int(self._offsets[-1])
        try:
            self._file = _opened(folder, name)
            try:
                reserve(self._file.fileno(), max(1, rows * width * 4))
                self._rows = np.memmap(self._file, dtype=np.float32, mode="r+", shape=(rows, width))
            except OSError:
                self._file.close()
                raise
        except OSError as error:
            raise OutputError(
                f"the work folder {folder} cannot hold {rows * width * 4 / 1e6:,.0f} MB more "
                f"({error.strerror}); free some space, or choose a folder on a larger disk with --workdir"
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

    def check_sum(self, batch: int) -> int:
        """Return the CRC-32 of one batch's rows, as they are in the file."""
        return zlib.crc32(self._view(batch).data)

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
