"""Every block refit in turn, each one kept as soon as it is fitted, until the model of them is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.reader import read_tensors
from cusprun.checkpoint.writer import write_tensors
from cusprun.codec import dump_json, load_json, to_plain
from cusprun.progress import SILENT, Progress
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.refit_walk import BlockRefit, RefitTexts, refit_texts, refit_walk
from cusprun.records import LayerPlan, LayerRefit, Plan, TokenizedDocument
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import DEFAULT_BATCHING, Batching
from cusprun.walk.work import Work
from cusprun.walk.work_folder import walk_key, working
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

log = logging.getLogger(__name__)

BlockOf = Callable[[int], BlockRefit]
"""Returns what became of a kept block, by its number in the expert; read from the disk."""


@dataclass(frozen=True)
class _Kept:
    """What is kept of a block beside its weights."""

    reports: tuple[LayerRefit, ...]
    kept: LayerPlan
    has_weights: bool


@contextmanager
def fitted_blocks(
    index: CheckpointIndex,
    plan: Plan,
    documents: Sequence[TokenizedDocument],
    settings: RefitSettings,
    *,
    device: Device = CPU,
    batching: Batching = DEFAULT_BATCHING,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> Iterator[BlockOf]:
    """Refit every block that ``plan`` keeps, and yield what reads them.

    None is refit without documents or in the mode ``none``.

    What an earlier run of the same refit has finished is not done again. It goes when this context ends well:
    by then what is made of the blocks is to be committed.

    Raises:
        ModelError: weights cannot be read or are not finite.
        OutputError: the disk is full.
        PlanError: the family has no use for the target ``residual``.
        UserError: ``settings`` name a target that is not known.
    """
    if not documents or settings.mode == "none":
        yield lambda number: BlockRefit({}, (), plan.layers[number])
        return
    key = refit_key(plan, documents, settings, batching, device, workspace)
    with working(workspace, "refit", key) as work:
        texts = refit_texts(
            index, documents, settings, work, device=device, batching=batching, ranks=workspace.ranks
        )
        done, total = work.settle(), len(plan.layers)
        if done:
            log.info("the refit goes on after layer %d of %d", done, total)
        with progress.stage(f"refit{batching.note}", total - done, "layer") as advance:
            for _ in _fitted(index, plan, texts, work, device, workspace):
                advance(1)
        yield lambda number: _read(work, number)


def refit_key(
    plan: Plan,
    documents: Sequence[TokenizedDocument],
    settings: RefitSettings,
    batching: Batching,
    device: Device,
    workspace: Workspace,
) -> str:
    """Return what stands for everything that decides the bits of a refit."""
    kept = to_plain((plan.kept_blocks, plan.layers))
    return walk_key(
        plan.model_hash, documents, batching.tokens, device, workspace.ranks, kept, to_plain(settings)
    )


def _fitted(
    index: CheckpointIndex,
    plan: Plan,
    texts: RefitTexts,
    work: Work,
    device: Device,
    workspace: Workspace,
) -> Iterator[None]:
    """Refit the blocks that are left, and keep each."""
    done, total = work.steps, len(plan.layers)
    if done == total:
        return
    after = plan.kept_blocks[done - 1] if done else None
    with refit_walk(index, texts, after=after, device=device, workspace=workspace) as walk:
        for number in range(done, total):
            block = walk.refit_block(plan.kept_blocks[number], plan.layers[number])
            if workspace.ranks.is_first:
                _keep(work, number, block)
            work.commit(is_last=number + 1 == total)
            yield


def _keep(work: Work, number: int, block: BlockRefit) -> None:
    with work.adding(f"{_name(number)}.json") as path:
        dump_json(_Kept(block.reports, block.kept, bool(block.weights)), path)
    if block.weights:
        with work.adding(f"{_name(number)}.safetensors") as path:
            write_tensors(path, block.weights)


def _read(work: Work, number: int) -> BlockRefit:
    found = load_json(_Kept, work.path(f"{_name(number)}.json"))
    weights: dict[str, torch.Tensor] = (
        read_tensors(work.path(f"{_name(number)}.safetensors")) if found.has_weights else {}
    )
    return BlockRefit(weights, found.reports, found.kept)


def _name(number: int) -> str:
    return f"block-{number:05d}"
