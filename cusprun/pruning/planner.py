"""The plan: which legal shape loses least within a budget, and which units survive in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.codec import Indices, json_bytes
from cusprun.errors import PlanError, StoreError
from cusprun.pruning.biases import expert_index
from cusprun.pruning.budget import Budget, ratio_budget
from cusprun.pruning.candidates import LegalShapes, shape_of_candidate
from cusprun.pruning.judgement import judge
from cusprun.pruning.rules import DEFAULT_RULE, check_rule, rule_entry
from cusprun.pruning.store import ImpactStore
from cusprun.pruning.targets import (
    DEFAULT_TARGETS,
    all_block_parameters,
    check_units,
    parse_targets,
    stored_parameters,
)
from cusprun.records import Candidate, Plan, Shape

_CANDIDATES_KEPT = 12


def make_plan(
    index: CheckpointIndex,
    store: ImpactStore,
    *,
    model_hash: str,
    ratio: float | None = None,
    budget: Budget | None = None,
    rule: str = DEFAULT_RULE,
    targets: Sequence[str] = (),
    units: Sequence[str] = (),
) -> Plan:
    """Choose the shape and the surviving units for a budget (or a ratio); reads the store, runs no model.

    Raises:
        PlanError: the ratio is outside (0, 0.9], no legal shape keeps the budget, or the store is another
            model's.
        StoreError: the store was made with another tokenizer, or several share documents and the rule cannot
            count these once.
        CorpusError: the documents of the store are too few for the rule, or cannot separate any units.
        UserError: a rule, target or kind of unit is unknown.
    """
    assert (ratio is None) != (budget is None)
    chosen = ratio_budget(index, ratio) if budget is None and ratio is not None else budget
    assert chosen is not None
    planner = Planner.of(index, store, model_hash=model_hash, rule=rule, targets=targets, units=units)
    return planner.plan(chosen)


@dataclass(frozen=True)
class Planner:
    """A model and a store that were judged once, for plans of any number of budgets; made by :meth:`of`.

    ``stored`` is what an expert stores before it is cut: the model, with the biases that it is given.
    """

    shapes: LegalShapes
    stored: CheckpointIndex
    model_hash: str
    store_hash: str
    rule: str
    targets: tuple[str, ...]

    @classmethod
    def of(
        cls,
        index: CheckpointIndex,
        store: ImpactStore,
        *,
        model_hash: str,
        rule: str = DEFAULT_RULE,
        targets: Sequence[str] = (),
        units: Sequence[str] = (),
        refit: bool = True,
    ) -> Planner:
        """Judge every unit of a store; raises what :func:`make_plan` raises, but for the budget.

        ``refit`` says whether anything is to make good for what goes: biases that a rule adds count.
        """
        check_rule(rule)
        kinds = check_units(units)
        chosen_targets = tuple(targets) or DEFAULT_TARGETS
        constraints = parse_targets(chosen_targets)
        store.require_model(index, model_hash)
        if store.granularity != "unit":
            raise PlanError(
                f"the store {store.folders[0]} holds single neurons, and a plan removes whole units; "
                "score again, or prune with the granularity 'neuron'"
            )
        if rule_entry(rule).compensation == "bias" and store.shares_documents:
            raise StoreError(
                f"the stores {', '.join(map(str, store.folders))} share documents, which the rule {rule!r} "
                "would count twice; score their documents into one store, or choose another rule"
            )
        shapes = LegalShapes(index, judge(store, rule, kinds), constraints, kinds)
        stored = expert_index(index, rule, refit=refit)
        return cls(shapes, stored, model_hash, store.store_hash, rule, chosen_targets)

    def plan(self, budget: Budget) -> Plan:
        """Return the plan with the smallest predicted loss within a budget.

        Every legal number of blocks and pair of head counts is joined with the widest legal FFN that keeps
        the budget. The predicted loss is the share of a sublayer's energy (squared impact over all documents)
        that is removed, attention's and the FFN's added, averaged over the source's blocks; a removed block
        loses both whole. Relative to the sublayer and not to the residual stream, because a few tokens of
        huge norm decide the latter. On SmolLM2-135M the log-perplexity lost after refit is 1.0 to 1.6 times
        this for the FFN and 0.7 times for KV groups, so the kinds are added as they are.

        Raises:
            PlanError: no legal shape keeps the budget.
        """
        candidates = self.shapes.within(budget)
        return self.chosen(candidates[0], candidates, budget.text, budget.ratio)

    def chosen(
        self, best: Candidate, candidates: Sequence[Candidate], budget: str, ratio: float | None = None
    ) -> Plan:
        """Return the plan of one candidate; ``ratio`` is what was asked for, if a ratio was."""
        index, judgement = self.shapes.index, self.shapes.judgement
        after = shape_of_candidate(index.shape, best)
        kept_blocks = judgement.kept_blocks(after.num_hidden_layers)
        layers = [judgement.layers[layer] for layer in kept_blocks]
        selected = tuple(layer.select(after) for layer in layers)
        block_ratio, total_ratio = removed_shares(index, after, self.stored)
        made = Plan(
            model_hash=self.model_hash,
            store_hash=self.store_hash,
            rule=self.rule,
            ratio=block_ratio if ratio is None else ratio,
            budget=budget,
            block_ratio=block_ratio,
            total_ratio=total_ratio,
            targets=self.targets,
            units=self.shapes.units,
            before=index.shape,
            after=after,
            reasons=self._reasons(best, candidates, kept_blocks),
            candidates=tuple(candidates[:_CANDIDATES_KEPT]),
            ffn_thresholds=tuple(layer.ffn_threshold(after.intermediate_size) for layer in layers),
            kept_blocks=kept_blocks,
            layers=selected,
            content_hash="",
        )
        return replace(made, content_hash=content_hash(made))

    def _reasons(
        self, best: Candidate, candidates: Sequence[Candidate], kept_blocks: Indices
    ) -> tuple[str, ...]:
        before, multiple = self.shapes.index.shape, self.shapes.constraints.ffn_multiple
        reasons = list(
            shape_reasons(before, shape_of_candidate(before, best), kept_blocks, multiple, self.targets)
        )
        reasons.append(
            f"predicted loss {best.predicted_loss:.4g}, the least of {len(candidates)} legal shapes"
        )
        if rule_entry(self.rule).revised:
            reasons.append(f"the rule {self.rule!r}: the refit chooses the FFN channels again")
        for other in [candidate for candidate in candidates[:3] if candidate != best][:2]:
            blocks = "" if not _cuts_blocks(candidates, before) else f"{other.num_hidden_layers} blocks, "
            reasons.append(
                f"rejected: {blocks}{other.num_key_value_heads} KV and {other.num_attention_heads} query "
                f"heads with FFN width {other.intermediate_size}, predicted loss {other.predicted_loss:.4g}"
            )
        return tuple(reasons)


def _cuts_blocks(candidates: Sequence[Candidate], before: Shape) -> bool:
    return any(candidate.num_hidden_layers < before.num_hidden_layers for candidate in candidates)


def shape_reasons(
    before: Shape, after: Shape, kept_blocks: Indices, ffn_multiple: int, targets: Sequence[str]
) -> tuple[str, ...]:
    """Say in words what a shape changes."""
    removed = Indices(set(range(before.num_hidden_layers)) - set(kept_blocks))
    width = f"FFN width {before.intermediate_size} to {after.intermediate_size}"
    if after.intermediate_size != before.intermediate_size:
        width += f": a multiple of {ffn_multiple}, as {', '.join(targets)} want"
    return (
        *((f"blocks {removed.to_text()} go, {len(kept_blocks)} stay",) if removed else ()),
        width,
        f"KV heads {before.num_key_value_heads} to {after.num_key_value_heads}, query heads "
        f"{before.num_attention_heads} to {after.num_attention_heads}",
    )


def plan_sentence(plan: Plan) -> str:
    """Say in one line what a plan removes."""
    before, after = plan.before, plan.after
    blocks = f"{before.num_hidden_layers} to {after.num_hidden_layers} blocks, "
    return (
        f"plan: {blocks if before.num_hidden_layers != after.num_hidden_layers else ''}"
        f"FFN width {before.intermediate_size} to {after.intermediate_size}, "
        f"KV heads {before.num_key_value_heads} to {after.num_key_value_heads}, "
        f"query heads {before.num_attention_heads} to {after.num_attention_heads}; "
        f"{plan.block_ratio:.1%} of block parameters, {plan.total_ratio:.1%} of all"
    )


def content_hash(plan: Plan) -> str:
    """Return a SHA-256 over what was asked for and what survives."""
    words = [plan.rule, plan.budget, list(plan.targets), list(plan.units)]
    return hashlib.sha256(json_bytes([*words, plan.kept_blocks, *plan.layers])).hexdigest()


def removed_shares(index: CheckpointIndex, after: Shape, stored: CheckpointIndex) -> tuple[float, float]:
    """Return the shares of attention and FFN parameters, and of all parameters, that a shape removes.

    ``stored`` is what the expert stores before it is cut: biases that it is given count in the second share.
    """
    full = all_block_parameters(index, index.shape)
    block_ratio = 1 - all_block_parameters(index, after) / full
    return block_ratio, 1 - stored_parameters(stored, after) / index.num_parameters
