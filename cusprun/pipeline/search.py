"""The largest cut within a loss of quality: a bisection over what ratios choose, each step measured."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.errors import PlanError
from cusprun.records import Manifest, Plan

if TYPE_CHECKING:
    from cusprun.pruning.planner import Planner

log = logging.getLogger(__name__)

MAX_STEPS = 7
"""Experts made and measured at the most: enough to find one of 127 sizes."""


def loss_text(max_loss: float) -> str:
    """Say the budget in words."""
    return f"perplexity on held-out documents at most {max_loss:.2%} above the original's"


def largest_within_loss(
    planner: Planner,
    max_loss: float,
    out: Path,
    write: Callable[[Plan, Path], Manifest],
) -> Manifest:
    """Leave the largest cut whose measured loss is at most ``max_loss`` in ``out``; return its manifest.

    The sizes are those that some ratio up to 0.9 would choose. The loss is the ratio of perplexities on the
    held-out documents less one, taken to grow with the cut. ``write`` makes an expert and measures it; the
    folder is whole or absent, whatever step is interrupted.

    Raises:
        PlanError: even the smallest cut loses more.
        OutputError: an expert cannot be written.
    """
    from cusprun.checkpoint.output import atomic_folder
    from cusprun.codec import dump_json
    from cusprun.pruning.folder import MANIFEST_NAME

    sizes = planner.shapes.frontier(2**MAX_STEPS - 1)
    if not sizes:
        raise PlanError(
            f"no shape that the targets accept is smaller than {planner.shapes.index.folder}; "
            "ask for other targets or more kinds of units"
        )
    steps: list[dict[str, float]] = []
    best: tuple[Path, Manifest] | None = None
    fits, too_large = -1, len(sizes)
    with atomic_folder(out) as scratch:
        while too_large - fits > 1:
            size = (fits + too_large) // 2
            folder = scratch / f"step-{len(steps) + 1}"
            manifest = write(planner.chosen(sizes[size], sizes[size : size + 1], loss_text(max_loss)), folder)
            loss = float(manifest.measurements["held_out"]["perplexity_ratio"]) - 1
            steps.append({"block_ratio": sizes[size].block_ratio, "loss": loss})
            log.info("step %d: %s", len(steps), step_text(steps[-1]))
            if loss <= max_loss:
                if best is not None:
                    shutil.rmtree(best[0])
                fits, best = size, (folder, manifest)
            else:
                shutil.rmtree(folder)
                too_large = size
        if best is None:
            raise PlanError(
                f"even the smallest cut is too much ({step_text(steps[-1])}, and {max_loss:.2%} is allowed); "
                "allow more, or give more calibration documents"
            )
        found = {"limit": max_loss, "steps": steps}
        manifest = replace(best[1], measurements={**best[1].measurements, "max_loss": found})
        for file in list(best[0].iterdir()):
            file.rename(scratch / file.name)
        best[0].rmdir()
        dump_json(manifest, scratch / MANIFEST_NAME)
    return manifest


def step_text(step: Mapping[str, float]) -> str:
    """Say in words what one step measured."""
    return (
        f"{step['block_ratio']:.1%} of block parameters removed, perplexity on held-out documents "
        f"{step['loss']:+.2%}"
    )
