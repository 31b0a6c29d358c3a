"""Targets: what the runtimes that an expert is for accept, and the legal shapes that follow."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from cusprun.errors import UserError, require_known
from cusprun.families import Family, axis_length
from cusprun.records import Shape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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


def block_parameters(family: Family, shape: Shape, present: frozenset[str]) -> int:
    """Count one block's attention and FFN parameters, norms apart; ``present`` names the tensors stored."""
    return sum(
        math.prod(axis_length(axis, shape) for axis in spec.axes)
        for spec in family.layer_specs(0)
        if spec.name in present and spec.axes != ("hidden",)
    )


def legal_head_counts(family: Family, shape: Shape, constraints: Constraints) -> Iterator[tuple[int, int]]:
    """Yield the legal (KV heads, query heads) up to those of ``shape``; the full counts are always legal."""
    for kv_heads in range(shape.num_key_value_heads, 0, -1):
        for per_group in range(shape.queries_per_group, 0, -1):
            heads = kv_heads * per_group
            unchanged = kv_heads == shape.num_key_value_heads and per_group == shape.queries_per_group
            divides = shape.hidden_size % heads == 0 or not family.heads_divide_hidden
            if unchanged or (divides and constraints.allows_heads(heads, kv_heads)):
                yield kv_heads, heads


def with_widths(shape: Shape, kv_heads: int, heads: int, ffn: int) -> Shape:
    """Return ``shape`` with other head counts and FFN width."""
    return replace(shape, num_key_value_heads=kv_heads, num_attention_heads=heads, intermediate_size=ffn)
