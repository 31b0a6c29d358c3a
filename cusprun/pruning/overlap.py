"""How much the irrelevant sets of dimensions share, against what chance would give. Pure mathematics.

The irrelevant set of a dimension at ratio r is the share r of the units of one kind, in one block, with the
lowest score over that dimension's documents alone. An expert loses the intersection of the irrelevant sets of
its dimensions (arXiv 2506.02561), so the overlap says how much of it is there to lose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch

from cusprun.errors import UserError


@dataclass(frozen=True)
class ComparedDimension:
    """One dimension of one expert; ``name`` is what tables call it."""

    name: str
    dimension: str
    expert_name: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class LayerOverlap:
    """The overlap in one block, or over all blocks (``layer`` None), in the order of the report's pairs.

    ``jaccard`` is the size of the intersection over that of the union; ``intersection`` is the share of the
    units that are irrelevant to every dimension.
    """

    layer: int | None
    jaccard: tuple[float, ...]
    intersection: float


@dataclass(frozen=True)
class KindOverlap:
    """The overlap for one kind of unit.

    ``irrelevant`` of ``units`` are in each set. The means are over ``layers``; the chance values are the
    expectations for independent random sets of this size.
    """

    kind: str
    units: int
    irrelevant: int
    layers: tuple[LayerOverlap, ...]
    mean_jaccard: tuple[float, ...]
    mean_intersection: float
    chance_jaccard: float
    chance_intersection: float


@dataclass(frozen=True)
class OverlapReport:
    """How much the dimensions of some stores share; ``pairs`` are names of ``dimensions``, two by two."""

    created: str
    cusprun_version: str
    model_hash: str
    store_hash: str
    rule: str
    ratio: float
    num_hidden_layers: int
    dimensions: tuple[ComparedDimension, ...]
    pairs: tuple[tuple[str, ...], ...]
    kinds: tuple[KindOverlap, ...]
    schema_version: int = 1


def check_overlap_ratio(ratio: float) -> None:
    """Raise ``UserError`` when a ratio is outside (0, 1)."""
    if not 0 < ratio < 1:
        raise UserError(
            f"the ratio {ratio} is not between 0 and 1; give the share of units to call irrelevant"
        )


def irrelevant_count(units: int, ratio: float) -> int:
    """Return how many of two or more units are the share ``ratio``: at least one, and never all of them."""
    return min(max(math.floor(units * ratio + 0.5), 1), units - 1)


def irrelevant_set(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return which units have the lowest scores: bool [units]; of equal scores the later unit is taken.

    That is how a plan chooses too: equal scores keep the lower index.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[len(scores) - irrelevant_count(len(scores), ratio) :]] = True
    return chosen


def layer_overlap(sets: torch.Tensor, layer: int | None) -> LayerOverlap:
    """Return the overlap of sets that are not empty: bool [dimensions, units]."""
    return LayerOverlap(
        layer=layer,
        jaccard=tuple(
            float((sets[one] & sets[other]).sum() / (sets[one] | sets[other]).sum())
            for one, other in combinations(range(len(sets)), 2)
        ),
        intersection=float(sets.all(dim=0).double().mean()),
    )


def kind_overlap(
    kind: str, layers: Sequence[LayerOverlap], *, units: int, irrelevant: int, dimensions: int
) -> KindOverlap:
    """Put the blocks' overlaps of one kind of unit together, with their means and what chance would give."""
    columns = zip(*(layer.jaccard for layer in layers), strict=True)
    return KindOverlap(
        kind=kind,
        units=units,
        irrelevant=irrelevant,
        layers=tuple(layers),
        mean_jaccard=tuple(sum(column) / len(layers) for column in columns),
        mean_intersection=sum(layer.intersection for layer in layers) / len(layers),
        chance_jaccard=chance_jaccard(units, irrelevant),
        chance_intersection=(irrelevant / units) ** dimensions,
    )


def chance_jaccard(units: int, irrelevant: int) -> float:
    """Return the expected Jaccard overlap of two independent random sets of equal size.

    The number s of shared units is hypergeometric, so this is the sum over s of P(s) s / (2 irrelevant - s);
    with many units it tends to r / (2 - r) for the share r.
    """

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    total = log_choose(units, irrelevant)
    return sum(
        math.exp(log_choose(irrelevant, shared) + log_choose(units - irrelevant, irrelevant - shared) - total)
        * shared
        / (2 * irrelevant - shared)
        for shared in range(max(1, 2 * irrelevant - units), irrelevant + 1)
    )


def layer_groups(num_hidden_layers: int, most: int = 4) -> tuple[range, ...]:
    """Cut the blocks into at most ``most`` runs of nearly equal length, first to last."""
    groups = min(most, num_hidden_layers)
    edges = [number * num_hidden_layers // groups for number in range(groups + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(edges))
