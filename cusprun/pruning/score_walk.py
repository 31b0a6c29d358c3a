"""The walk that scores, whatever it scores: each block's arrays are kept as soon as they are whole."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cusprun.checkpoint.files import tokenizer_hash
from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.output import atomic_folder
from cusprun.codec import dump_json
from cusprun.errors import CorpusError, ModelError
from cusprun.progress import SILENT, Advance, Progress
from cusprun.pruning.store_layout import (
    STORE_FILE,
    StoredDocument,
    StoreInfo,
    empty_arrays,
    layer_bytes,
    layer_file,
)
from cusprun.records import Corpora
from cusprun.version import __version__
from cusprun.walk.batches import Batch, make_batches
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import DEFAULT_BATCHING, Batching
from cusprun.walk.ranks import Ranks
from cusprun.walk.shell import DecoderShell
from cusprun.walk.stream import Stream
from cusprun.walk.work import Work
from cusprun.walk.work_folder import walk_key, working
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

log = logging.getLogger(__name__)

_OF_WEIGHTS = (".weight_squares", ".column_squares")
"""Arrays that are no sums over documents: each rank has them whole."""

Arrays = dict[str, torch.Tensor]
ScoreBlock = Callable[[DecoderShell, int, Sequence[Batch], Stream, Arrays], Iterator[int]]
"""Runs one block over all batches, filling the arrays, on the host, and writing the hidden states behind it.

Yields after each batch the number of rotated channels of a head, 0 where that is not looked at.
"""


@dataclass(frozen=True)
class ScoredLayers:
    """Every block's arrays, in a folder that goes with the context of :func:`scored_layers`."""

    work: Work
    info: StoreInfo

    def write(self, out: Path) -> None:
        """Write the store, whole or not at all.

        Raises:
            OutputError: ``out`` exists already or cannot be written.
        """
        with atomic_folder(out) as folder:
            for layer in range(self.info.shape.num_hidden_layers):
                shutil.copyfile(self.work.path(layer_file(layer)), folder / layer_file(layer))
            dump_json(replace(self.info, rotary_dim=self.work.facts["rotary_dim"]), folder / STORE_FILE)


@contextmanager
def scored_layers(
    index: CheckpointIndex,
    corpora: Corpora,
    info: StoreInfo,
    score_block: ScoreBlock,
    *inputs: object,
    device: Device = CPU,
    batching: Batching = DEFAULT_BATCHING,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> Iterator[ScoredLayers]:
    """Score every block on the calibration documents; ``inputs`` are what else the scores depend on.

    What an earlier run of the same has finished is not done again. It goes when the context ends well: by
    then the store is to be written.

    Raises:
        ModelError: weights cannot be read or are not finite.
        OutputError: the disk is full.
    """
    inputs = (info.granularity, info.corpus_hash, *inputs)
    tokens, ranks, total = batching.tokens, workspace.ranks, index.shape.num_hidden_layers
    key = walk_key(info.model_hash, corpora.calibration, tokens, device, ranks, *inputs)
    batches = ranks.share(make_batches(corpora.calibration, tokens))
    with working(workspace, "score", key) as work:
        hidden = work.stream("hidden", batches, index.shape.hidden_size, device)
        done = work.settle()
        if done:
            log.info("scoring goes on after layer %d of %d", done, total)
        name, steps = f"scoring{batching.note}", (total - done) * len(batches)
        with device.exact(), progress.stage(name, steps, "batch") as advance:
            if done < total:
                _score(index, corpora, info, score_block, batches, hidden, work, ranks, advance)
        yield ScoredLayers(work, info)


def _score(
    index: CheckpointIndex,
    corpora: Corpora,
    info: StoreInfo,
    score_block: ScoreBlock,
    batches: Sequence[Batch],
    hidden: Stream,
    work: Work,
    ranks: Ranks,
    advance: Advance,
) -> None:
    """Score the blocks that are left, and keep each."""
    shell, total = DecoderShell(index, hidden.device), index.shape.num_hidden_layers
    if not work.steps:
        shell.embed_into(hidden.next, batches)
        hidden.turn()
    for layer in range(work.steps, total):
        arrays = empty_arrays(index.shape, len(corpora.calibration), info.granularity)
        rotary_dims = {0}
        for rotary_dim in score_block(shell, layer, batches, hidden, arrays):
            rotary_dims.add(rotary_dim)
            advance(1)
        hidden.turn()
        whole = _added_over(ranks, arrays)
        require_finite(whole, index, layer)
        if ranks.is_first:
            with work.adding(layer_file(layer)) as path:
                # Not save_file, whose own error hides that a disk is full.
                path.write_bytes(layer_bytes(info, layer, whole))
        # No family rotates more channels in one block than in another.
        work.commit({"rotary_dim": max(rotary_dims)}, is_last=layer + 1 == total)


def _added_over(ranks: Ranks, arrays: Arrays) -> Arrays:
    """Return arrays of all documents: a document's row is zero but on the rank that has the document."""
    return {
        name: values if name.endswith(_OF_WEIGHTS) else ranks.add(values) for name, values in arrays.items()
    }


def store_info(
    index: CheckpointIndex,
    corpora: Corpora,
    *,
    model_hash: str,
    corpus_hash: str,
    expert_name: str,
    device: Device,
    granularity: str = "unit",
) -> StoreInfo:
    """Describe a store of the calibration documents; raises ``CorpusError`` when there are none."""
    if not corpora.calibration:
        raise CorpusError("there are no calibration documents to score; add sources to the expert file")
    return StoreInfo(
        model_hash=model_hash,
        corpus_hash=corpus_hash,
        expert_name=expert_name,
        shape=index.shape,
        documents=tuple(map(StoredDocument.of, corpora.calibration)),
        cusprun_version=__version__,
        granularity=granularity,
        tokenizer_hash=tokenizer_hash(index.folder),
        device=device.arithmetic,
    )


def require_finite(arrays: Mapping[str, torch.Tensor], index: CheckpointIndex, layer: int) -> None:
    """Raise ``ModelError`` when an array of block ``layer`` holds infinite values or no numbers."""
    if not all(bool(torch.isfinite(values).all()) for values in arrays.values()):
        raise ModelError(
            f"{index.folder}: the activations of block {layer} overflow float32 or are no numbers; "
            "start from a sound checkpoint"
        )
