"""The plan: which legal shape loses least for the wanted ratio, and which units survive in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.codec import Indices
from cusprun.errors import PlanError, require_known
from cusprun.families import Family
from cusprun.pruning.rules import DEFAULT_RULE, RULES
from cusprun.pruning.store import ImpactStore
from cusprun.pruning.targets import (
    DEFAULT_TARGETS,
    Constraints,
    block_parameters,
    legal_head_counts,
    parse_targets,
    with_widths,
)
from cusprun.records import Candidate, LayerPlan, Plan, Shape

MAX_RATIO = 0.9


def make_plan(
    index: CheckpointIndex,
    store: ImpactStore,
    *,
    model_hash: str,
    ratio: float,
    rule: str = DEFAULT_RULE,
    targets: Sequence[str] = (),
) -> Plan:
    """Choose the shape and the surviving units for a ratio; reads the store, runs no model.

    Every legal pair of head counts is joined with the widest legal FFN that reaches the ratio, and the
    candidate with the smallest predicted loss wins: the share of a sublayer's energy (squared impact over all
    documents) that is removed, attention's and the FFN's added, averaged over the blocks. Relative to the
    sublayer and not to the residual stream, because a few tokens of huge norm decide the latter. On
    SmolLM2-135M the log-perplexity lost after refit is 1.0 to 1.6 times this for the FFN and 0.7 times for
    KV groups, so the two kinds are added as they are.

    Raises:
        PlanError: the ratio is outside (0, 0.9], no legal shape reaches it, or the store is another model's.
        UserError: a rule or target is unknown.
    """
    check_ratio(ratio)
    require_known(rule, RULES, "rule")
    chosen_targets = tuple(targets) or DEFAULT_TARGETS
    constraints = parse_targets(chosen_targets)
    if store.model_hash != model_hash:
        raise PlanError(
            f"the store {store.folders[0]} was made from another model than {index.folder}; "
            "score this model, or plan the model that was scored"
        )
    layers = [_judge_layer(store, layer, rule) for layer in range(index.shape.num_hidden_layers)]
    candidates = _candidates(index, layers, constraints, ratio)
    best = candidates[0]
    after = with_widths(
        index.shape, best.num_key_value_heads, best.num_attention_heads, best.intermediate_size
    )
    total = _block_total(index.family, index, index.shape) - _block_total(index.family, index, after)
    return Plan(
        model_hash=model_hash,
        store_hash=store.store_hash,
        rule=rule,
        ratio=ratio,
        block_ratio=best.block_ratio,
        total_ratio=total / index.num_parameters,
        targets=chosen_targets,
        before=index.shape,
        after=after,
        reasons=_reasons(index.shape, candidates, constraints, chosen_targets),
        candidates=tuple(candidates[:12]),
        ffn_thresholds=tuple(_threshold(layer, after.intermediate_size) for layer in layers),
        layers=tuple(_select(layer, after) for layer in layers),
    )


def check_ratio(ratio: float) -> None:
    """Raise ``PlanError`` when a ratio is outside (0, 0.9]."""
    if not 0 < ratio <= MAX_RATIO:
        raise PlanError(
            f"the ratio {ratio} is outside (0, {MAX_RATIO}]; give the share of block parameters to remove"
        )


@dataclass(frozen=True)
class _LayerJudgement:
    """One block's scores (the rule's) and energies (shares of the sublayer's), per unit."""

    scores: dict[str, torch.Tensor]
    energies: dict[str, torch.Tensor]
    queries_per_group: int


def _judge_layer(store: ImpactStore, layer: int, rule: str) -> _LayerJudgement:
    documents = store.documents
    tokens = torch.tensor([document.num_tokens for document in documents])
    dimensions: dict[str, list[int]] = {}
    for row, document in enumerate(documents):
        dimensions.setdefault(document.dimension, []).append(row)
    arrays = store.layer(layer)
    return _LayerJudgement(
        scores={kind: RULES[rule](impacts, tokens, dimensions) for kind, impacts in arrays.items()},
        energies={kind: _shares(impacts.double().square().sum(dim=0)) for kind, impacts in arrays.items()},
        queries_per_group=store.shape.queries_per_group,
    )


def _shares(energies: torch.Tensor) -> torch.Tensor:
    """Return energies divided by their sum; a sublayer that does nothing loses nothing."""
    total = energies.sum()
    return energies / total if total > 0 else torch.zeros_like(energies)


def _keep_best(scores: torch.Tensor, count: int) -> Indices:
    """Return the ``count`` units with the highest scores; equal scores keep the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return Indices(order[:count].tolist())


def _threshold(layer: _LayerJudgement, width: int) -> float:
    """Return the score at or below which an FFN channel goes when ``width`` of them stay."""
    scores = layer.scores["ffn_channel"]
    removed = len(scores) - width
    return float(scores.sort().values[removed - 1]) if removed else 0.0


def _select(layer: _LayerJudgement, after: Shape) -> LayerPlan:
    groups = _keep_best(layer.scores["kv_group"], after.num_key_value_heads)
    per_group = layer.queries_per_group
    heads: list[int] = []
    for group in groups:
        inside = layer.scores["query_head"][group * per_group : (group + 1) * per_group]
        heads.extend(group * per_group + head for head in _keep_best(inside, after.queries_per_group))
    return LayerPlan(
        kv_groups=groups,
        query_heads=Indices(heads),
        ffn_channels=_keep_best(layer.scores["ffn_channel"], after.intermediate_size),
    )


def _removed_energy(layer: _LayerJudgement, shape: Shape) -> float:
    """Return the shares of attention's and of the FFN's energy, added, that one block loses in ``shape``."""
    kept = _select(layer, shape)
    heads = layer.energies["query_head"][list(kept.query_heads)].sum()
    channels = layer.energies["ffn_channel"][list(kept.ffn_channels)].sum()
    total = layer.energies["query_head"].sum() + layer.energies["ffn_channel"].sum()
    return float(total - heads - channels)


def _block_total(family: Family, index: CheckpointIndex, shape: Shape) -> int:
    return block_parameters(family, shape, frozenset(index.tensors)) * shape.num_hidden_layers


def _candidates(
    index: CheckpointIndex, layers: Sequence[_LayerJudgement], constraints: Constraints, ratio: float
) -> list[Candidate]:
    """Return every legal shape that reaches the ratio, best first."""
    shape = index.shape
    full = _block_total(index.family, index, shape)
    step = constraints.ffn_multiple
    widths = sorted({shape.intermediate_size, *range(step, shape.intermediate_size + 1, step)}, reverse=True)
    found: list[Candidate] = []
    highest = 0.0
    for kv_heads, heads in legal_head_counts(index.family, shape, constraints):
        for width in widths:
            cut = with_widths(shape, kv_heads, heads, width)
            block_ratio = 1 - _block_total(index.family, index, cut) / full
            highest = max(highest, block_ratio)
            if block_ratio >= ratio - 1e-9:
                loss = sum(_removed_energy(layer, cut) for layer in layers) / len(layers)
                found.append(Candidate(kv_heads, heads, width, block_ratio, loss))
                break
    if not found:
        raise PlanError(
            f"no shape that the targets accept removes {ratio:.0%} of the blocks of {index.folder}; "
            f"the most is {highest:.1%}: lower the ratio or the targets' demands"
        )
    return sorted(found, key=lambda candidate: candidate.predicted_loss)


def _reasons(
    before: Shape, candidates: Sequence[Candidate], constraints: Constraints, targets: Sequence[str]
) -> tuple[str, ...]:
    best = candidates[0]
    reasons = [
        f"FFN width {before.intermediate_size} to {best.intermediate_size}: a multiple of "
        f"{constraints.ffn_multiple}, as {', '.join(targets)} want",
        f"KV heads {before.num_key_value_heads} to {best.num_key_value_heads}, query heads "
        f"{before.num_attention_heads} to {best.num_attention_heads}",
        f"predicted loss {best.predicted_loss:.4g}, the least of {len(candidates)} legal shapes",
    ]
    for other in candidates[1:3]:
        reasons.append(
            f"rejected: {other.num_key_value_heads} KV and {other.num_attention_heads} query heads with "
            f"FFN width {other.intermediate_size}, predicted loss {other.predicted_loss:.4g}"
        )
    return tuple(reasons)


def checked_plan(plan: Plan, index: CheckpointIndex, model_hash: str) -> Plan:
    """Check a plan (it may have been edited) against a model and return it with its shape recomputed.

    Raises:
        PlanError: it was made for another model, or its layers are malformed, unequal or not legal.
    """
    shape = index.shape
    if plan.model_hash != model_hash or plan.before != shape:
        raise PlanError(f"the plan was made for another model than {index.folder}; make a plan for this one")
    if len(plan.layers) != shape.num_hidden_layers:
        raise PlanError(f"the plan has {len(plan.layers)} layers and the model {shape.num_hidden_layers}")
    first = plan.layers[0]
    widths = (len(first.kv_groups), len(first.query_heads), len(first.ffn_channels))
    for number, layer in enumerate(plan.layers):
        _check_layer(number, layer, shape, widths)
    after = with_widths(shape, *widths)
    if after.num_attention_heads != shape.num_attention_heads and (
        index.family.heads_divide_hidden and shape.hidden_size % after.num_attention_heads
    ):
        raise PlanError(
            f"the plan keeps {after.num_attention_heads} query heads, which the {index.family.model_type} "
            f"config refuses for a hidden size of {shape.hidden_size}; keep a number that divides it"
        )
    full = _block_total(index.family, index, shape)
    removed = full - _block_total(index.family, index, after)
    return replace(plan, after=after, block_ratio=removed / full, total_ratio=removed / index.num_parameters)


def _check_layer(number: int, layer: LayerPlan, shape: Shape, widths: tuple[int, int, int]) -> None:
    limits = (
        ("kv_groups", layer.kv_groups, shape.num_key_value_heads),
        ("query_heads", layer.query_heads, shape.num_attention_heads),
        ("ffn_channels", layer.ffn_channels, shape.intermediate_size),
    )
    for (name, kept, limit), width in zip(limits, widths, strict=True):
        if not kept or kept[-1] >= limit:
            raise PlanError(
                f"layers[{number}].{name} must name units from 0 to {limit - 1}, and at least one"
            )
        if len(kept) != width:
            raise PlanError(
                f"layers[{number}].{name} keeps {len(kept)} and layers[0] keeps {width}; "
                "runtimes want the same width in every layer"
            )
    counts = [
        sum(head // shape.queries_per_group == group for head in layer.query_heads)
        for group in layer.kv_groups
    ]
    if sum(counts) != len(layer.query_heads) or len(set(counts)) != 1:
        raise PlanError(
            f"layers[{number}]: every kept KV group must keep the same number of its own query heads"
        )
