"""What exports know of an expert: its documents, and how large the inputs of each matrix are on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.cache import cached
from cusprun.codec import key_of
from cusprun.errors import CusprunError, ModelError
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert, Manifest, TokenizedDocument
from cusprun.resolve import StrPath
from cusprun.version import __version__
from cusprun.walk.device import CPU, Device
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cusprun.checkpoint.index import CheckpointIndex
    from exporters.registry import Format

log = logging.getLogger(__name__)

IMPORTANCE_TOKENS = 16_384
"""Calibration tokens that an importance is taken over; it is a mean, which more tokens hardly move."""

MANIFEST_NAME = "cusprun.json"


def known_corpora(folder: Path, expert: StrPath | Expert | None, progress: Progress) -> Corpora | None:
    """Return the documents of ``expert``, or of the expert that a folder's manifest names, or None.

    A manifest's expert is only used when it is made of packs alone: its other sources may be gone.
    """
    from cusprun.corpus import build_corpora
    from cusprun.pipeline.opening import as_expert

    if expert is not None:
        return build_corpora(as_expert(expert), folder, progress)
    known = _expert_of(folder)
    if known is None:
        return None
    try:
        return build_corpora(known, folder, progress)
    except CusprunError:
        return None


def _expert_of(folder: Path) -> Expert | None:
    from cusprun.codec import load_json

    try:
        expert = load_json(Manifest, folder / MANIFEST_NAME).expert
    except CusprunError:
        return None
    sources = [source for group in (*expert.dimensions.values(), expert.general) for source in group]
    return expert if all(source.pack for source in sources) else None


def first_tokens(documents: Sequence[TokenizedDocument], limit: int) -> list[tuple[int, ...]]:
    """Return the first documents that together have at least ``limit`` tokens."""
    taken: list[tuple[int, ...]] = []
    for document in documents:
        if sum(map(len, taken)) >= limit:
            break
        taken.append(document.token_ids)
    return taken


def in_turns(documents: Sequence[TokenizedDocument]) -> list[TokenizedDocument]:
    """Return the documents with those of each dimension taken in turn, so that a start of them has all."""
    groups: dict[str, list[TokenizedDocument]] = {}
    for document in documents:
        groups.setdefault(document.dimension, []).append(document)
    return [document for turn in zip_longest(*groups.values()) for document in turn if document is not None]


def importance_for(
    chosen: Format,
    quant: str,
    options: Any,
    index: CheckpointIndex,
    corpora: Corpora | None,
    progress: Progress = SILENT,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> Mapping[str, NDArray[np.float32]] | None:
    """Return the mean squared input of every matrix on calibration documents, where the export profits.

    None when the precision takes none, ``options`` say so (``imatrix=False``), or no documents are known.
    What was measured before is taken from the cache.
    """
    if quant not in chosen.calibrated or not getattr(options, "imatrix", True):
        return None
    if corpora is None:
        log.info("note: no expert is known, so %s is made without its documents; give --expert", quant)
        return None
    documents = first_tokens(in_turns(corpora.calibration), IMPORTANCE_TOKENS)
    return _importance(index, documents, progress, device, workspace)


def _importance(
    index: CheckpointIndex,
    documents: Sequence[tuple[int, ...]],
    progress: Progress,
    device: Device,
    workspace: Workspace,
) -> Mapping[str, NDArray[np.float32]]:
    """Return what ``importance_of`` returns, measured unless it is in the cache and sound."""
    import torch

    from cusprun.checkpoint.index import model_hash
    from cusprun.checkpoint.output import atomic_file
    from cusprun.checkpoint.reader import read_tensors
    from cusprun.checkpoint.writer import write_tensors
    from cusprun.walk.importance import importance_of

    digest = model_hash(index)
    name = key_of("importance", digest, documents, __version__, *device.in_float32.key)

    def make(path: Path) -> None:
        means = importance_of(index, documents, progress, key=digest, device=device, workspace=workspace)
        with atomic_file(path) as partial:
            write_tensors(partial, {name: torch.from_numpy(mean) for name, mean in means.items()})

    path, _ = cached("importances", name, make)
    try:
        found = read_tensors(path)
    except ModelError:
        path.unlink()
        found = read_tensors(cached("importances", name, make)[0])
    return {name: mean.numpy() for name, mean in found.items()}
