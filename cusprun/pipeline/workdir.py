"""Where walks keep their streams and what they have finished: the folder that a user names, or the cache."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from cusprun.cache import cache_folder
from cusprun.errors import OutputError
from cusprun.paths import expand_home, path_text
from cusprun.resolve import StrPath
from cusprun.walk.workspace import Workspace


def work_folder(workdir: StrPath | None) -> Path | None:
    """Return the folder that a user names, made if need be; None when none is named.

    Raises:
        OutputError: it cannot be made or written.
    """
    if workdir is None:
        return None
    folder = expand_home(path_text(workdir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the work folder {folder} cannot be made ({error.strerror}); choose another with --workdir"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the work folder {folder} cannot be written; choose another with --workdir")
    return folder


def with_folder(workspace: Workspace) -> Workspace:
    """Return a workspace with a folder, the cache where none is named.

    Where that cannot be made either, walks use the system's temporary folder and keep nothing.
    """
    if workspace.folder is not None:
        return workspace
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return workspace
    return replace(workspace, folder=folder) if os.access(folder, os.W_OK | os.X_OK) else workspace
