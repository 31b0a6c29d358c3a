"""Scoring: one dense forward pass that leaves the impact of every unit on every document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.output import refuse_existing
from cusprun.families import Modules, TensorSpec
from cusprun.progress import SILENT, Progress
from cusprun.pruning.impact import block_impacts, channel_norms, channel_sums, head_impacts, masked_channels
from cusprun.pruning.magnitude import squares_along, unit_squares
from cusprun.pruning.score_walk import Arrays, scored_layers, store_info
from cusprun.records import Corpora
from cusprun.walk.batches import Batch
from cusprun.walk.budget import batching_within, scoring
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import Batching, with_smaller_batches
from cusprun.walk.shell import DecoderShell
from cusprun.walk.stream import Stream
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace


def score_model(
    index: CheckpointIndex,
    corpora: Corpora,
    out: Path,
    *,
    model_hash: str,
    corpus_hash: str,
    expert_name: str = "",
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> Path:
    """Score a model on the calibration documents and write an impact store.

    Raises:
        CorpusError: there are no calibration documents.
        DeviceError: the device has too little memory, in smaller batches too.
        ModelError: weights cannot be read or are not finite.
        OutputError: ``out`` exists already or cannot be written.
        UserError: the memory of ``workspace`` is too little.
    """
    info = store_info(
        index,
        corpora,
        model_hash=model_hash,
        corpus_hash=corpus_hash,
        expert_name=expert_name,
        device=device,
    )
    refuse_existing(out)

    def work(batching: Batching) -> None:
        with scored_layers(
            index,
            corpora,
            info,
            _score_block,
            device=device,
            batching=batching,
            workspace=workspace,
            progress=progress,
        ) as scored:
            workspace.ranks.from_first(lambda: scored.write(out))

    lengths = [len(document.token_ids) for document in corpora.calibration]
    batching = batching_within(workspace.memory_bytes, scoring(index, lengths, device.dtype))
    with_smaller_batches(device, work, batching, workspace.ranks)
    return out


def _score_block(
    shell: DecoderShell,
    layer: int,
    batches: Sequence[Batch],
    hidden: Stream,
    arrays: Arrays,
) -> Iterator[int]:
    """Score the units of one block; see ``score_walk.ScoreBlock``."""
    modules, shape = shell.index.family.modules, shell.index.shape
    put, fetch = shell.device.put, shell.device.fetch
    block = shell.load_block(layer)
    weights = {
        "attention": block.get_parameter(f"{modules.attention_output}.weight").float(),
        "mlp": block.get_parameter(f"{modules.mlp_output}.weight").float(),
    }
    for name, weight in weights.items():
        arrays[f"{name}.column_squares"] = fetch(squares_along(weight, 1))
    for kind, squares in unit_squares(block_tensors(shell.index, layer, block), shape).items():
        arrays[f"{kind}.weight_squares"] = fetch(squares)
    column_norms = put(arrays["mlp.column_squares"].sqrt().float())
    with shell.holding(layer, block), observed_inputs(block, modules) as inputs:
        for position, batch in enumerate(batches):
            before = hidden.read(position)
            output = shell.run(before)
            at, mask = list(batch.documents), put(batch.mask)
            channels = masked_channels(inputs[modules.attention_output], mask)
            heads, groups = head_impacts(
                channels, None, weights["attention"], shape.head_dim, shape.queries_per_group
            )
            arrays["query_head"][at], arrays["kv_group"][at] = fetch(heads), fetch(groups)
            _add_sums(arrays, "attention", channels, channel_norms(channels), shell.device)
            channels = masked_channels(inputs[modules.mlp_output], mask)
            norms = channel_norms(channels)
            arrays["ffn_channel"][at] = fetch(norms * column_norms)
            _add_sums(arrays, "mlp", channels, norms, shell.device)
            blocks, increments = block_impacts(before, output, mask)
            arrays["block"][at] = fetch(blocks)
            arrays["block.sums"] += fetch(increments)
            hidden.write(position, output)
            yield 0


def _add_sums(
    arrays: dict[str, torch.Tensor],
    name: str,
    channels: torch.Tensor,
    norms: torch.Tensor,
    device: Device,
) -> None:
    """Add one batch: masked channels [documents, tokens, channels], their norms [documents, channels]."""
    arrays[f"{name}.sums"] += device.fetch(channel_sums(channels))
    arrays[f"{name}.squares"] += device.fetch(norms.double().square().sum(dim=0))


def block_tensors(
    index: CheckpointIndex, layer: int, block: nn.Module
) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Yield the tensors of a loaded block, each with the meaning of its axes."""
    prefix = index.family.layer_prefix(layer)
    for spec in index.family.layer_specs(layer):
        if spec.name in index.tensors:
            yield spec, block.get_parameter(spec.name.removeprefix(prefix))


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
