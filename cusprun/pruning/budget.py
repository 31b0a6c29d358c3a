"""Budgets: what an expert may cost, as a limit on one size of its shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import PlanError
from cusprun.pruning.targets import all_block_parameters, stored_parameters
from cusprun.records import Shape

MAX_RATIO = 0.9
_ROUNDING = 1e-9  # a ratio is written in decimal, and a share of counted parameters is not


@dataclass(frozen=True)
class Budget:
    """A limit on a size that shrinks with every unit removed.

    ``text`` says it to people, ``measure`` gives the size of a shape, ``describe`` says a size to people.
    ``ratio`` is the share of block parameters that was asked to go, ``None`` when something else was asked.
    """

    text: str
    limit: float
    measure: Callable[[Shape], float]
    describe: Callable[[float], str]
    ratio: float | None = None


def check_ratio(ratio: float) -> None:
    """Raise ``PlanError`` when a ratio is outside (0, 0.9]."""
    if not 0 < ratio <= MAX_RATIO:
        raise PlanError(
            f"the ratio {ratio} is outside (0, {MAX_RATIO}]; give the share of block parameters to remove"
        )


def ratio_text(ratio: float) -> str:
    """Say in words what a ratio asks for."""
    return f"at least {ratio:.4g} of the blocks' attention and FFN parameters removed"


def ratio_budget(index: CheckpointIndex, ratio: float) -> Budget:
    """Return the budget that removes at least ``ratio`` of the blocks' attention and FFN parameters.

    Raises:
        PlanError: the ratio is outside (0, 0.9].
    """
    check_ratio(ratio)
    full = all_block_parameters(index, index.shape)
    return Budget(
        text=ratio_text(ratio),
        limit=full * (1 - ratio + _ROUNDING),
        measure=lambda shape: all_block_parameters(index, shape),
        describe=lambda size: f"{1 - size / full:.1%} removed",
        ratio=ratio,
    )


def parameters_budget(index: CheckpointIndex, parameters: int) -> Budget:
    """Return the budget of at most ``parameters`` in the whole expert, a tied head counted once.

    ``index`` is that of what the expert stores (``biases.expert_index``).

    Raises:
        PlanError: ``parameters`` is not positive.
    """
    if parameters < 1:
        raise PlanError(f"the expert must have at least 1 parameter, not {parameters}; give a larger number")
    return Budget(
        text=f"at most {parameters:,} parameters",
        limit=parameters,
        measure=lambda shape: stored_parameters(index, shape),
        describe=lambda size: f"{size:,.0f} parameters",
    )


def bytes_budget(num_bytes: int, target: str, size_of: Callable[[Shape], int]) -> Budget:
    """Return the budget of at most ``num_bytes`` in the artifact ``target``; ``size_of`` gives its bytes.

    Raises:
        PlanError: ``num_bytes`` is not positive.
    """
    if num_bytes < 1:
        raise PlanError(f"the expert must have at least 1 byte, not {num_bytes}; give a larger size")
    return Budget(
        text=f"at most {num_bytes:,} bytes as {target}",
        limit=num_bytes,
        measure=size_of,
        describe=lambda size: f"about {size:,.0f} bytes as {target}",
    )
