"""The refit target ``auto``: an expert by each target, and the one that predicts unseen documents better."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cusprun.checkpoint.index import open_checkpoint
from cusprun.codec import key_of
from cusprun.errors import CorpusError
from cusprun.progress import SILENT, Progress
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.refit_documents import document_weights, judged_documents
from cusprun.pruning.rewrite import WrittenWeights
from cusprun.quality.likelihood import measure_likelihood, perplexity
from cusprun.records import REFIT_TARGETS, TokenizedDocument
from cusprun.walk.device import CPU, Device
from cusprun.walk.ranks import Ranks
from cusprun.walk.work_folder import working
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

WriteModel = Callable[
    [Path, Sequence[TokenizedDocument], RefitSettings], AbstractContextManager[WrittenWeights]
]
"""Writes config and weights of an expert that is refit on documents into an empty folder.

What is needed to go on after a crash goes when the context ends well.
"""

_TRIED = tuple(target for target in REFIT_TARGETS if target != "auto")


@dataclass(frozen=True)
class TargetChoice:
    """What ``auto`` stands for, and the perplexity of each target's expert on documents it had not seen."""

    target: str
    perplexities: Mapping[str, float]
    documents: int
    predicted_tokens: int

    def measurement(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return {
            "asked": "auto",
            "chosen": self.target,
            "documents": self.documents,
            "predicted_tokens": self.predicted_tokens,
            "perplexity": dict(self.perplexities),
        }


@dataclass(frozen=True)
class _Sides:
    fit: tuple[TokenizedDocument, ...]
    apart: tuple[TokenizedDocument, ...]


@contextmanager
def chosen_target(
    write: WriteModel,
    documents: Sequence[TokenizedDocument],
    settings: RefitSettings,
    scratch: Path,
    key: str,
    *,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> Iterator[TargetChoice]:
    """Make an expert by each target, measure both on calibration documents that neither has seen; choose.

    Those are the ones that a refit on all of ``documents`` judges its ridges on. The trials are not even
    judged on them: each sets documents of its own apart from the others. ``scratch`` is a folder that is
    made, and removed, for each. Equal perplexities choose ``output``.

    ``key`` stands for everything that decides the choice: what an earlier run measured under it is not
    measured again. That goes when the context ends well.

    Raises:
        CorpusError: no document with a weight and two tokens can be set apart.
        ModelError, PlanError, DeviceError: as :func:`cusprun.pruning.rewrite.write_weights`.
        OutputError: the disk is full.
    """
    sides, ranks = _sides(documents, settings), workspace.ranks
    with working(workspace, "target", key) as work:
        for target in _TRIED[work.settle() :]:
            with _trial(scratch, ranks), write(scratch, sides.fit, replace(settings, target=target)):
                measured = measure_likelihood(
                    open_checkpoint(scratch),
                    sides.apart,
                    key=key_of(key, target),
                    device=device,
                    workspace=workspace,
                    progress=progress,
                )
                tokens = sum(document.num_predicted_tokens for document in measured)
                found = {**work.facts.get("perplexities", {}), target: perplexity(measured)}
                work.commit({"perplexities": found, "tokens": tokens})
        perplexities: dict[str, float] = dict(work.facts["perplexities"])
        chosen = min(perplexities, key=perplexities.__getitem__)
        yield TargetChoice(chosen, perplexities, len(sides.apart), work.facts["tokens"])


@contextmanager
def _trial(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Make a folder for one expert, and remove it when all ranks have measured that."""
    ranks.from_first(folder.mkdir)
    try:
        yield
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _sides(documents: Sequence[TokenizedDocument], settings: RefitSettings) -> _Sides:
    weights, judged = document_weights(documents, settings.weights), judged_documents(documents, settings)
    fit = tuple(document for position, document in enumerate(documents) if position not in judged)
    apart = tuple(
        documents[position]
        for position in sorted(judged)
        if weights[position] > 0 and len(documents[position].token_ids) > 1
    )
    if not apart:
        raise CorpusError(
            "the refit target 'auto' is chosen on calibration documents set apart, and there is none with a "
            "weight and two tokens; add documents, or take the target 'output' or 'residual'"
        )
    return _Sides(fit, apart)
