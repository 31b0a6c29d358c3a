"""What a walk has finished, step by step, so that the same walk goes on from there.

A step reads the present generation of each stream and writes the next one; it may add files. Then one rename
of the marker ``progress.json`` commits all of that. So a process may end at any moment: what the marker names
is whole, and what it does not name is written again. When the machine itself ends, the disk may lack what its
kernel had not written yet; the check sums in the marker find that, and the walk begins anew.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cusprun.checkpoint.output import remove
from cusprun.codec import dump_json, load_json
from cusprun.errors import OutputError, UserError
from cusprun.walk.batches import Batch
from cusprun.walk.device import CPU, Device
from cusprun.walk.ranks import ALONE, Ranks
from cusprun.walk.stream import Stream, StreamMark

log = logging.getLogger(__name__)

MARKER = "progress.json"
LOCK = "lock"
"""The file that the folder's owner has locked."""

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class _FileMark:
    """A file that a step added: the step's number from 1, bytes and CRC-32."""

    step: int
    num_bytes: int
    check_sum: int


@dataclass(frozen=True)
class _Mark:
    """What stood after a step: the streams' generations, none after the last step, and the facts."""

    steps: int
    streams: Mapping[str, StreamMark]
    facts: Mapping[str, Any]
    is_last: bool = False


@dataclass(frozen=True)
class _Marker:
    """``progress.json``: the last marks, newest first, and the files of all steps."""

    key: str
    marks: tuple[_Mark, ...] = ()
    files: Mapping[str, _FileMark] = field(default_factory=dict)
    schema_version: int = 1


