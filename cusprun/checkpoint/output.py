"""Output that is whole or absent: written beside its place under a hidden name, committed by rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cusprun.errors import OutputError

_WRITE_ERRORS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EFBIG,
        errno.ENAMETOOLONG,
    }
)


_PLACE_ERRORS = frozenset({errno.ENOENT, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO})
"""Where nothing can be made, as under /proc, when it is the output itself that they are about."""


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def refuse_existing(path: Path) -> None:
    """Raise ``OutputError`` when ``path`` exists already or nothing can be made there; makes nothing."""
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path} exists already; choose another output or remove it first")
    ground = _nearest_existing(path)
    if not ground.is_dir():
        raise OutputError(f"{path} cannot be made, since {ground} is no folder; choose another place")
    if not os.access(ground, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be made, since {ground} cannot be written; choose another place")


def _nearest_existing(path: Path) -> Path:
    """Return the nearest folder above ``path`` that is there."""
    return next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())


@contextmanager
def _with_parents(path: Path) -> Iterator[None]:
    """Make the folders that ``path`` will stand in; those that were made vanish when the block fails."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # somebody else's by now
                folder.rmdir()
        raise


def require_space(path: Path, num_bytes: int) -> None:
    """Raise ``OutputError`` when the disk that will hold ``path`` has less than ``num_bytes`` free."""
    parent = _nearest_existing(path)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OutputError(
            f"{path} needs {num_bytes / 1e6:,.0f} MB and {parent} has {free / 1e6:,.0f} MB free; "
            "free some space or choose another disk"
        )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write into that becomes ``path`` when the block ends well and vanishes otherwise.

    Raises:
        OutputError: ``path`` exists already, or the disk is full or refuses to be written.
    """
    refuse_existing(path)
    partial = _partial_name(path)
    with _reported(path), _with_parents(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _commit(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to that becomes ``path`` when the block ends well and vanishes otherwise.

    Raises:
        OutputError: ``path`` exists already, or the disk is full or refuses to be written.
    """
    refuse_existing(path)
    partial = _partial_name(path)
    with _reported(path), _with_parents(path):
        try:
            yield partial
            _commit(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _commit(partial: Path, path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise OutputError(
            f"{path} was made by another process meanwhile, which is kept; choose another output"
        )
    partial.rename(path)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn the disk's own errors into one sentence; only errors about writing, never about reading."""
    places = {str(_partial_name(path)), *map(str, path.absolute().parents)}
    try:
        yield
    except OSError as error:
        at_output = error.errno in _PLACE_ERRORS and str(error.filename) in places
        if error.errno in _WRITE_ERRORS or at_output:
            raise OutputError(
                f"{path} cannot be written ({error.strerror}); nothing was left behind, "
                "free some space or choose another place"
            ) from None
        raise
