"""Checking a plan before it is applied: it is a file that people may have edited."""

from __future__ import annotations

from dataclasses import replace

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import PlanError, UserError
from cusprun.pruning.biases import expert_index
from cusprun.pruning.budget import check_ratio, ratio_text
from cusprun.pruning.planner import content_hash, removed_shares, shape_reasons
from cusprun.pruning.rules import check_rule
from cusprun.pruning.targets import Constraints, check_units, parse_targets, with_widths
from cusprun.records import LayerPlan, Plan, Shape

EDITED = "edited by hand"
_ROUNDING = 1e-9


def checked_plan(plan: Plan, index: CheckpointIndex, model_hash: str, *, refit: bool = True) -> Plan:
    """Check a plan (it may have been edited) against a model and return it with its numbers recomputed.

    What the layers keep decides. Where that, the rule, the targets, the units, the budget or the ratio was
    edited, the shape, the shares and the reasons are made again, and the budget says so. ``refit`` says
    whether anything is to make good for what goes.

    Raises:
        PlanError: it was made for another model; its layers are malformed, unequal or not legal, or remove
            nothing; or its ratio, rule, targets, units and kept blocks contradict one another.
    """
    shape = index.shape
    if plan.model_hash != model_hash or plan.before != shape:
        raise PlanError(f"the plan was made for another model than {index.folder}; make a plan for this one")
    constraints = _checked_words(plan)
    _check_blocks(plan, shape)
    first = plan.layers[0]
    widths = (len(first.kv_groups), len(first.query_heads), len(first.ffn_channels))
    for number, layer in enumerate(plan.layers):
        _check_layer(number, layer, shape, widths)
    after = with_widths(shape, *widths, len(plan.kept_blocks))
    _check_legal(plan, after, index, constraints)
    if after == shape:
        raise PlanError("the plan removes nothing, since its layers keep every unit; remove some units")
    block_ratio, total_ratio = removed_shares(index, after, expert_index(index, plan.rule, refit=refit))
    checked = replace(plan, after=after, block_ratio=block_ratio, total_ratio=total_ratio)
    if content_hash(plan) == plan.content_hash:
        if plan.ratio > block_ratio + _ROUNDING:
            raise PlanError(
                f"the plan says ratio {plan.ratio:g} and its layers remove {block_ratio:.4f} of the block "
                "parameters; remove more units, or make a plan for that ratio"
            )
        # The ratio is what the budget asks for, or what was reached where something else was asked for.
        if plan.budget == ratio_text(plan.ratio) or abs(plan.ratio - block_ratio) <= _ROUNDING:
            return checked
    return replace(
        checked,
        ratio=block_ratio,
        budget=EDITED,
        reasons=(
            EDITED,
            f"the rule {plan.rule!r} and the targets {', '.join(plan.targets)} as the edited plan says",
            *shape_reasons(shape, after, plan.kept_blocks, constraints.ffn_multiple, plan.targets),
        ),
        candidates=(),
        ffn_thresholds=(),
        content_hash="",
    )


def _checked_words(plan: Plan) -> Constraints:
    """Check ratio, rule, units and targets, each by itself."""
    check_ratio(plan.ratio)
    try:
        check_rule(plan.rule)
        if not plan.units or check_units(plan.units) != plan.units:
            raise UserError(f"units {', '.join(plan.units) or 'of no kind'}: name each kind once, in order")
        return parse_targets(plan.targets)
    except UserError as error:
        raise PlanError(f"the plan's {error}") from None


def _check_blocks(plan: Plan, shape: Shape) -> None:
    if not plan.kept_blocks or plan.kept_blocks[-1] >= shape.num_hidden_layers:
        raise PlanError(
            f"kept_blocks must name blocks from 0 to {shape.num_hidden_layers - 1}, and at least one"
        )
    if len(plan.layers) != len(plan.kept_blocks):
        raise PlanError(
            f"the plan has {len(plan.layers)} layers and keeps {len(plan.kept_blocks)} of the model's "
            f"{shape.num_hidden_layers} blocks; there is one entry in layers for each kept block"
        )


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


def _check_legal(plan: Plan, after: Shape, index: CheckpointIndex, constraints: Constraints) -> None:
    """Refuse a shape that the family or the targets do not accept, or that the plan's units do not allow."""
    before, targets = index.shape, ", ".join(plan.targets)
    kv_heads, heads, width = after.num_key_value_heads, after.num_attention_heads, after.intermediate_size
    if (kv_heads, heads) != (before.num_key_value_heads, before.num_attention_heads):
        if index.family.heads_divide_hidden and before.hidden_size % heads:
            raise PlanError(
                f"the plan keeps {heads} query heads, which the {index.family.model_type} config refuses for "
                f"a hidden size of {before.hidden_size}; keep a number that divides it"
            )
        if not constraints.allows_heads(heads, kv_heads):
            raise PlanError(
                f"the plan keeps {heads} query and {kv_heads} KV heads, which do not divide over the ranks "
                f"of its targets ({targets}); keep other numbers or edit the targets"
            )
    if width != before.intermediate_size and width % constraints.ffn_multiple:
        raise PlanError(
            f"the plan keeps {width} FFN channels, and its targets ({targets}) want a multiple of "
            f"{constraints.ffn_multiple}; keep another number or edit the targets"
        )
    gone = {
        "block": after.num_hidden_layers < before.num_hidden_layers,
        "kv_group": kv_heads < before.num_key_value_heads,
        "query_head": after.queries_per_group < before.queries_per_group,
        "ffn_channel": width < before.intermediate_size,
    }
    for kind, is_cut in gone.items():
        if is_cut and kind not in plan.units:
            raise PlanError(
                f"the plan removes units of the kind {kind}, and its units are {', '.join(plan.units)}; "
                f"add {kind} to its units or keep them"
            )
