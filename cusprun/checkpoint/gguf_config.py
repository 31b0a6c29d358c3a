"""Hugging Face configuration from GGUF metadata: sizes, rotary parameters, special token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cusprun.checkpoint.gguf_header import GgufFile
from cusprun.errors import ModelError, UnsupportedModelError
from cusprun.families import Family, GgufLayers, families

ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_DEFAULT_THETA = 10000.0  # of llama.cpp, when the metadata name none
_LLAMA3_CONTEXT = 8192  # original context of Llama 3
_FACTOR_TOLERANCE = 1e-3  # the factors are float32 and come from a float32 computation


def gguf_family(file: GgufFile) -> Family:
    """Return the family whose computation the file's architecture names.

    Several families may share one: the first that takes the file's head count (mistral has llama's graph and
    takes any).

    Raises:
        UnsupportedModelError: another architecture, a mixture of experts, or no language model at all.
    """
    architecture = file.text("general.architecture")
    kind = file.text("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(
            f"{file.path} holds {kind!r}, not a model; give the GGUF of the model itself"
        )
    known = sorted(families().values(), key=lambda family: family.model_type != family.gguf_architecture)
    matching = [family for family in known if family.gguf_architecture == architecture]
    if not matching:
        names = ", ".join(sorted({family.gguf_architecture for family in known}))
        raise UnsupportedModelError(
            f"{file.path} is of the architecture {architecture[:40]!r}, which is not supported "
            f"(supported: {names})"
        )
    experts = file.integer(f"{architecture}.expert_count", 0)
    if experts or any("_exps" in name for name in file.tensors):
        raise UnsupportedModelError(
            f"{file.path} is a mixture of {experts} experts ({architecture!r}), which cannot be pruned; "
            "use a dense model"
        )
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if file.metadata.get(f"{architecture}.{name}"):
            raise UnsupportedModelError(
                f"{file.path} caps its logits ({name}), which the measurements here do not compute"
            )
    if any(name.startswith("rope_factors_") for name in file.tensors):
        raise UnsupportedModelError(
            f"{file.path} has a rotary embedding whose table switches with the length of a text (longrope), "
            "which cannot be carried over; use the variant of the model with the short context"
        )
    if file.metadata.get(f"{architecture}.attention.scale") is not None:
        raise UnsupportedModelError(
            f"{file.path} scales attention by its own factor, which stock {matching[0].architecture} does not"
        )
    heads = file.integer(f"{architecture}.attention.head_count")
    divides = heads and file.integer(f"{architecture}.embedding_length") % heads == 0
    return next((family for family in matching if divides or not family.heads_divide_hidden), matching[0])


def build_config(file: GgufFile, family: Family, dtype: str) -> dict[str, Any]:
    """Return ``config.json`` for the file, without token ids, in the layout of transformers 5.

    Raises:
        ModelError: a size is missing, is not positive, or contradicts the tensors.
        UnsupportedModelError: the stock model class cannot compute what the file describes.
    """
    prefix = family.gguf_architecture
    if _EMBEDDING not in file.tensors or len(file.tensors[_EMBEDDING].shape) != 2:
        raise ModelError(f"{file.path} has no tensor {_EMBEDDING}; download the file again")
    vocab_size, hidden = file.tensors[_EMBEDDING].shape
    layers, heads = file.integer(f"{prefix}.block_count"), file.integer(f"{prefix}.attention.head_count")
    if not 0 < layers <= len(file.tensors):  # also keeps the tables that are built per block small
        raise ModelError(f"{file.path} names {layers:,} blocks and holds {len(file.tensors):,} tensors")
    if file.integer(f"{prefix}.embedding_length") != hidden:
        raise ModelError(f"{file.path}: {prefix}.embedding_length is not the width {hidden} of {_EMBEDDING}")
    if not heads:
        raise ModelError(f"{file.path}: {prefix}.attention.head_count must be positive")
    head_dim, rotated = _head_dims(file, family, hidden, heads)
    if family.heads_divide_hidden and hidden % heads:
        raise UnsupportedModelError(
            f"{file.path} has {heads} heads at a hidden size of {hidden}, and stock {family.architecture} "
            "refuses a size that is no multiple of the heads"
        )
    epsilon = file.number(f"{prefix}.attention.layer_norm_rms_epsilon")
    if not 0 < epsilon < 1:
        raise ModelError(
            f"{file.path}: {prefix}.attention.layer_norm_rms_epsilon is {epsilon}, not in (0, 1)"
        )
    context, rope = file.integer(f"{prefix}.context_length"), rope_parameters(file, prefix, head_dim)
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer(f"{prefix}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        family.activation_key: family.activation,
        "max_position_embeddings": _max_positions(context, rope),
        # Stored as float32, where 1e-5 reads 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_parameters": rope,
        "tie_word_embeddings": _HEAD not in file.tensors,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        **_window(file, family),
        **_layer_kinds(file, family, rope, layers, head_dim, hidden // heads),
    }


def _window(file: GgufFile, family: Family) -> dict[str, Any]:
    """Return the sliding window of families in which every block has one, or none.

    llama.cpp passes over it; the model's own definition does not. Within the window both are the same.
    """
    if family.sliding_window != "always":
        return {}
    return {"sliding_window": file.integer(f"{family.gguf_architecture}.attention.sliding_window", 0) or None}


def _layer_kinds(
    file: GgufFile, family: Family, rope: dict[str, Any], layers: int, head_dim: int, query_share: int
) -> dict[str, Any]:
    """Return what a family with blocks of two kinds has besides: which block is which, and two rotary tables.

    As in llama.cpp: without a window every block sees everything; with one, every n-th block does, and the
    others rotate by an unscaled table of their own.
    """
    kinds = family.gguf_layers
    if kinds is None:
        return {}
    prefix = family.gguf_architecture
    window = file.integer(f"{prefix}.attention.sliding_window", 0)
    theta = file.number(f"{prefix}.rope.freq_base_swa", kinds.sliding_rope_theta)
    if theta <= 1:
        raise ModelError(f"{file.path}: {prefix}.rope.freq_base_swa is {theta}; it must be above 1")
    sliding = _sliding_blocks(file, kinds, layers) if window else [False] * layers
    return {
        # Stock code wants a width also where no block slides.
        "sliding_window": window or file.integer(f"{prefix}.context_length"),
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in sliding],
        "query_pre_attn_scalar": query_share if layers == kinds.wide_query_scale_blocks else head_dim,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


def _sliding_blocks(file: GgufFile, kinds: GgufLayers, layers: int) -> list[bool]:
    """Return which blocks have the window: a pattern is one flag for each block, or the n of every n-th."""
    key = f"{file.text('general.architecture')}.attention.sliding_window_pattern"
    if isinstance(file.metadata.get(key), list):
        flags = file.array(key, bool)
        if len(flags) != layers:
            raise ModelError(f"{file.path}: {key} has {len(flags):,} entries for {layers:,} blocks")
        return flags
    every = file.integer(key, kinds.full_attention_every)
    return [bool(every) and (layer + 1) % every != 0 for layer in range(layers)]


def _head_dims(file: GgufFile, family: Family, hidden: int, heads: int) -> tuple[int, int]:
    """Return the dimensions of a head, and how many of them are rotated."""
    prefix = family.gguf_architecture
    head_dim = file.integer(f"{prefix}.attention.key_length", hidden // heads)
    value_dim = file.integer(f"{prefix}.attention.value_length", head_dim)
    rotary = file.integer(f"{prefix}.rope.dimension_count", head_dim)
    partly = family.partial_rotary and 0 < rotary < head_dim and rotary % 2 == 0
    if head_dim != value_dim or not (rotary == head_dim or partly):
        raise UnsupportedModelError(
            f"{file.path} has keys of {head_dim}, values of {value_dim} and {rotary} rotated dimensions per "
            "head; stock models of this family have one number for all three"
        )
    if head_dim <= 0 or head_dim % 2:
        raise ModelError(
            f"{file.path} has {head_dim} dimensions per head; rotary embeddings need an even number"
        )
    return head_dim, rotary


def _max_positions(context: int, rope: Mapping[str, Any]) -> int:
    """Return the context, or under YaRN the one that the scaling is for: transformers wants them to agree."""
    if rope["rope_type"] != "yarn":
        return context
    original = int(rope["original_max_position_embeddings"])
    return context if context in (original, original * rope["factor"]) else int(original * rope["factor"])


def rope_parameters(file: GgufFile, prefix: str, head_dim: int) -> dict[str, Any]:
    """Return the rotary parameters in the layout of transformers 5 (``rope_parameters``).

    Raises:
        UnsupportedModelError: a kind of scaling that transformers does not compute the same way.
    """
    theta = file.number(f"{prefix}.rope.freq_base", _DEFAULT_THETA)
    if theta <= 1:
        raise ModelError(f"{file.path}: {prefix}.rope.freq_base is {theta}; it must be above 1")
    factor = file.number(f"{prefix}.rope.scaling.factor", file.number(f"{prefix}.rope.scale_linear", 0.0))
    kind = file.text(f"{prefix}.rope.scaling.type", "linear" if factor not in (0, 1) else "none")
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if ROPE_FACTORS in file.tensors:
        if kind != "none" and factor not in (0, 1):
            raise UnsupportedModelError(
                f"{file.path} scales its rotary embedding twice, which cannot be carried over"
            )
        context = file.integer(f"{prefix}.context_length")
        return base | llama3_parameters(_factors(file, head_dim), theta, context, str(file.path))
    if kind == "none" or factor in (0, 1):
        return base
    if factor < 1 or kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{file.path} scales its rotary embedding by {kind[:40]!r} with the factor {factor:g}, "
            "which cannot be carried over (supported: none, linear, yarn, and the factors of Llama 3)"
        )
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    return base | _yarn(file, prefix, factor)


def _yarn(file: GgufFile, prefix: str, factor: float) -> dict[str, Any]:
    scaling = f"{prefix}.rope.scaling."
    ours = {
        "factor", "type", "original_context_length", "finetuned", "attn_factor", "yarn_beta_fast",
        "yarn_beta_slow",
    }  # fmt: skip
    other = [
        key for key in file.metadata if key.startswith(scaling) and key.removeprefix(scaling) not in ours
    ]
    if other:
        raise UnsupportedModelError(
            f"{file.path} sets {other[0]}, which cannot be carried over to transformers"
        )
    attention = file.number(f"{scaling}attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.integer(
            f"{scaling}original_context_length", file.integer(f"{prefix}.context_length")
        ),
        # Both multiply the rotated vectors by 1 + 0.1 ln(factor) (arXiv 2309.00071, section 3.4).
        "attention_factor": attention * (1 + 0.1 * math.log(factor)),
        "beta_fast": file.number(f"{scaling}yarn_beta_fast", 32.0),
        "beta_slow": file.number(f"{scaling}yarn_beta_slow", 1.0),
    }


def _factors(file: GgufFile, head_dim: int) -> npt.NDArray[np.float64]:
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        raise ModelError(
            f"{file.path}: {ROPE_FACTORS} must hold {head_dim // 2} float32 values, one per rotated pair"
        )
    with file.path.open("rb") as stream:
        stream.seek(tensor.offset)
        values = np.frombuffer(stream.read(tensor.num_bytes), "<f4").astype(np.float64)
    if not np.isfinite(values).all() or (values <= 0).any():
        raise ModelError(
            f"{file.path}: {ROPE_FACTORS} holds values that are not positive; download the file again"
        )
    return values


def llama3_factors(theta: float, head_dim: int, parameters: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return the divisors of the ``head_dim / 2`` rotary frequencies under ``rope_type`` llama3.

    With ``f`` the unscaled frequency and ``s`` the share that is kept,
    ``s = (old_context * f / 2 pi - low) / (high - low)`` clipped to [0, 1], the divisor is
    ``1 / (s + (1 - s) / factor)``: one for short waves, ``factor`` for long ones.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = parameters["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / (share + (1 - share) / parameters["factor"]))


def llama3_parameters(
    factors: npt.NDArray[np.float64], theta: float, context: int, where: str
) -> dict[str, Any]:
    """Find the rotary parameters that give these divisors (float64, one per rotated pair).

    The file holds the divisors only. ``factor`` is the largest. Between one and it, the kept share is linear
    in the frequency, so a straight line through those points gives the two borders. The original context
    enters only by its quotients with the two frequency factors; it is taken as 8,192, or as half of
    ``context`` where that is no longer, since transformers wants it below the context.

    Raises:
        UnsupportedModelError: no such parameters reproduce the divisors within 0.1 %.
    """
    if np.allclose(factors, 1, rtol=_FACTOR_TOLERANCE):
        return {"rope_type": "default"}
    if np.allclose(factors, factors[0], rtol=_FACTOR_TOLERANCE) and factors[0] > 1:
        return {"rope_type": "linear", "factor": float(factors[0])}
    original = _LLAMA3_CONTEXT if context > _LLAMA3_CONTEXT else max(1, context // 2)
    borders = [(1 / _LLAMA3_CONTEXT, 4 / _LLAMA3_CONTEXT), *_fitted_borders(factors, theta)]
    for low, high in borders:  # first what Llama 3.1 to 3.3 use
        candidate: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": low * original,
            "high_freq_factor": high * original,
            "original_max_position_embeddings": original,
        }
        found = llama3_factors(theta, 2 * len(factors), candidate)
        if np.allclose(found, factors, rtol=_FACTOR_TOLERANCE):
            return candidate
    raise UnsupportedModelError(
        f"{where} scales its rotary embedding by factors ({ROPE_FACTORS}) that no parameters of transformers "
        "give; start from the model's original Hugging Face folder"
    )


def _fitted_borders(factors: npt.NDArray[np.float64], theta: float) -> list[tuple[float, float]]:
    """Return the two borders, in turns per position, of a line through the divisors in between, if any."""
    factor = factors.max()
    between = (factors > 1 + _FACTOR_TOLERANCE) & (factors < factor * (1 - _FACTOR_TOLERANCE))
    if factor <= 1 or between.sum() < 2:
        return []
    turns = theta ** (-np.arange(len(factors)) / len(factors)) / (2 * np.pi)
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(turns[between], share[between], 1)
    low = -offset / slope if slope > 0 else 0.0
    return [(float(low), float(low + 1 / slope))] if low > 0 else []
