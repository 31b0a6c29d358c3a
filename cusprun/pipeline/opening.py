"""What every public function begins with: a model, an expert and its documents, found and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert
from cusprun.resolve import StrPath, resolve
from cusprun.walk.device import CPU, Device
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

if TYPE_CHECKING:
    from cusprun.checkpoint.index import CheckpointIndex


@dataclass(frozen=True)
class OpenModel:
    """A model that was found and checked; ``source`` is what reports call it, ``device`` is to run it.

    ``workspace`` is what running it may use.
    """

    index: CheckpointIndex
    model_hash: str
    source: str
    device: Device = CPU
    workspace: Workspace = DEFAULT_WORKSPACE


def open_model(
    model: StrPath,
    progress: Progress = SILENT,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
) -> OpenModel:
    """Resolve a model, check its headers and hash its weights."""
    from cusprun.checkpoint.index import model_hash, open_checkpoint
    from cusprun.walk.shell import load_config

    located = workspace.ranks.one_by_machine(lambda: resolve(model, progress))
    index = open_checkpoint(located.path)
    load_config(index)  # first, or the tokenizer, which reads the config too, is blamed for its faults
    with progress.stage("hashing the model", 1) as advance:
        digest = model_hash(index)
        advance(1)
    return OpenModel(index, digest, located.source, device, workspace)


def as_expert(expert: StrPath | Expert) -> Expert:
    """Return an expert as it is, or read it from a YAML file."""
    from cusprun.corpus import load_expert

    return expert if isinstance(expert, Expert) else load_expert(Path(expert))


def corpora_of(opened: OpenModel, expert: Expert, progress: Progress = SILENT) -> Corpora:
    """Return an expert's documents as a model reads them, with those that it is to make itself."""
    from cusprun.corpus import build_corpora, corpus_hash
    from cusprun.pipeline.augment import augmented

    ranks = opened.workspace.ranks
    corpora = build_corpora(expert, opened.index.folder, progress)
    ranks.require_same({"documents": corpus_hash(corpora)})
    if expert.augment is None:
        return corpora
    return ranks.from_first(lambda: augmented(opened, expert, corpora, progress))
