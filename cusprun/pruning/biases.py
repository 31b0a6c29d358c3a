"""Biases that make good for removed units: where a family can hold them, and which ones an expert gets."""

from __future__ import annotations

from dataclasses import replace

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import PlanError
from cusprun.families import Family, axis_length
from cusprun.pruning.rules import rule_entry


def bias_flags(family: Family, rule: str) -> tuple[str, ...]:
    """Return the config keys that give both last projections of a block a bias.

    Raises:
        PlanError: the family's blocks have no place for one, so that ``rule`` cannot be used.
    """
    prefix = family.layer_prefix(0)
    flags: list[str] = []
    for projection in (family.modules.attention_output, family.modules.mlp_output):
        name = f"{prefix}{projection}.bias"
        flag = next((flag for flag, patterns in family.bias_flags.items() if name in _at_0(patterns)), None)
        if flag is None:
            raise PlanError(
                f"the rule {rule!r} adds a bias to {projection}, for which the family {family.model_type} "
                "has no place; choose another rule, or prune without the refit"
            )
        flags.append(flag)
    return tuple(dict.fromkeys(flags))


def expert_index(index: CheckpointIndex, rule: str, *, refit: bool = True) -> CheckpointIndex:
    """Return the index of the whole model as an expert by ``rule`` stores it: with the biases it is given.

    Without ``refit`` nothing makes good for what goes, and none is. A family that has no place for them can
    be planned all the same, for an expert without.
    """
    if not refit or rule_entry(rule).compensation != "bias":
        return index
    try:
        return with_biases(index, bias_flags(index.family, rule))
    except PlanError:
        return index


def with_biases(index: CheckpointIndex, flags: tuple[str, ...]) -> CheckpointIndex:
    """Return an index with the biases too that ``flags`` call for and the source lacks.

    A flag covers all of its projections or none. An added bias has the type of its weight, and no data that
    could be read.
    """
    family, tensors = index.family, dict(index.tensors)
    called_for = {name for flag in flags for name in _at_0(family.bias_flags[flag])}
    for layer in range(index.shape.num_hidden_layers):
        own, first = family.layer_prefix(layer), family.layer_prefix(0)
        for spec in family.layer_specs(layer):
            if f"{first}{spec.name.removeprefix(own)}" in called_for and spec.name not in tensors:
                weight = tensors[f"{spec.name.removesuffix('.bias')}.weight"]
                lengths = tuple(axis_length(axis, index.shape) for axis in spec.axes)
                tensors[spec.name] = replace(weight, name=spec.name, shape=lengths)
    return replace(index, config={**index.config, **dict.fromkeys(flags, True)}, tensors=tensors)


def _at_0(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(pattern.replace("{layer}", "0") for pattern in patterns)
