"""What a rule makes of a store: which units go first, and the loss predicted for any number of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from cusprun.codec import Indices
from cusprun.pruning.rules import score_units
from cusprun.pruning.store import ImpactStore
from cusprun.pruning.store_layout import unit_counts
from cusprun.records import LayerPlan, Shape

_SELECTED = ("ffn_channel", "query_head", "kv_group")
_TOGETHER = frozenset({"query_head", "kv_group"})  # a group that goes takes its query heads along
REMOVED_BLOCK_LOSS = 2.0
"""Predicted loss of a whole block: all of its attention's and all of its FFN's energy."""


@dataclass(frozen=True)
class LayerJudgement:
    """One block: per kind of unit its scores (the rule's), and energies as shares of the sublayer's."""

    scores: Mapping[str, torch.Tensor]
    energies: Mapping[str, torch.Tensor]
    queries_per_group: int

    def select(self, shape: Shape) -> LayerPlan:
        """Return the units with the highest scores that fill ``shape``; equal scores keep the lower index."""
        groups = _keep_best(self.scores["kv_group"], shape.num_key_value_heads)
        return LayerPlan(
            kv_groups=groups,
            query_heads=self._heads(groups, shape.queries_per_group),
            ffn_channels=_keep_best(self.scores["ffn_channel"], shape.intermediate_size),
        )

    def _heads(self, groups: Indices, count: int) -> Indices:
        """Return the ``count`` best query heads of each group."""
        per_group = self.queries_per_group
        heads: list[int] = []
        for group in groups:
            inside = self.scores["query_head"][group * per_group : (group + 1) * per_group]
            heads.extend(group * per_group + head for head in _keep_best(inside, count))
        return Indices(heads)

    def attention_loss(self, shape: Shape) -> float:
        """Return the share of attention's energy that goes when the block is cut to ``shape``."""
        energies = self.energies["query_head"]
        groups = _keep_best(self.scores["kv_group"], shape.num_key_value_heads)
        return float(energies.sum() - energies[list(self._heads(groups, shape.queries_per_group))].sum())

    def ffn_losses(self) -> torch.Tensor:
        """Return the share of the FFN's energy that goes for every number of channels kept: [width + 1]."""
        order = torch.sort(self.scores["ffn_channel"], descending=True, stable=True).indices
        energies = self.energies["ffn_channel"][order]
        kept = torch.cat([energies.new_zeros(1), energies.cumsum(dim=0)])
        return kept[-1] - kept

    def ffn_threshold(self, width: int) -> float:
        """Return the score at or below which an FFN channel goes when ``width`` of them stay."""
        scores = self.scores["ffn_channel"]
        removed = len(scores) - width
        return float(scores.sort().values[removed - 1]) if removed else 0.0


@dataclass(frozen=True)
class Judgement:
    """All blocks, and the scores of the blocks themselves [blocks]."""

    layers: tuple[LayerJudgement, ...]
    blocks: torch.Tensor

    def kept_blocks(self, count: int) -> Indices:
        """Return the ``count`` blocks with the highest scores."""
        return _keep_best(self.blocks, count)


def judge(store: ImpactStore, rule: str, units: Collection[str]) -> Judgement:
    """Score every unit of the kinds that may go; what may not go scores alike and costs nothing.

    Raises:
        StoreError: a file is missing or damaged.
        CorpusError: the documents are too few for the rule, or cannot tell one unit from another.
        PlanError: the rule has no meaning for a kind of unit.
    """
    wanted = set(units) | (_TOGETHER if _TOGETHER & set(units) else set())
    counts = unit_counts(store.shape)
    layers, blocks = [], []
    for layer in range(store.shape.num_hidden_layers):
        scores, energies = {}, {}
        for kind in _SELECTED:
            scores[kind] = energies[kind] = torch.zeros(counts[kind], dtype=torch.float64)
            if kind in wanted:
                evidence = store.evidence(layer, kind)
                scores[kind] = score_units(rule, evidence)
                energies[kind] = _shares(evidence.impacts.double().square().sum(dim=0))
        layers.append(LayerJudgement(scores, energies, store.shape.queries_per_group))
        blocks.append(
            score_units(rule, store.evidence(layer, "block")) if "block" in wanted else torch.zeros(1)
        )
    return Judgement(tuple(layers), torch.cat(blocks))


def _shares(energies: torch.Tensor) -> torch.Tensor:
    """Return energies divided by their sum; a sublayer that does nothing loses nothing."""
    total = energies.sum()
    return energies / total if total > 0 else torch.zeros_like(energies)


def _keep_best(scores: torch.Tensor, count: int) -> Indices:
    """Return the ``count`` units with the highest scores; equal scores keep the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return Indices(order[:count].tolist())
