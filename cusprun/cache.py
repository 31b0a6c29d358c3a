"""Finished stages kept for the next run, each under the hash of everything it was made from.

Everything in the cache is committed by rename and can be made again, so the folder may be removed at will.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from cusprun.checkpoint.output import refuse_existing
from cusprun.errors import ModelError, OutputError
from cusprun.paths import expand_home, path_text
from cusprun.progress import SILENT, Progress

_PARTIAL = re.compile(r"\.(?P<name>.+)\.partial-(?P<pid>\d+)(-\w+)?")  # -f16: what is quantised from
_CHUNK_BYTES = 1 << 22


def cache_folder() -> Path:
    """Return the cache: ``$CUSPRUN_CACHE``, or ``cusprun`` in the user's cache folder (XDG)."""
    own = os.environ.get("CUSPRUN_CACHE")
    if own:
        return expand_home(own)
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cusprun"


def cached(kind: str, name: str, make: Callable[[Path], object]) -> tuple[Path, bool]:
    """Return ``<cache>/<kind>/<name>``, made by ``make`` unless it is there, and whether it was there.

    ``make`` must commit its output by rename. When another process commits the same first, that is taken.
    """
    path = cache_folder() / kind / name
    if path.exists():
        return path, True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {path.parent} cannot be made ({error.strerror}); set CUSPRUN_CACHE to another folder"
        ) from None
    remove_leftovers(path.parent)
    try:
        make(path)
    except OSError:
        if not path.exists():
            raise
    except OutputError:
        if not path.exists():
            raise
    return path, False


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove half-written outputs in ``folder`` whose process is gone; what a killed process leaves behind.

    With ``name`` only those of the output of that name, as outside the cache the others are none of ours.
    """
    import psutil

    if not folder.is_dir():
        return
    for entry in list(folder.iterdir()):
        match = _PARTIAL.fullmatch(entry.name)
        if not match or name not in (None, match["name"]) or psutil.pid_exists(int(match["pid"])):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def fresh_output(out: str | os.PathLike[str]) -> Path:
    """Return an output path, clean of a killed run's leftovers; raises ``OutputError`` when it exists."""
    target = expand_home(path_text(out))
    refuse_existing(target)
    remove_leftovers(target.absolute().parent, target.name)
    return target


def file_sha256(path: Path, progress: Progress = SILENT) -> str:
    """Return the SHA-256, in hex, of a file; raises ``ModelError`` when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with (
            path.open("rb") as stream,
            progress.stage("hashing", path.stat().st_size >> 20, "MiB") as advance,
        ):
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                advance(len(chunk) >> 20)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check the file") from None
    return digest.hexdigest()
