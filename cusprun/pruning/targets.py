"""Targets: what the runtimes that an expert is for accept, and the legal shapes that follow."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import UserError, require_known
from cusprun.families import Family, TensorSpec, axis_length
from cusprun.records import UNITS, Shape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_UNITS = ("ffn_channel", "query_head", "kv_group")
"""The kinds of units that may go when nothing else is said; whole blocks only on request."""

DEFAULT_TARGETS = ("gguf:q8_0", "onnx:int4", "vllm:tp1")
"""Every runtime at its most common type: an expert planned without ``--for`` runs in all three."""


@cache
def target_table() -> Mapping[str, Mapping[str, int]]:
    """Return the FFN width multiples by runtime and variant."""
    text = resources.files(__package__).joinpath("targets.toml").read_text(encoding="utf-8")
    table: Mapping[str, Mapping[str, int]] = tomllib.loads(text)
    return table


@dataclass(frozen=True)
class Constraints:
    """What all targets together demand of a shape."""

    ffn_multiple: int
    tensor_parallel: int

    def allows_heads(self, heads: int, kv_heads: int) -> bool:
        """Tell whether head counts divide over the ranks; vLLM repeats KV heads when ranks outnumber them."""
        ranks = self.tensor_parallel
        return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def parse_targets(texts: Sequence[str]) -> Constraints:
    """Parse targets like ``gguf:q4_k_m`` or ``vllm:tp2``.

    Raises:
        UserError: a runtime or variant is unknown; the nearest is suggested.
    """
    multiple, ranks = 1, 1
    for text in texts:
        runtime, colon, variant = text.strip().lower().partition(":")
        require_known(runtime, target_table(), "target runtime")
        variants = target_table()[runtime]
        if not colon:
            raise UserError(
                f"the target {text!r} names no variant; write for example {runtime}:{next(iter(variants))}"
            )
        require_known(variant, variants, f"{runtime} variant")
        multiple = math.lcm(multiple, variants[variant])
        if runtime == "vllm":
            ranks = math.lcm(ranks, int(variant.removeprefix("tp")))
    return Constraints(multiple, ranks)


def check_units(units: Sequence[str]) -> tuple[str, ...]:
    """Return kinds of units in the order of ``UNITS``, the default ones when none is given.

    Raises:
        UserError: a kind is unknown; the nearest is suggested.
    """
    for unit in units:
        require_known(unit, UNITS, "kind of unit")
    return tuple(unit for unit in UNITS if unit in (units or DEFAULT_UNITS))


def block_parameters(family: Family, shape: Shape, present: frozenset[str]) -> int:
    """Count one block's attention and FFN parameters, norms apart; ``present`` names the tensors stored."""
    return sum(
        math.prod(axis_length(axis, shape) for axis in spec.axes)
        for spec in family.layer_specs(0)
        if spec.name in present and spec.axes != ("hidden",) and not spec.is_norm
    )


def all_block_parameters(index: CheckpointIndex, shape: Shape) -> int:
    """Count the attention and FFN parameters of all blocks of ``shape``, norms apart."""
    return block_parameters(index.family, shape, frozenset(index.tensors)) * shape.num_hidden_layers


def stored_parameters(index: CheckpointIndex, shape: Shape) -> int:
    """Count every parameter that the model of ``index`` stores when it is cut to ``shape``."""

    def count(specs: Iterable[TensorSpec]) -> int:
        return sum(
            math.prod(axis_length(axis, shape) for axis in spec.axes)
            for spec in specs
            if spec.name in index.tensors
        )

    block = count(index.family.layer_specs(0))
    return count(index.family.specs(0)) + block * shape.num_hidden_layers


def legal_head_counts(
    family: Family, shape: Shape, constraints: Constraints, units: Collection[str] = UNITS
) -> Iterator[tuple[int, int]]:
    """Yield the legal (KV heads, query heads) up to those of ``shape``; the full counts are always legal.

    Only the kinds of ``units`` may go: without ``kv_group`` all groups stay, without ``query_head`` all
    query heads of a group that stays.
    """
    full_groups, full_queries = shape.num_key_value_heads, shape.queries_per_group
    for kv_heads in range(full_groups, 0 if "kv_group" in units else full_groups - 1, -1):
        for per_group in range(full_queries, 0 if "query_head" in units else full_queries - 1, -1):
            heads = kv_heads * per_group
            unchanged = kv_heads == full_groups and per_group == full_queries
            divides = shape.hidden_size % heads == 0 or not family.heads_divide_hidden
            if unchanged or (divides and constraints.allows_heads(heads, kv_heads)):
                yield kv_heads, heads


def legal_widths(shape: Shape, constraints: Constraints, units: Collection[str] = UNITS) -> list[int]:
    """Return the legal FFN widths up to that of ``shape``, ascending; the full width is always legal."""
    step = constraints.ffn_multiple
    narrower = range(step, shape.intermediate_size, step) if "ffn_channel" in units else ()
    return [*narrower, shape.intermediate_size]


def with_widths(
    shape: Shape, kv_heads: int, heads: int, ffn: int, num_hidden_layers: int | None = None
) -> Shape:
    """Return ``shape`` with other head counts and FFN width, and as many blocks as before unless given."""
    return replace(
        shape,
        num_key_value_heads=kv_heads,
        num_attention_heads=heads,
        intermediate_size=ffn,
        num_hidden_layers=num_hidden_layers or shape.num_hidden_layers,
    )
