"""What the stages do when several processes share them: compare what was asked, follow the first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.errors import UserError
from cusprun.records import Manifest, Plan
from cusprun.walk.device import Device
from cusprun.walk.ranks import Ranks

if TYPE_CHECKING:
    from cusprun.pipeline.opening import OpenModel

log = logging.getLogger(__name__)

WritePlan = Callable[[Plan, Path], Manifest]


def require_same_wishes(opened: OpenModel, wishes: object) -> None:
    """Compare what the ranks are to do: the model, the kind of device and ``wishes``, a record or a mapping.

    Raises:
        UserError: they differ.
    """
    from cusprun.codec import to_plain

    plain: Mapping[str, object] = to_plain(wishes)
    opened.workspace.ranks.require_same(
        {
            "model": opened.model_hash,
            "device": opened.device.arithmetic,
            "memory": str(opened.workspace.memory_bytes),
            **{name.replace("_", " "): str(value) for name, value in plain.items()},
        }
    )


def tell_of_idle_gpus(device: Device, ranks: Ranks) -> None:
    """Say where one GPU of several is used, and how all would be."""
    if device.kind != "cuda" or ranks.size > 1:
        return
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        log.info("note: %s is one of %d GPUs here; --processes %d shares the work", device.name, count, count)


def refuse_shared_neurons(granularity: str, ranks: Ranks) -> None:
    """Raise ``UserError`` when several ranks are to work on single neurons."""
    if granularity == "neuron" and ranks.size > 1:
        raise UserError(
            f"single neurons are the work of one process, and there are {ranks.size}; start one, or take the "
            "granularity 'unit'"
        )


def written_together(ranks: Ranks, lead: Callable[[WritePlan], Manifest], write: WritePlan) -> Manifest:
    """Return what ``lead`` returns on the first rank, whose every ``write`` all ranks do together.

    For a search, whose next plan only the first rank knows.
    """
    step: tuple[Plan, Path] | Manifest
    if ranks.is_first:

        def together(plan: Plan, folder: Path) -> Manifest:
            return write(*ranks.from_first(lambda: (plan, folder)))

        found = lead(together)
        return ranks.from_first(lambda: found)
    while not isinstance(step := ranks.from_first(_led), Manifest):
        write(*step)
    return step


def _led() -> tuple[Plan, Path] | Manifest:
    raise AssertionError("only the first rank leads")
