"""The folder in which a walk keeps what it has finished: its name, its only owner, and when it goes."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from cusprun.codec import key_of
from cusprun.errors import OutputError
from cusprun.records import TokenizedDocument
from cusprun.version import __version__
from cusprun.walk.device import Device
from cusprun.walk.ranks import Ranks
from cusprun.walk.work import LOCK, Work
from cusprun.walk.workspace import Workspace

log = logging.getLogger(__name__)

WORK = "work"
"""The folder, in that of the workspace, that holds one folder for each unfinished walk."""

_NAME = re.compile(r"[a-z]+-[0-9a-f]{32}(?P<own>\.\w+)?")
_NO_KEY = "0" * 32
_ABANDONED_S = 30 * 86_400
_COMPUTED_BY = ("torch", "transformers")


def walk_key(
    model_hash: str,
    documents: Sequence[TokenizedDocument],
    batch_tokens: int,
    device: Device,
    ranks: Ranks,
    *inputs: object,
) -> str:
    """Return what stands for everything that decides the bits of a walk; ``inputs`` are what JSON can hold.

    The number of threads is not in it: a walk that goes on with another one differs by rounding.
    """
    digest = hashlib.sha256()
    for document in documents:
        ids = ",".join(map(str, document.token_ids))
        digest.update(f"{document.dimension}|{ids}\n".encode())
    versions = [__version__, *map(metadata.version, _COMPUTED_BY)]
    place = (batch_tokens, device.arithmetic, ranks.size, ranks.rank)
    return key_of(versions, model_hash, digest.hexdigest(), place, *inputs)


@contextmanager
def working(workspace: Workspace, stage: str, key: str | None) -> Iterator[Work]:
    """Yield the work of the walk that ``key`` stands for; when the block ends well, the folder goes.

    When it ends with an error, what is finished stays for the next run of the same walk, unless the device
    had too little memory, for then other batches are tried. Nothing stays, and nothing is found, without a
    key, in a workspace without a folder, on disks that cannot be locked and where the same walk is already
    under way.

    Raises:
        OutputError: the folder cannot be made.
    """
    if workspace.folder is None:
        with tempfile.TemporaryDirectory(prefix="cusprun-work-") as folder:
            yield from _closed(Work(Path(folder), key or _NO_KEY, workspace.ranks, lasts=False))
        return
    place = _take(workspace.folder / WORK, f"{stage}-{key or _NO_KEY}", lasts=key is not None)
    work = Work(place.folder, key or _NO_KEY, workspace.ranks, lasts=place.lasts)
    try:
        yield from _closed(work)
    except torch.OutOfMemoryError:
        place.remove()
        raise
    except BaseException:
        if not work.is_begun:
            place.remove()
        raise
    else:
        place.remove()
    finally:
        place.release()


def _closed(work: Work) -> Iterator[Work]:
    try:
        yield work
    finally:
        work.close()


@dataclass(frozen=True)
class _Place:
    """A folder that no other process writes to; ``lasts`` says whether a later run looks into it."""

    folder: Path
    lock: int | None
    lasts: bool

    def remove(self) -> None:
        """Remove the folder; nobody finds it half removed."""
        gone = self.folder.with_name(f"{self.folder.name.partition('.')[0]}.{secrets.token_hex(4)}")
        try:
            self.folder.rename(gone)
        except OSError:
            gone = self.folder
        shutil.rmtree(gone, ignore_errors=True)

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock is not None:
            os.close(self.lock)


def _take(parent: Path, name: str, *, lasts: bool) -> _Place:
    """Return the folder ``name``, or where another process has that or locks do not work, one apart.

    One apart is also what does not last.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        if lasts:
            lock = _lock(parent / name, make=True)
            if lock is not None:
                return _Place(parent / name, lock, lasts=True)
            log.info("note: %s is taken or cannot be locked; this run begins at the start", parent / name)
        while True:
            apart = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=parent))
            with suppress(FileNotFoundError):  # taken for abandoned before it was locked
                return _Place(apart, _lock(apart), lasts=False)
    except OSError as error:
        raise OutputError(
            f"the work folder {parent} cannot be made ({error.strerror}); choose another with --workdir"
        ) from None


def _remove_abandoned(parent: Path) -> None:
    """Remove folders that no process has and no run will look into: those apart, and those left long ago."""
    for path in list(parent.iterdir()):
        match = _NAME.fullmatch(path.name)
        with suppress(OSError):
            if match and (match["own"] or time.time() - path.stat().st_mtime > _ABANDONED_S):
                lock = _lock(path)
                if lock is not None:
                    _Place(path, lock, lasts=False).remove()
                    os.close(lock)


def _lock(path: Path, *, make: bool = False) -> int | None:
    """Lock a folder for this process and return a handle; None where another has it or none can be had.

    Raises:
        FileNotFoundError: there is no such folder, and it is not to be made.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        try:
            if make:
                path.mkdir(exist_ok=True)
            # A file, open to be written: network disks lock no folders, and nothing that is only read.
            handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            if make:
                continue
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), (path / LOCK).stat()):
                return handle
        except FileNotFoundError:
            pass  # its owner removed it in between
        except OSError:
            os.close(handle)
            return None
        os.close(handle)
