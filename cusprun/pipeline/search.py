"""The largest cut within a loss of quality: a bisection over what ratios choose, each step measured."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import cache_folder
from cusprun.codec import dump_json, key_of, load_json, to_plain
from cusprun.errors import OutputError, PlanError, UserError
from cusprun.records import Corpora, Manifest, Plan
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.pipeline.opening import OpenModel
    from cusprun.pruning.planner import Planner
    from cusprun.pruning.refit import RefitSettings

log = logging.getLogger(__name__)

MAX_STEPS = 7
"""Experts made and measured at the most: enough to find one of 127 sizes."""


def loss_text(max_loss: float) -> str:
    """Say the budget in words."""
    return f"perplexity on held-out documents at most {max_loss:.2%} above the original's"


@dataclass(frozen=True)
class KnownLosses:
    """Losses of experts that an earlier run measured, in the cache.

    ``inputs`` are what they depend on beside the plan: documents, refit, version, device.
    """

    inputs: tuple[object, ...]

    @classmethod
    def of(cls, opened: OpenModel, corpora: Corpora, settings: RefitSettings) -> KnownLosses:
        """Return those of experts of a model, refit and measured on an expert's documents."""
        from cusprun.corpus import corpus_hash

        return cls((corpus_hash(corpora), to_plain(settings), __version__, *opened.device.key))

    def find(self, plan: Plan) -> float | None:
        """Return the loss of a plan's expert, if it is known."""
        path = self._path(plan)
        if not path.is_file():
            return None
        try:
            return load_json(_Loss, path).loss
        except UserError:
            path.unlink()
            return None

    def keep(self, plan: Plan, loss: float) -> None:
        """Keep the loss of a plan's expert; raises ``OutputError`` when the cache cannot be written."""
        path = self._path(plan)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dump_json(_Loss(loss), path)
        except OSError as error:
            raise OutputError(
                f"the cache {path.parent} cannot be written ({error.strerror}); free some space, or set "
                "CUSPRUN_CACHE to another folder"
            ) from None

    def _path(self, plan: Plan) -> Path:
        kept = to_plain((plan.model_hash, plan.rule, plan.kept_blocks, plan.layers))
        return cache_folder() / "losses" / f"{key_of('loss', kept, *self.inputs)}.json"


@dataclass(frozen=True)
class _Loss:
    loss: float


def largest_within_loss(
    planner: Planner, max_loss: float, out: Path, write: Callable[[Plan, Path], Manifest], known: KnownLosses
) -> Manifest:
    """Leave the largest cut whose measured loss is at most ``max_loss`` in ``out``; return its manifest.

    The sizes are those that some ratio up to 0.9 would choose. The loss is the ratio of perplexities on the
    held-out documents less one, taken to grow with the cut. ``write`` makes an expert and measures it, unless
    its loss is ``known``; the folder is whole or absent, whatever step is interrupted.

    Raises:
        PlanError: even the smallest cut loses more.
        OutputError: an expert cannot be written.
    """
    from cusprun.checkpoint.output import atomic_folder
    from cusprun.pruning.folder import MANIFEST_NAME

    sizes = planner.shapes.frontier(2**MAX_STEPS - 1)
    if not sizes:
        raise PlanError(
            f"no shape that the targets accept is smaller than {planner.shapes.index.folder}; "
            "ask for other targets or more kinds of units"
        )
    steps: list[dict[str, float]] = []
    best: tuple[Plan, Path] | None = None
    fits, too_large = -1, len(sizes)
    with atomic_folder(out) as scratch:
        while too_large - fits > 1:
            size = (fits + too_large) // 2
            folder = scratch / f"step-{len(steps) + 1}"
            plan = planner.chosen(sizes[size], sizes[size : size + 1], loss_text(max_loss))
            loss = known.find(plan)
            if loss is None:
                loss = _measured(write(plan, folder))
                known.keep(plan, loss)
            steps.append({"block_ratio": sizes[size].block_ratio, "loss": loss})
            log.info("step %d: %s", len(steps), step_text(steps[-1]))
            if loss <= max_loss:
                if best is not None:
                    shutil.rmtree(best[1], ignore_errors=True)
                fits, best = size, (plan, folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                too_large = size
        if best is None:
            raise PlanError(
                f"even the smallest cut is too much ({step_text(steps[-1])}, and {max_loss:.2%} is allowed); "
                "allow more, or give more calibration documents"
            )
        plan, folder = best
        made = load_json(Manifest, folder / MANIFEST_NAME) if folder.exists() else write(plan, folder)
        found = {"limit": max_loss, "steps": steps}
        manifest = replace(made, measurements={**made.measurements, "max_loss": found})
        for file in list(folder.iterdir()):
            file.rename(scratch / file.name)
        folder.rmdir()
        dump_json(manifest, scratch / MANIFEST_NAME)
    return manifest


def _measured(manifest: Manifest) -> float:
    return float(manifest.measurements["held_out"]["perplexity_ratio"]) - 1


def step_text(step: Mapping[str, float]) -> str:
    """Say in words what one step measured."""
    return (
        f"{step['block_ratio']:.1%} of block parameters removed, perplexity on held-out documents "
        f"{step['loss']:+.2%}"
    )
