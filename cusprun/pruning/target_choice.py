"""The refit target ``auto``: an expert by each target, and the one that predicts unseen documents better."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import CorpusError
from cusprun.progress import SILENT, Progress
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.refit_documents import document_weights, judged_documents
from cusprun.quality.likelihood import measure_likelihood, perplexity
from cusprun.records import REFIT_TARGETS, TokenizedDocument
from cusprun.walk.device import CPU, Device
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

WriteModel = Callable[[Path, Sequence[TokenizedDocument], RefitSettings], object]
"""Writes config and weights of an expert that is refit on documents into an empty folder."""


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


def choose_target(
    write: WriteModel,
    documents: Sequence[TokenizedDocument],
    settings: RefitSettings,
    scratch: Path,
    *,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> TargetChoice:
    """Make an expert by each target and measure both on calibration documents that neither has seen.

    Those are the ones that a refit on all of ``documents`` judges its ridges on. The trials are not even
    judged on them: each sets documents of its own apart from the others. ``scratch`` is a folder that is
    made, and removed, for each. Equal perplexities choose ``output``.

    Raises:
        CorpusError: no document with a weight and two tokens can be set apart.
        ModelError, PlanError, DeviceError: as :func:`cusprun.pruning.rewrite.write_weights`.
    """
    sides = _sides(documents, settings)
    perplexities: dict[str, float] = {}
    tokens = 0
    for target in REFIT_TARGETS:
        if target == "auto":
            continue
        scratch.mkdir()
        try:
            write(scratch, sides.fit, replace(settings, target=target))
            measured = measure_likelihood(
                open_checkpoint(scratch),
                sides.apart,
                device=device,
                workspace=workspace,
                progress=progress,
            )
        finally:
            shutil.rmtree(scratch)
        perplexities[target] = perplexity(measured)
        tokens = sum(document.num_predicted_tokens for document in measured)
    chosen = min(perplexities, key=perplexities.__getitem__)
    return TargetChoice(chosen, perplexities, len(sides.apart), tokens)


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
