"""Hidden states that each step of a walk reads and replaces, so that those it began from are never lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cusprun.walk.batches import Batch
from cusprun.walk.device import CPU, Device
from cusprun.walk.spill import Spill


@dataclass(frozen=True)
class StreamMark:
    """A generation of a stream: the number of its file, and the check sum of each batch's rows."""

    file: int
    check_sums: tuple[int, ...]


_NOT_BEGUN = StreamMark(-1, ())


class Stream:
    """Rows of every padded token, by generations, each in a file of its own: 2 files, or 3 at the most.

    :meth:`read` gives the present generation and :meth:`write` fills the next one, which :meth:`turn` makes
    the present one. The generation that was held last is not written to, however often the stream is turned.
    Where ``lasts`` is not set, the files go with the process and no check sums are taken.
    """

    def __init__(
        self,
        name: str,
        batches: Sequence[Batch],
        width: int,
        folder: Path,
        device: Device = CPU,
        *,
        lasts: bool = True,
    ) -> None:
        self._name, self._batches, self._width = name, batches, width
        self._folder, self._lasts = folder, lasts
        self.device = device
        self._files: dict[int, Spill] = {}
        self._check_sums: dict[int, dict[int, int]] = {}
        self._present = self._held = -1

    def read(self, batch: int) -> torch.Tensor:
        """Return a copy of one batch's rows: float32 [documents, tokens, width]."""
        return self._files[self._present].read(batch)

    def write(self, batch: int, rows: torch.Tensor) -> None:
        """Store one batch's rows [documents, tokens, width] of the next generation."""
        self.next.write(batch, rows)
        if self._lasts:
            sums = self._check_sums.setdefault(self._next_file, {})
            sums[batch] = self.next.check_sum(batch)

    @property
    def next(self) -> Spill:
        """The next generation, to be filled whole."""
        return self._opened(self._next_file)

    def turn(self) -> None:
        """Make the next generation the present one."""
        self._present = self._next_file

    def mark(self) -> StreamMark:
        """Return the present generation, which :meth:`write` has filled, to find it again."""
        if self._present < 0:
            return _NOT_BEGUN
        sums = self._check_sums[self._present] if self._batches else {}
        return StreamMark(self._present, tuple(sums[batch] for batch in range(len(self._batches))))

    def hold(self) -> None:
        """Keep the present generation as it is until another one is held."""
        self._held = self._present

    def is_sound(self, mark: StreamMark) -> bool:
        """Tell whether a generation is still what it was when it was marked."""
        if mark == _NOT_BEGUN:
            return True
        if (
            len(mark.check_sums) != len(self._batches)
            or not (self._folder / self._file_name(mark.file)).exists()
        ):
            return False
        found = self._opened(mark.file)
        return all(found.check_sum(batch) == wanted for batch, wanted in enumerate(mark.check_sums))

    def restore(self, mark: StreamMark) -> None:
        """Make a sound generation the present one, and hold it."""
        self._check_sums[mark.file] = dict(enumerate(mark.check_sums))
        self._present = self._held = mark.file

    def close(self) -> None:
        """Give the files back to the system; those that last stay in their folder."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def remove(self) -> None:
        """Remove the files."""
        self.close()
        for path in self._folder.glob(f"{self._name}-*.rows"):
            path.unlink()

    @property
    def _next_file(self) -> int:
        return min({0, 1, 2} - {self._present, self._held})

    def _opened(self, number: int) -> Spill:
        if number not in self._files:
            name = self._file_name(number) if self._lasts else None
            self._files[number] = Spill(self._batches, self._width, self._folder, self.device, name)
        return self._files[number]

    def _file_name(self, number: int) -> str:
        return f"{self._name}-{number}.rows"