class Work:
    """The streams and files of one walk in a folder of its own; opened by ``work_folder.working``.

    First every stream is named, then :meth:`settle` says how many steps are finished. Each further step ends
    with :meth:`commit`. A step that one of several ranks has not committed is none: the ranks may be one step
    apart, so each keeps the generation before until all have committed.
    """

    def __init__(self, folder: Path, key: str, ranks: Ranks = ALONE, *, lasts: bool = True) -> None:
        self.folder = folder
        self._ranks, self._lasts = ranks, lasts
        self._streams: dict[str, Stream] = {}
        self._added: list[str] = []
        self._marker = _Marker(key)

    @property
    def steps(self) -> int:
        """How many steps are finished."""
        return self._marker.marks[0].steps if self._marker.marks else 0

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the last finished step said; nothing before the first."""
        return self._marker.marks[0].facts if self._marker.marks else {}

    @property
    def is_begun(self) -> bool:
        """Whether there is anything that a walk could go on from."""
        return self._lasts and bool(self._marker.marks)

    def stream(self, name: str, batches: Sequence[Batch], width: int, device: Device = CPU) -> Stream:
        """Return a stream of the walk; its files are made when it is first used."""
        stream = Stream(name, batches, width, self.folder, device, lasts=self._lasts)
        self._streams[name] = stream
        return stream

    def settle(self) -> int:
        """Go back to the last step that is whole, on all ranks alike; return how many steps are finished.

        What is damaged, half-written or another walk's is removed, and the walk begins with step 0.

        Raises:
            OutputError: the folder cannot be read or written.
        """
        with _reported(self.folder):
            found = self._found()
            sound = {mark.steps: mark for mark in found.marks if self._is_sound(mark, found)}
            if found.marks and not sound:
                log.info("note: what was finished in %s is damaged; it is made again", self.folder)
            agreed = self._agreed(sorted(sound, reverse=True))
            if not agreed:
                self._clear()
                return 0
            mark = sound[agreed]
            for name, stream in mark.streams.items():
                self._streams[name].restore(stream)
            files = {name: file for name, file in found.files.items() if file.step <= agreed}
            self._write(replace(found, marks=(mark,), files=files))
        return agreed

    def path(self, name: str) -> Path:
        """Return the place of a file that a finished step added."""
        return self.folder / name

    @contextmanager
    def adding(self, name: str) -> Iterator[Path]:
        """Yield where to write a file that the next commit makes a part of its step.

        Raises:
            OutputError: the file cannot be written.
        """
        with _reported(self.folder):
            yield self.folder / name
        self._added.append(name)

    def commit(self, facts: Mapping[str, Any] | None = None, *, is_last: bool = False) -> None:
        """Finish a step: its files, and the present generation of each stream, are kept from here on.

        ``facts`` is what JSON can hold; it takes the place of those of the step before. After the last step
        the streams are not needed any more and go.

        Raises:
            OutputError: the disk is full.
        """
        step, before = self.steps + 1, self._marker.marks[:1] if self._ranks.size > 1 else ()
        with _reported(self.folder):
            files = {**self._marker.files, **{name: self._file_mark(name, step) for name in self._added}}
            streams = {name: stream.mark() for name, stream in self._streams.items()} if self._lasts else {}
            made = _Mark(step, streams, facts or {})
            self._write(replace(self._marker, marks=(made, *before), files=files))
            self._added.clear()
            for stream in self._streams.values():
                stream.hold()
            self._wait_for_all()
            if is_last:
                self._write(replace(self._marker, marks=(replace(made, streams={}, is_last=True),)))
                for stream in self._streams.values():
                    stream.remove()

    def close(self) -> None:
        """Close the streams' files."""
        for stream in self._streams.values():
            stream.close()

    def _found(self) -> _Marker:
        """Return the marker in the folder, or an empty one when it is none of this walk."""
        empty = _Marker(self._marker.key)
        if not self._lasts or not (self.folder / MARKER).is_file():
            return empty
        try:
            found = load_json(_Marker, self.folder / MARKER)
        except UserError as error:
            log.info("note: %s; the walk begins again", error)
            return empty
        return found if found.key == empty.key else empty

    def _is_sound(self, mark: _Mark, marker: _Marker) -> bool:
        if not mark.is_last and set(mark.streams) != set(self._streams):
            return False
        files = {name: file for name, file in marker.files.items() if file.step <= mark.steps}
        if any(Path(name).name != name for name in files):
            return False
        return all(self._is_file(name, file) for name, file in files.items()) and all(
            self._streams[name].is_sound(stream) for name, stream in mark.streams.items()
        )

    def _is_file(self, name: str, wanted: _FileMark) -> bool:
        path = self.folder / name
        return path.is_file() and self._file_mark(name, wanted.step) == wanted

    def _file_mark(self, name: str, step: int) -> _FileMark:
        if not self._lasts:
            return _FileMark(step, 0, 0)
        check_sum = num_bytes = 0
        with (self.folder / name).open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                check_sum = zlib.crc32(chunk, check_sum)
                num_bytes += len(chunk)
        return _FileMark(step, num_bytes, check_sum)

    def _agreed(self, own: Sequence[int]) -> int:
        """Return the last of the numbers of steps that every rank can go on from; 0 when there is none."""
        if self._ranks.size == 1:
            return max(own, default=0)
        offers = torch.zeros(self._ranks.size, 2, dtype=torch.int64)
        offers[self._ranks.rank, : len(own)] = torch.tensor(own, dtype=torch.int64)
        every = [set(row) for row in self._ranks.add(offers).tolist()]
        return max(set.intersection(*every), default=0)

    def _wait_for_all(self) -> None:
        """Return when every rank has come here, so that none leaves what another may still go back to."""
        if self._ranks.size > 1:
            self._ranks.add(torch.zeros(1))

    def _clear(self) -> None:
        self.close()
        for entry in list(self.folder.iterdir()):
            if entry.name != LOCK:
                remove(entry)

    def _write(self, marker: _Marker) -> None:
        if self._lasts:
            dump_json(marker, self.folder / MARKER)
        self._marker = marker


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Turn the disk's own errors into one sentence."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the work folder {folder} cannot be written ({error.strerror}); what is finished stays there: "
            "free some space and run again, or choose another folder with --workdir"
        ) from None
