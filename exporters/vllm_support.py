"""What vLLM takes: models it computes as their config says, ranks that divide them, groups that fill rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import ExportError
from cusprun.families import axis_length
from cusprun.records import Shape
from exporters.rotated_share import rotated_share

GROUP_SIZES = (128, 64, 32)
"""Weights per scale that vLLM's 4-bit kernels know."""

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes of vLLM's attention on CPUs; GPUs take any multiple of 8."""

_DIVIDED_AXES = frozenset({"heads", "ffn"})
"""Input axes that tensor parallelism cuts; the residual stream stays whole on every rank."""

_VOCAB_PADDING = 64  # vLLM pads the vocabulary to a multiple of this before it divides it
_WITHOUT_OUTPUT_BIAS = frozenset({"qwen3"})
"""Families whose output projection has a bias in transformers and none in vLLM, which drops it silently."""


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: its weight's pattern and the axis of its inputs."""

    pattern: str
    in_axis: str

    @property
    def name(self) -> str:
        """The module's name in its block, like ``mlp.down_proj``."""
        return self.pattern.rpartition("{layer}.")[2].removesuffix(".weight")

    @property
    def ignore(self) -> str:
        """The pattern by which compressed-tensors and vLLM leave the module as it is."""
        return r"re:.*\." + self.name.replace(".", r"\.") + "$"


def linears_of(index: CheckpointIndex) -> tuple[Linear, ...]:
    """Return the linear layers that every block has; norms have one axis only."""
    return tuple(
        Linear(pattern, axes[1]) for pattern, axes in index.family.layer_tensors.items() if len(axes) == 2
    )


def refuse_unsupported(index: CheckpointIndex, quant: str) -> None:
    """Raise ``ExportError`` when vLLM would refuse the model or compute something else."""
    where, family, config = index.folder / "config.json", index.family, index.config
    if quant == "float16" and family.overflows_float16:
        raise ExportError(
            f"{where}: hidden states of {family.model_type} pass the largest float16 and vLLM refuses it; "
            "use bfloat16 or float32"
        )
    rotated_share(index)
    activation = config.get(family.activation_key) or family.activation
    if activation != family.activation:
        raise ExportError(
            f"{where}: vLLM runs {family.model_type} with {family.activation} only, not with {activation!r}"
        )
    if family.sliding_window == "flagged" and family.has_sliding_window(config) and not _all_sliding(config):
        raise ExportError(
            f"{where}: vLLM runs {family.model_type} with a sliding window in all blocks or in none; "
            "set use_sliding_window to false if texts stay under the window"
        )
    for name in index.tensors:
        if family.model_type in _WITHOUT_OUTPUT_BIAS and name.endswith("o_proj.bias"):
            raise ExportError(
                f"{where}: vLLM runs {family.model_type} without a bias on o_proj and would drop {name}; "
                "use another runtime"
            )


def _all_sliding(config: Mapping[str, object]) -> bool:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return set(kinds) == {"sliding_attention"}
    return config.get("max_window_layers") == 0


def tensor_parallel_sizes(
    index: CheckpointIndex, group_size: int | None = None, unfilled: tuple[Linear, ...] = ()
) -> tuple[int, ...]:
    """Return the numbers of ranks, up to one per query head, that divide the model's shapes.

    With ``group_size`` each rank's part of a row must also hold whole groups, but for the layers
    ``unfilled``, which are not quantised.
    """
    rows = [
        axis_length(linear.in_axis, index.shape)
        for linear in linears_of(index)
        if group_size and linear.in_axis in _DIVIDED_AXES and linear not in unfilled
    ]
    return tuple(
        ranks
        for ranks in range(1, index.shape.num_attention_heads + 1)
        if _divides(index.shape, ranks) and not any(row % (ranks * (group_size or 1)) for row in rows)
    )


def _divides(shape: Shape, ranks: int) -> bool:
    """vLLM repeats KV heads when ranks outnumber them."""
    kv_heads = shape.num_key_value_heads
    padded = -(-shape.vocab_size // _VOCAB_PADDING) * _VOCAB_PADDING
    return (
        shape.num_attention_heads % ranks == 0
        and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
        and shape.intermediate_size % ranks == 0
        and padded % ranks == 0
    )


def choose_group(index: CheckpointIndex, largest: int, ranks: int) -> tuple[int, tuple[Linear, ...]]:
    """Return the group size, at most ``largest``, that fills the rows of most linear layers on each rank.

    Of several the largest is taken. The second value are the layers whose rows it does not fill.

    Raises:
        ExportError: no group size fills any row.
    """
    linears = linears_of(index)

    def unfilled(size: int) -> tuple[Linear, ...]:
        return tuple(linear for linear in linears if _row(index.shape, linear, ranks) % size)

    size = min(
        (size for size in GROUP_SIZES if size <= largest), key=lambda size: (len(unfilled(size)), -size)
    )
    left = unfilled(size)
    if len(left) == len(linears):
        rows = ", ".join(sorted({str(_row(index.shape, linear, ranks)) for linear in linears}))
        raise ExportError(
            f"{index.folder}: no row length ({rows}) is a multiple of {GROUP_SIZES[-1]}, as 4-bit groups "
            "are; use int8 or fp8, or prune to such widths"
        )
    return size, left


def _row(shape: Shape, linear: Linear, ranks: int) -> int:
    """Return the length of a row on one rank."""
    length = axis_length(linear.in_axis, shape)
    return length // ranks if linear.in_axis in _DIVIDED_AXES else length
