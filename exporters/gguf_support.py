"""What the graphs of llama.cpp compute, which one a model gets, and the models that none can express."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import ExportError

_SAME_ACTIVATION = {"swish": "silu"}
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Graph:
    """One graph of llama.cpp.

    ``rotates_pairs``: rotary embeddings turn adjacent pairs, not halves. ``needs_square_attention``: heads x
    head_dim must be the hidden size. ``has_frequency_factors``: it reads ``rope_freqs.weight``.
    ``has_partial_rotary``: a part of each head may stay unrotated. ``has_windows``: blocks may have a sliding
    window. ``instead`` names a graph that computes the same without the limits of this one.
    """

    architecture: str
    rotates_pairs: bool = False
    has_attention_biases: bool = False
    needs_square_attention: bool = False
    has_frequency_factors: bool = False
    has_partial_rotary: bool = False
    has_windows: bool = False
    instead: str = ""


GRAPHS: Mapping[str, Graph] = {
    graph.architecture: graph
    for graph in (
        Graph("llama", rotates_pairs=True, has_attention_biases=True, has_frequency_factors=True),
        Graph("qwen2", has_attention_biases=True, needs_square_attention=True, instead="llama"),
        Graph("qwen3"),
        Graph("gemma3", has_windows=True),
        Graph("phi3", needs_square_attention=True, has_partial_rotary=True, instead="llama"),
    )
}
"""The graphs that models can be written for, by GGUF's name of the architecture."""


def target_of(index: CheckpointIndex) -> Graph:
    """Return the graph of llama.cpp that computes the model: its family's own, or the one instead of it."""
    own, shape = GRAPHS[index.family.gguf_architecture], index.shape
    square = shape.num_attention_heads * shape.head_dim == shape.hidden_size
    too_wide = own.needs_square_attention and not square
    has_factors = rope_type(rope_settings(index.config)) == "llama3"
    if own.instead and (too_wide or (has_factors and not own.has_frequency_factors)):
        return GRAPHS[own.instead]
    return own


def rope_settings(config: Mapping[str, Any], kind: str = _FULL) -> dict[str, Any]:
    """Return the rope settings of the blocks of one kind, in the layout of transformers 5 or older ones.

    Transformers 5 nests them by kind of block where there are two kinds; before, ``rope_scaling`` was about
    blocks that see everything and ``rope_local_base_freq`` about the others.
    """
    nested = dict(config.get("rope_parameters") or {})
    old = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    if kind == _SLIDING:
        theta = config.get("rope_local_base_freq")
        return {**({} if theta is None else {"rope_theta": theta}), **(nested.get(_SLIDING) or {})}
    current = nested.get(_FULL) or {} if _is_nested(nested) else nested
    return {**old, **(config.get("rope_scaling") or {}), **current}


def _is_nested(settings: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in settings.values())


def rope_type(settings: Mapping[str, Any]) -> str:
    """Return the kind of rope scaling (``default``, ``linear``, ``yarn``, ``llama3``, ...)."""
    return str(settings.get("rope_type", settings.get("type", "default")))


def sliding_blocks(index: CheckpointIndex) -> tuple[bool, ...]:
    """Return for each block whether it has the sliding window, for graphs that have windows; else nothing."""
    layers = index.family.gguf_layers
    if layers is None or not index.family.has_sliding_window(index.config):
        return ()
    kinds = index.config.get("layer_types")
    if kinds:
        return tuple(kind == _SLIDING for kind in kinds)
    every = int(index.config.get("sliding_window_pattern") or layers.full_attention_every)
    return tuple((block + 1) % every != 0 for block in range(index.shape.num_hidden_layers))


def query_scale(index: CheckpointIndex) -> float:
    """Return what queries must be multiplied with so that llama.cpp's own scale gives the model's.

    Stock code divides by the root of ``query_pre_attn_scalar``. llama.cpp divides by the root of head_dim, or
    of hidden size over heads in a model with as many blocks as the 27B one.
    """
    layers, shape = index.family.gguf_layers, index.shape
    scalar = index.family.setting(index.config, "query_pre_attn_scalar")
    if layers is None or not scalar:
        return 1.0
    wide = shape.num_hidden_layers == layers.wide_query_scale_blocks
    implied = shape.hidden_size // shape.num_attention_heads if wide else shape.head_dim
    return math.sqrt(implied / float(scalar))


def refuse_unsupported(index: CheckpointIndex, where: str) -> None:
    """Raise ``ExportError`` when llama.cpp has no graph that computes the model as its config says."""
    family, config = index.family, index.config
    if family.gguf_architecture not in GRAPHS:
        raise ExportError(
            f"{where}: models of the family {family.model_type} cannot be written as GGUF "
            f"(supported graphs: {', '.join(GRAPHS)}); use the Hugging Face folder itself"
        )
    graph = target_of(index)
    if config.get("attention_bias") and not graph.has_attention_biases:
        raise ExportError(
            f"{where}: llama.cpp runs {family.model_type} without attention biases only; "
            "choose another export format"
        )
    activation = config.get(family.activation_key) or family.activation
    if _SAME_ACTIVATION.get(activation, activation) != family.activation:
        raise ExportError(
            f"{where}: llama.cpp runs this family with {family.activation} only, not with {activation!r}; "
            "choose another export format"
        )
    if graph.has_windows:
        _refuse_blocks(index, where)
    else:
        _refuse_window(index, where)


def _refuse_window(index: CheckpointIndex, where: str) -> None:
    """Refuse a window that some text within the model's context would feel."""
    family, config = index.family, index.config
    if not family.has_sliding_window(config):
        return
    window = family.setting(config, "sliding_window")
    if window >= index.stated("max_position_embeddings"):
        return
    setting = "use_sliding_window to false" if config.get("use_sliding_window") else "it to null"
    raise ExportError(
        f"{where}: llama.cpp runs this family without a sliding window (sliding_window = {window}); set "
        f"{setting} if texts stay under {window} tokens"
    )


def _refuse_blocks(index: CheckpointIndex, where: str) -> None:
    """Refuse kinds of blocks that are none of the two, and windows without a width."""
    kinds = index.config.get("layer_types") or ()
    unknown = set(kinds) - {_SLIDING, _FULL}
    if unknown:
        raise ExportError(f"{where}: llama.cpp has no blocks with {sorted(unknown)[0]!r}; mend layer_types")
    if _SLIDING in kinds and not index.family.setting(index.config, "sliding_window"):
        raise ExportError(
            f"{where}: layer_types names sliding windows and sliding_window none; mend the config"
        )


def graph_losses(index: CheckpointIndex) -> Iterator[str]:
    """Say how the file's graph differs from the one that the family's name stands for."""
    own, used = GRAPHS[index.family.gguf_architecture], target_of(index)
    if used is not own:
        yield (
            f"the file says {used.architecture!r}: llama.cpp's {own.architecture!r} takes no other attention "
            f"width than hidden_size and no rope factors, and its {used.architecture!r} computes the same"
        )
    blocks, layers = sliding_blocks(index), index.family.gguf_layers
    if layers is None or not any(blocks):
        return
    every = layers.full_attention_every
    usual = tuple((block + 1) % every != 0 for block in range(len(blocks)))
    if blocks != usual:
        yield (
            f"not just every {every}th block is without a sliding window: versions of llama.cpp that do not "
            "read sliding_window_pattern for this family compute something else"
        )
