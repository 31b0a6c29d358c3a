"""The legal shapes of an expert, with their sizes and predicted losses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import PlanError
from cusprun.pruning.budget import MAX_RATIO, Budget
from cusprun.pruning.judgement import REMOVED_BLOCK_LOSS, Judgement
from cusprun.pruning.targets import (
    Constraints,
    all_block_parameters,
    legal_head_counts,
    legal_widths,
    with_widths,
)
from cusprun.records import Candidate, Shape


@dataclass(frozen=True)
class _Column:
    """The legal shapes of one number of blocks and one pair of head counts, narrowest FFN first.

    ``losses`` [shapes] are predicted; of the shapes themselves only the widths differ.
    """

    shape: Shape
    widths: Sequence[int]
    losses: torch.Tensor

    def at(self, position: int) -> Shape:
        """Return one of the shapes."""
        return with_widths(
            self.shape, self.shape.num_key_value_heads, self.shape.num_attention_heads, self.widths[position]
        )

    def fitting(self, budget: Budget) -> int:
        """Return how many of the shapes keep a budget; sizes grow with the width."""

        def size(position: int) -> float:
            return budget.measure(self.at(position))

        return bisect_right(range(len(self.widths)), budget.limit, key=size)


@dataclass(frozen=True)
class LegalShapes:
    """Every shape that the targets accept and that the kinds of ``units`` allow."""

    index: CheckpointIndex
    judgement: Judgement
    constraints: Constraints
    units: tuple[str, ...]

    def within(self, budget: Budget) -> list[Candidate]:
        """Return the legal shapes that keep a budget, best first.

        Of the shapes that differ in nothing but the FFN, only the widest that keeps the budget is named.

        Raises:
            PlanError: the budget asks for nothing, or no legal shape keeps it; the nearest are named.
        """
        found = []
        if budget.measure(self.index.shape) <= budget.limit:
            raise self._asks_for_nothing(budget)
        for column in self._columns:
            fitting = column.fitting(budget)
            if fitting:
                found.append(self._candidate(column, fitting - 1))
        if not found:
            raise self._unreachable(budget)
        return sorted(found, key=lambda candidate: candidate.predicted_loss)

    def frontier(self, most: int) -> list[Candidate]:
        """Return the shapes for which none that removes as much has a smaller predicted loss.

        They are what the ratios up to 0.9 choose, smallest cut first, at most ``most`` of them: evenly
        thinned, the first and the last always there.
        """
        ratios = torch.cat([self._block_ratios(column) for column in self._columns])
        losses = torch.cat([column.losses for column in self._columns])
        order = torch.sort(losses, stable=True).indices
        order = order[torch.sort(ratios[order], descending=True, stable=True).indices]
        order = order[(ratios[order] > 0) & (ratios[order] <= MAX_RATIO)]
        if not len(order):
            return []
        least = losses[order].cummin(dim=0).values  # of all shapes that remove as much, or more
        better = torch.cat([torch.ones(1, dtype=torch.bool), least[1:] < least[:-1]])
        chosen = order[better].flip(0).tolist()
        if len(chosen) > most:
            step = (len(chosen) - 1) / (most - 1)
            chosen = [chosen[round(step * number)] for number in range(most)]
        widths = len(self._columns[0].widths)
        return [self._candidate(self._columns[place // widths], place % widths) for place in chosen]

    @cached_property
    def _columns(self) -> tuple[_Column, ...]:
        return tuple(self._make_columns())

    def _make_columns(self) -> Iterator[_Column]:
        shape, layers = self.index.shape, self.judgement.layers
        widths = legal_widths(shape, self.constraints, self.units)
        ffn = torch.stack([layer.ffn_losses() for layer in layers])[:, widths]  # [blocks, widths]
        lowest = 1 if "block" in self.units else len(layers)
        for kv_heads, heads in legal_head_counts(self.index.family, shape, self.constraints, self.units):
            cut = with_widths(shape, kv_heads, heads, shape.intermediate_size)
            losses = ffn + torch.tensor([[layer.attention_loss(cut)] for layer in layers])
            for blocks in range(len(layers), lowest - 1, -1):
                kept = losses[list(self.judgement.kept_blocks(blocks))].sum(dim=0)
                removed = REMOVED_BLOCK_LOSS * (len(layers) - blocks)
                column = with_widths(shape, kv_heads, heads, shape.intermediate_size, blocks)
                yield _Column(column, widths, (kept + removed) / len(layers))

    def _candidate(self, column: _Column, position: int) -> Candidate:
        shape = column.at(position)
        return Candidate(
            num_hidden_layers=shape.num_hidden_layers,
            num_key_value_heads=shape.num_key_value_heads,
            num_attention_heads=shape.num_attention_heads,
            intermediate_size=shape.intermediate_size,
            block_ratio=self._block_ratio(shape),
            predicted_loss=float(column.losses[position]),
        )

    @cached_property
    def _full(self) -> int:
        return all_block_parameters(self.index, self.index.shape)

    def _block_ratio(self, shape: Shape) -> float:
        return 1 - all_block_parameters(self.index, shape) / self._full

    def _block_ratios(self, column: _Column) -> torch.Tensor:
        """Return the block ratios of all shapes of a column; parameters grow evenly with the FFN width."""
        shape = column.shape
        heads = (shape.num_key_value_heads, shape.num_attention_heads)
        base, one = (all_block_parameters(self.index, with_widths(shape, *heads, width)) for width in (0, 1))
        parameters = base + (one - base) * torch.tensor(column.widths, dtype=torch.float64)
        return 1 - parameters / self._full

    def _asks_for_nothing(self, budget: Budget) -> PlanError:
        cuts = [column.at(p) for column in self._columns for p in (-1, -2)[: len(column.widths)]]
        near = max((cut for cut in cuts if cut != self.index.shape), key=budget.measure, default=None)
        least = "" if near is None else f"; the least cut is {_named(near, budget)}"
        return PlanError(
            f"the whole model {self.index.folder} has {budget.describe(budget.measure(self.index.shape))}, "
            f"so {budget.text} asks for nothing; lower the limit{least}"
        )

    def _unreachable(self, budget: Budget) -> PlanError:
        smallest = sorted((column.at(0) for column in self._columns), key=budget.measure)[:2]
        most = max(map(self._block_ratio, smallest))
        return PlanError(
            f"no shape that the targets accept keeps the budget ({budget.text}) for {self.index.folder}; the "
            f"most is {most:.1%} of block parameters removed, and the nearest legal shapes are "
            f"{' and '.join(_named(shape, budget) for shape in smallest)}: "
            "ask for less, for other targets or for more kinds of units"
        )


def shape_of_candidate(before: Shape, candidate: Candidate) -> Shape:
    """Return the shape that a candidate stands for."""
    return with_widths(
        before,
        candidate.num_key_value_heads,
        candidate.num_attention_heads,
        candidate.intermediate_size,
        candidate.num_hidden_layers,
    )


def _named(shape: Shape, budget: Budget) -> str:
    blocks = f"{shape.num_hidden_layers} block{'s' if shape.num_hidden_layers > 1 else ''}"
    return (
        f"{blocks} with {shape.num_key_value_heads} KV and "
        f"{shape.num_attention_heads} query heads and FFN width {shape.intermediate_size} "
        f"({budget.describe(budget.measure(shape))})"
    )
