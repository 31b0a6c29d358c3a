"""Writing the expert's weights, block by block: read, cut, refit, written, dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.reader import read_tensor
from cusprun.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, Declared
from cusprun.families import axis_length
from cusprun.progress import SILENT, Progress
from cusprun.pruning.refit_walk import BlockRefit, refit_walk
from cusprun.pruning.slicing import cut_tensor
from cusprun.records import LayerPlan, LayerRefit, Plan, TokenizedDocument

BlockFitter = Callable[[int, LayerPlan], BlockRefit]


def write_weights(
    index: CheckpointIndex,
    plan: Plan,
    folder: Path,
    documents: Sequence[TokenizedDocument] = (),
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> tuple[LayerRefit, ...]:
    """Write the cut weights into ``folder``; with ``documents`` the last projections are refit on them.

    Returns the refit's errors, two per block at the most (a projection that loses nothing is not refit).

    Raises:
        ModelError: weights cannot be read or are not finite.
    """
    reports: list[LayerRefit] = []
    num_layers = index.shape.num_hidden_layers
    with (
        CheckpointWriter(folder, _declare(index, plan), max_shard_bytes) as writer,
        progress.stage("refit and write" if documents else "write", num_layers, "layer") as advance,
        _fitter(index, plan, documents) as fit,
    ):
        for spec in index.family.specs(0):
            if spec.name in index.tensors:
                writer.write(spec.name, read_tensor(index, spec.name))
        for layer, kept in enumerate(plan.layers):
            fitted = fit(layer, kept)
            reports.extend(fitted.reports)
            for spec in index.family.layer_specs(layer):
                if spec.name in fitted.weights:
                    writer.write(spec.name, fitted.weights[spec.name])
                elif spec.name in index.tensors:
                    writer.write(
                        spec.name, cut_tensor(read_tensor(index, spec.name), spec, kept, index.shape)
                    )
            advance(1)
    return tuple(reports)


def _declare(index: CheckpointIndex, plan: Plan) -> list[Declared]:
    return [
        Declared(
            spec.name,
            index.tensors[spec.name].dtype,
            tuple(axis_length(axis, plan.after) for axis in spec.axes),
        )
        for spec in index.family.specs(index.shape.num_hidden_layers)
        if spec.name in index.tensors
    ]


@contextmanager
def _fitter(
    index: CheckpointIndex, plan: Plan, documents: Sequence[TokenizedDocument]
) -> Iterator[BlockFitter]:
    if documents:
        with refit_walk(index, documents, plan.after) as walk:
            yield walk.refit_block
    else:
        yield lambda _layer, _kept: BlockRefit({}, ())
