"""Which single neurons go: per matrix and block, the threshold that gives the wanted share."""

from __future__ import annotations

import math

import torch

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.codec import Indices
from cusprun.errors import PlanError
from cusprun.pruning.neuron_impact import rotary_units
from cusprun.pruning.rules import DEFAULT_NEURON_RULE, rule_entry, score_units
from cusprun.pruning.store import ImpactStore
from cusprun.pruning.store_layout import neuron_counts
from cusprun.records import NeuronLayer, NeuronPlan, Shape

PAIRED = ("query_row", "key_row")
"""Kinds whose rows a rotary embedding pairs: both rows of a pair go, or none."""


def make_neuron_plan(
    index: CheckpointIndex,
    store: ImpactStore,
    *,
    model_hash: str,
    ratio: float,
    rule: str = DEFAULT_NEURON_RULE,
    relevant: bool = False,
    seed: int = 0,
) -> NeuronPlan:
    """Choose the neurons of every matrix that are set to zero; reads the store, runs no model.

    In every block and for each kind of neuron the same share goes, the lowest scores first (arXiv
    2506.02561); with ``relevant`` the highest first. ``seed`` seeds the rule ``random``.

    Raises:
        PlanError: the ratio is outside (0, 1) or too small for a single neuron, the store is another model's
            or holds no single neurons, or the rule has no meaning for single neurons.
        StoreError: the store was made with another tokenizer.
        CorpusError: the documents are too few for the rule, or cannot tell the neurons apart.
        UserError: the rule is unknown.
    """
    check_neuron_rule(rule)
    check_neuron_ratio(ratio)
    require_removal(ratio, index.shape)
    store.require_model(index, model_hash)
    if store.granularity != "neuron":
        raise PlanError(f"the store {store.folders[0]} holds whole units; score single neurons for this plan")
    rotary_dim = store.infos[0].rotary_dim
    return NeuronPlan(
        model_hash=model_hash,
        store_hash=store.store_hash,
        rule=rule,
        ratio=ratio,
        relevant=relevant,
        seed=seed,
        layers=tuple(
            _plan_layer(store, layer, ratio, rule, relevant, seed, rotary_dim)
            for layer in range(index.shape.num_hidden_layers)
        ),
    )


def check_neuron_rule(rule: str) -> None:
    """Raise ``UserError`` when a rule is unknown, ``PlanError`` when it has no meaning for single neurons."""
    entry = rule_entry(rule)
    if entry.revised:
        raise PlanError(
            f"the rule {rule!r} leaves the choice to the refit, and single neurons are zeroed without one; "
            "prune whole units, or choose another rule"
        )
    if entry.compensation == "bias":
        raise PlanError(
            f"the rule {rule!r} knows no single rows of Q and K; prune whole units, or choose another rule"
        )


def check_neuron_ratio(ratio: float) -> None:
    """Raise ``PlanError`` when a share of neurons is outside (0, 1)."""
    if not 0 < ratio < 1:
        raise PlanError(
            f"the ratio {ratio} is outside (0, 1); give the share of each matrix' neurons to zero"
        )


def require_removal(ratio: float, shape: Shape) -> None:
    """Raise ``PlanError`` when a share of neurons is rounded to none of every kind."""
    counts = neuron_counts(shape)
    # Rows of Q and K go in pairs, so that they are never the first to go.
    most = max(count for kind, count in counts.items() if kind not in PAIRED)
    if round(ratio * most) >= 1:
        return
    step = 10.0 ** (math.floor(math.log10(0.5 / most)) - 1)
    least = math.ceil(0.5 / most / step)
    if round(least * step * most) < 1:  # a half is rounded to the even number
        least += 1
    raise PlanError(
        f"the ratio {ratio:g} is not one neuron of any matrix of this model; the smallest that sets one to "
        f"zero is {least * step:.2g}"
    )


def _plan_layer(
    store: ImpactStore, layer: int, ratio: float, rule: str, relevant: bool, seed: int, rotary_dim: int
) -> NeuronLayer:
    removed: dict[str, Indices] = {}
    thresholds: dict[str, float] = {}
    for kind in store.kinds:
        scores = score_units(rule, store.evidence(layer, kind, seed))
        owners = owners_of(kind, len(scores), store.shape, rotary_dim)
        chosen, threshold = choose_neurons(scores, owners, round(ratio * len(scores)), relevant)
        removed[kind] = chosen
        if threshold is not None:
            thresholds[kind] = threshold
    return NeuronLayer(removed, thresholds)


def owners_of(kind: str, count: int, shape: Shape, rotary_dim: int) -> torch.Tensor:
    """Return a number for each neuron of a kind, the same for neurons that live and die together."""
    if kind not in PAIRED:
        return torch.arange(count)
    units = rotary_units(shape.head_dim, rotary_dim)
    heads = torch.arange(count // shape.head_dim).unsqueeze(1) * (int(units.max()) + 1)
    return (heads + units).flatten()


def choose_neurons(
    scores: torch.Tensor, owners: torch.Tensor, count: int, relevant: bool
) -> tuple[Indices, float | None]:
    """Return at most ``count`` neurons to remove, whole owners only, and the last score that went.

    An owner has the highest score among its neurons (which differ only under rules that look at single rows);
    the lowest owners go, or with ``relevant`` the highest. Equal scores go in order.
    """
    owner_scores = scores.new_full((int(owners.max()) + 1,), -torch.inf)
    owner_scores = owner_scores.scatter_reduce(0, owners, scores, "amax")
    order = torch.sort(owner_scores, descending=relevant, stable=True).indices
    sizes = torch.bincount(owners)
    gone = order[sizes[order].cumsum(0) <= count]
    if not len(gone):
        return Indices(), None
    return Indices(torch.nonzero(torch.isin(owners, gone)).flatten().tolist()), float(owner_scores[gone[-1]])
