"""What a user allows the walks to take, checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import cache_folder
from cusprun.errors import OutputError, UserError, require_kind
from cusprun.paths import expand_home, path_text
from cusprun.resolve import StrPath
from cusprun.walk.ranks import ALONE, Ranks
from cusprun.walk.workspace import Workspace

if TYPE_CHECKING:
    from cusprun.pipeline.opening import OpenModel
    from cusprun.pruning.refit import RefitSettings
    from cusprun.records import Corpora, TokenizedDocument
    from cusprun.walk.budget import Demand


def workspace_of(
    memory: int | str | None = None, ranks: Ranks = ALONE, workdir: StrPath | None = None
) -> Workspace:
    """Return what walks may use; ``memory`` is in bytes, or a text like ``4GB``, for each of ``ranks``.

    ``workdir`` is the folder for what is unfinished, which is made if need be; the cache when not given.

    Raises:
        OutputError: the folder cannot be made or written.
        UserError: the memory is not an amount above 0.
    """
    from cusprun.walk.allocator import give_back_when_freed

    allowed = memory_bytes(memory)
    if allowed is not None:
        give_back_when_freed()
    return with_folder(Workspace(folder=work_folder(workdir), memory_bytes=allowed, ranks=ranks))


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


def memory_bytes(memory: int | str | None) -> int | None:
    """Return an amount of memory in bytes; None where none is given.

    Raises:
        UserError: it is not an amount above 0.
    """
    from cusprun.pruning.budget_text import parse_size

    if memory is None or isinstance(memory, str):
        return None if memory is None else parse_size(memory)
    require_kind(memory, int, "the memory")
    if memory < 1:
        raise UserError(f"the memory must be at least 1 byte, not {memory}; write for example 4GB")
    return memory


def require_units(memory: int | str | None, granularity: str) -> None:
    """Refuse to bound the memory of what looks at single neurons."""
    if memory is not None and granularity != "unit":
        raise UserError(
            "a memory bounds the work on whole units; leave it out, or take the granularity 'unit'"
        )


def require_whole_model(opened: OpenModel, stage: str) -> None:
    """Raise ``UserError`` when a stage that holds a whole model is not allowed as much memory."""
    from cusprun.walk.budget import Demand, require_memory

    parts = {"the whole model": opened.index.num_bytes}
    require_memory(opened.workspace.memory_bytes, [Demand(stage, parts, 0, 1)])


def require_measuring_memory(opened: Sequence[OpenModel], documents: Sequence[TokenizedDocument]) -> None:
    """Raise ``UserError`` when measuring one of the models beside the first takes more than is allowed."""
    from cusprun.walk.budget import measuring, require_memory

    lengths = [len(document.token_ids) for document in documents]
    demands = [measuring([model.index, opened[0].index], lengths) for model in opened]
    require_memory(opened[0].workspace.memory_bytes, demands)


def require_pruning_memory(opened: OpenModel, corpora: Corpora, settings: RefitSettings) -> None:
    """Raise ``UserError`` when scoring, refit or measuring would not do with the memory that is allowed."""
    from cusprun.walk.budget import require_memory

    require_memory(opened.workspace.memory_bytes, pruning_demands(opened, corpora, settings))


def pruning_demands(opened: OpenModel, corpora: Corpora, settings: RefitSettings) -> list[Demand]:
    """Return what the stages of pruning take, one after the other."""
    from cusprun.pruning.refit_memory import refitting
    from cusprun.walk.budget import measuring, scoring

    index, dtype = opened.index, opened.device.dtype
    lengths = [len(document.token_ids) for document in corpora.calibration]
    held_out = [len(document.token_ids) for document in corpora.held_out]
    demands = [scoring(index, lengths, dtype)] if lengths else []
    if lengths and settings.mode != "none":
        demands.append(refitting(index, lengths, settings, opened.workspace.memory_bytes, dtype))
    return [*demands, measuring([index, index], held_out)] if held_out else demands
