"""Rotary position embedding of a Hugging Face config, in the terms of llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import ExportError, require_known
from exporters.gguf_support import rope_settings, rope_type, sliding_blocks, target_of
from exporters.rotated_share import rotated_share

SCALINGS = ("default", "linear", "yarn", "llama3")
_DEFAULT_THETA = 10000.0  # of transformers, when a config states none
_NO_ROTATION = 1e30  # a divisor of frequencies that leaves every angle at zero in float32


@dataclass(frozen=True)
class Rope:
    """What GGUF says about rotary embeddings.

    The first ``dimensions`` of each head are rotated. ``frequency_factors`` (float32, one for each pair of
    features of a head) divide the inverse frequencies; ``scaling`` is llama.cpp's name (``none``, ``linear``,
    ``yarn``), ``attention_factor`` what it multiplies its own yarn magnitude ``1 + 0.1 ln(factor)`` with.
    ``sliding_theta`` belongs to the blocks with a sliding window, which are never scaled.
    """

    theta: float
    dimensions: int
    scaling: str = "none"
    factor: float = 1.0
    original_context_length: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    frequency_factors: NDArray[np.float32] | None = None
    sliding_theta: float | None = None

    @property
    def stated_dimensions(self) -> int:
        """The rotated dimensions as the file says them: all, where factors leave some of them at rest."""
        return self.dimensions if self.frequency_factors is None else 2 * len(self.frequency_factors)


def rope_of(index: CheckpointIndex, where: str) -> Rope:
    """Read the rope settings, in the layout of transformers 5 (``rope_parameters``) or older.

    Raises:
        ExportError: a kind of scaling that llama.cpp cannot reproduce, or a setting that is missing.
    """
    settings, graph = rope_settings(index.config), target_of(index)
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise ExportError(f"{where}: rope settings that differ between layers cannot be exported to GGUF")
    kind = rope_type(settings)
    require_known(kind, SCALINGS, f"rope scaling in {where}, which GGUF cannot hold:", ExportError)
    head_dim = index.shape.head_dim
    dimensions = _rotated_dimensions(index, where)
    theta = _theta(settings, index, where)
    rope = _scaled(settings, Rope(theta, dimensions), index, where)
    if dimensions != head_dim and not graph.has_partial_rotary:
        rope = replace(rope, frequency_factors=partial_frequency_factors(theta, head_dim, dimensions))
    if rope.frequency_factors is not None and not graph.has_frequency_factors:
        raise ExportError(
            f"{where}: llama.cpp's {graph.architecture} has no {kind} rope scaling; choose another format"
        )
    return _with_sliding(rope, index, where)


def _rotated_dimensions(index: CheckpointIndex, where: str) -> int:
    share = rotated_share(index)
    dimensions = int(index.shape.head_dim * share)
    if dimensions < 2 or dimensions % 2 or dimensions > index.shape.head_dim:
        raise ExportError(
            f"{where}: partial_rotary_factor {share} rotates {dimensions} dimensions of a head of "
            f"{index.shape.head_dim}; llama.cpp needs an even number"
        )
    return dimensions


def _theta(settings: Mapping[str, Any], index: CheckpointIndex, where: str) -> float:
    if settings.get("rope_theta"):
        return float(settings["rope_theta"])
    if index.family.gguf_layers is not None:
        raise ExportError(f"{where} states no rope_theta; save the model again with transformers 5")
    return _DEFAULT_THETA


def _scaled(settings: Mapping[str, Any], plain: Rope, index: CheckpointIndex, where: str) -> Rope:
    kind = rope_type(settings)
    if kind == "default":
        return plain
    factor = _number(settings, "factor", where)
    if kind == "linear":
        return replace(plain, scaling="linear", factor=factor)
    original = settings.get("original_max_position_embeddings") or index.stated("max_position_embeddings")
    if kind == "yarn":
        return _yarn(settings, plain, factor, int(original), where)
    factors = llama3_frequency_factors(settings, plain.theta, plain.dimensions, float(original), where)
    return replace(plain, frequency_factors=factors)


def _with_sliding(rope: Rope, index: CheckpointIndex, where: str) -> Rope:
    """Add the table of the blocks with a window; refuse what llama.cpp would apply to them as well."""
    if not any(sliding_blocks(index)):
        return rope
    assert index.family.gguf_layers is not None
    settings = rope_settings(index.config, "sliding_attention")
    if rope_type(settings) != "default":
        raise ExportError(
            f"{where}: blocks with a sliding window scale their rope ({rope_type(settings)}), and "
            "llama.cpp's are never scaled; choose another format"
        )
    if rope.scaling == "yarn":
        raise ExportError(
            f"{where}: llama.cpp applies yarn scaling also to the blocks with a sliding window; choose "
            "another format"
        )
    theta = settings.get("rope_theta") or index.family.gguf_layers.sliding_rope_theta
    return replace(rope, sliding_theta=float(theta))


def _yarn(settings: Mapping[str, Any], plain: Rope, factor: float, original: int, where: str) -> Rope:
    if settings.get("truncate") is False:
        raise ExportError(f"{where}: yarn scaling with truncate = false cannot be exported to GGUF")
    magnitude = settings.get("attention_factor")
    if magnitude is None and settings.get("mscale") and settings.get("mscale_all_dim"):
        magnitude = _yarn_magnitude(factor, float(settings["mscale"])) / _yarn_magnitude(
            factor, float(settings["mscale_all_dim"])
        )
    relative = 1.0 if magnitude is None else float(magnitude) / _yarn_magnitude(factor, 1.0)
    return replace(
        plain, scaling="yarn", factor=factor, original_context_length=original, attention_factor=relative,
        beta_fast=float(settings.get("beta_fast") or 32.0),
        beta_slow=float(settings.get("beta_slow") or 1.0),
    )  # fmt: skip


def _yarn_magnitude(factor: float, mscale: float) -> float:
    """Attention magnitude of YaRN (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def llama3_frequency_factors(
    settings: Mapping[str, Any], theta: float, head_dim: int, original: float, where: str
) -> NDArray[np.float32]:
    """Return the factors by which Llama 3.1 divides each inverse frequency, float32 ``[head_dim / 2]``.

    Short wavelengths keep their frequency, long ones are divided by ``factor``, and between them the
    frequency is interpolated linearly in original context per wavelength.
    """
    factor = _number(settings, "factor", where)
    low, high = _number(settings, "low_freq_factor", where), _number(settings, "high_freq_factor", where)
    turns = original * _frequencies(theta, head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def partial_frequency_factors(theta: float, head_dim: int, dimensions: int) -> NDArray[np.float32]:
    """Return factors that make a graph which rotates whole heads rotate the first ``dimensions`` only.

    float32 ``[head_dim / 2]``, one for each adjacent pair. A pair that is rotated gets the frequency it has
    among ``dimensions`` features instead of ``head_dim``; for the others the angle is practically zero.
    """
    factors = np.full(head_dim // 2, _NO_ROTATION, np.float32)
    rotated = dimensions // 2
    factors[:rotated] = _frequencies(theta, head_dim)[:rotated] / _frequencies(theta, dimensions)
    return factors


def _frequencies(theta: float, dimensions: int) -> NDArray[np.float64]:
    frequencies: NDArray[np.float64] = theta ** -(np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    return frequencies


def _number(settings: Mapping[str, Any], key: str, where: str) -> float:
    value = settings.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ExportError(f"{where}: the rope setting {key} must be a positive number, not {value!r}")
    return float(value)
