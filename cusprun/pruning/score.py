"""Scoring: one dense forward pass that leaves the impact of every unit on every document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.output import atomic_folder
from cusprun.codec import dump_json
from cusprun.errors import CorpusError, ModelError
from cusprun.families import Modules
from cusprun.progress import SILENT, Progress
from cusprun.pruning.impact import channel_impacts, head_impacts
from cusprun.pruning.store import STORE_FILE, StoredDocument, StoreInfo, layer_file, unit_counts
from cusprun.records import Corpora, Shape
from cusprun.version import __version__
from cusprun.walk.batches import Batch, make_batches
from cusprun.walk.shell import DecoderShell
from cusprun.walk.spill import Spill, spilled


def score_model(
    index: CheckpointIndex,
    corpora: Corpora,
    out: Path,
    *,
    model_hash: str,
    corpus_hash: str,
    expert_name: str = "",
    progress: Progress = SILENT,
) -> Path:
    """Score a model on the calibration documents and write an impact store.

    Raises:
        CorpusError: there are no calibration documents.
        ModelError: weights cannot be read or are not finite.
        OutputError: ``out`` exists already or cannot be written.
    """
    documents = corpora.calibration
    if not documents:
        raise CorpusError("there are no calibration documents to score; add sources to the expert file")
    info = StoreInfo(
        model_hash=model_hash,
        corpus_hash=corpus_hash,
        expert_name=expert_name,
        shape=index.shape,
        documents=tuple(StoredDocument(d.dimension, d.text_hash, len(d.token_ids)) for d in documents),
        cusprun_version=__version__,
    )
    batches = make_batches(documents)
    num_layers = index.shape.num_hidden_layers
    with (
        atomic_folder(out) as folder,
        spilled(batches, index.shape.hidden_size) as hidden,
        progress.stage("scoring", num_layers * len(batches), "batch") as advance,
    ):
        shell = DecoderShell(index)
        shell.embed_into(hidden, batches)
        for layer in range(num_layers):
            arrays = _empty_arrays(index.shape, len(documents))
            for _ in _score_block(shell, layer, batches, hidden, arrays):
                advance(1)
            _require_finite(arrays, index, layer)
            # Not save_file, whose own error hides that a disk is full.
            (folder / layer_file(layer)).write_bytes(save(arrays))
        dump_json(info, folder / STORE_FILE)
    return out


def _empty_arrays(shape: Shape, documents: int) -> dict[str, torch.Tensor]:
    return {kind: torch.empty(documents, count) for kind, count in unit_counts(shape).items()}


def _require_finite(arrays: Mapping[str, torch.Tensor], index: CheckpointIndex, layer: int) -> None:
    if not all(bool(torch.isfinite(values).all()) for values in arrays.values()):
        raise ModelError(
            f"{index.folder}: the activations of block {layer} overflow float32 or are no numbers; "
            "start from a sound checkpoint"
        )


def _score_block(
    shell: DecoderShell,
    layer: int,
    batches: Sequence[Batch],
    hidden: Spill,
    arrays: dict[str, torch.Tensor],
) -> Iterator[None]:
    """Run one block over all batches, filling ``arrays`` and moving the hidden states on."""
    modules, shape = shell.index.family.modules, shell.index.shape
    block = shell.load_block(layer)
    attention_weight = block.get_parameter(f"{modules.attention_output}.weight")
    mlp_weight = block.get_parameter(f"{modules.mlp_output}.weight")
    with shell.holding(layer, block), observed_inputs(block, modules) as inputs:
        for position, batch in enumerate(batches):
            output = shell.run(hidden.read(position))
            heads, groups = head_impacts(
                inputs[modules.attention_output],
                batch.mask,
                attention_weight,
                shape.head_dim,
                shape.queries_per_group,
            )
            at = list(batch.documents)
            arrays["query_head"][at] = heads
            arrays["kv_group"][at] = groups
            arrays["ffn_channel"][at] = channel_impacts(inputs[modules.mlp_output], batch.mask, mlp_weight)
            hidden.write(position, output)
            yield


@contextmanager
def observed_inputs(block: nn.Module, modules: Modules) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a mapping that holds, after each run, the inputs of both sublayers' last projections."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = args[0]

        return block.get_submodule(name).register_forward_pre_hook(hook)

    handles = [keep(name) for name in (modules.attention_output, modules.mlp_output)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
