"""Writing the expert's weights, block by block: read, cut, refit ones taken, renamed, written, dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.reader import read_tensor
from cusprun.checkpoint.writer import DEFAULT_SHARD_BYTES, TORCH_NAMES, CheckpointWriter, Declared
from cusprun.families import TensorSpec, axis_length
from cusprun.progress import SILENT, Progress
from cusprun.pruning.biases import bias_flags, with_biases
from cusprun.pruning.fitted_blocks import BlockOf, fitted_blocks
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.slicing import cut_tensor
from cusprun.records import LayerPlan, LayerRefit, Plan, TokenizedDocument
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import DEFAULT_BATCHING, Batching
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

DEFAULT_SETTINGS = RefitSettings()
_TORCH_TYPES = {name: kind for kind, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class WrittenWeights:
    """What was written.

    ``reports`` hold the refit's errors, two per block at the most (a projection that loses nothing is not
    refit), by the source's numbers of blocks; ``layers`` what each kept block keeps: the plan's units, but
    for FFN channels that the refit chose again.
    """

    reports: tuple[LayerRefit, ...]
    layers: tuple[LayerPlan, ...]


def write_weights(
    index: CheckpointIndex,
    plan: Plan,
    folder: Path,
    documents: Sequence[TokenizedDocument] = (),
    *,
    settings: RefitSettings = DEFAULT_SETTINGS,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    device: Device = CPU,
    batching: Batching = DEFAULT_BATCHING,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> WrittenWeights:
    """Write the cut weights into ``folder``; with ``documents`` the last projections are refit on them.

    Blocks that go are left out of the walk, so that each block is fitted on the inputs that it will have.

    Raises:
        ModelError: weights cannot be read or are not finite.
        OutputError: the disk is full.
        PlanError: ``settings`` ask for biases that the family has no place for.
    """
    flags = compensating_flags(index, plan, settings)
    with fitted_blocks(
        index,
        plan,
        documents,
        settings,
        device=device,
        batching=batching,
        workspace=workspace,
        progress=progress,
    ) as fitted:
        return write_blocks(
            index, plan, folder, fitted, flags, max_shard_bytes=max_shard_bytes, progress=progress
        )


def write_blocks(
    index: CheckpointIndex,
    plan: Plan,
    folder: Path,
    fitted: BlockOf,
    flags: tuple[str, ...] = (),
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> WrittenWeights:
    """Write the cut weights into ``folder``, those that ``fitted`` has in the place of the source's.

    ``flags`` are the config keys of biases that the expert gets.

    Raises:
        ModelError: weights cannot be read or are not finite.
    """
    reports: list[LayerRefit] = []
    layers: list[LayerPlan] = []
    stored = with_biases(index, flags)
    with (
        CheckpointWriter(folder, _declare(stored, plan), max_shard_bytes) as writer,
        progress.stage("write", len(plan.layers), "layer") as advance,
    ):
        for spec in index.family.specs(0):
            if spec.name in index.tensors:
                writer.write(spec.name, read_tensor(index, spec.name))
        for number, layer in enumerate(plan.kept_blocks):
            block = fitted(number)
            reports.extend(block.reports)
            layers.append(block.kept)
            for spec, written in _renamed(index, layer, number):
                if spec.name in block.weights:
                    writer.write(written.name, block.weights[spec.name])
                elif spec.name in index.tensors:
                    whole = read_tensor(index, spec.name)
                    writer.write(written.name, cut_tensor(whole, spec, block.kept, index.shape))
                elif spec.name in stored.tensors:
                    kind = _TORCH_TYPES[stored.tensors[spec.name].dtype]
                    writer.write(written.name, torch.zeros(_shape(written, plan), dtype=kind))
            advance(1)
    return WrittenWeights(tuple(reports), tuple(layers))


def compensating_flags(index: CheckpointIndex, plan: Plan, settings: RefitSettings) -> tuple[str, ...]:
    """Return the config keys of the biases that the expert gets; none unless the mode is ``bias``.

    Raises:
        PlanError: the family has no place for them.
    """
    return bias_flags(index.family, plan.rule) if settings.mode == "bias" else ()


def _declare(index: CheckpointIndex, plan: Plan) -> list[Declared]:
    specs = [(spec, spec) for spec in index.family.specs(0)]
    for number, layer in enumerate(plan.kept_blocks):
        specs += _renamed(index, layer, number)
    return [
        Declared(written.name, index.tensors[spec.name].dtype, _shape(written, plan))
        for spec, written in specs
        if spec.name in index.tensors
    ]


def _renamed(index: CheckpointIndex, layer: int, number: int) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    """Pair the tensors of a block of the source with those of the block that it becomes."""
    family = index.family
    return zip(family.layer_specs(layer), family.layer_specs(number), strict=True)


def _shape(spec: TensorSpec, plan: Plan) -> tuple[int, ...]:
    return tuple(axis_length(axis, plan.after) for axis in spec.axes)
