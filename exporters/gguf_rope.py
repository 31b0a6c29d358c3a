"""Rotary position embedding of a Hugging Face config, in the terms of llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cusprun.errors import ExportError, require_known
from cusprun.records import Shape

SCALINGS = ("default", "linear", "yarn", "llama3")
_DEFAULT_THETA = 10000.0  # of transformers, when a config states none


@dataclass(frozen=True)
class Rope:
    """What GGUF says about rotary embeddings.

    ``frequency_factors`` (float32, shape ``[head_dim / 2]``) divide the inverse frequencies; ``scaling`` is
    llama.cpp's name (``none``, ``linear``, ``yarn``), ``attention_factor`` what it multiplies its own
    yarn magnitude ``1 + 0.1 ln(factor)`` with.
    """

    theta: float
    scaling: str = "none"
    factor: float = 1.0
    original_context_length: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    frequency_factors: NDArray[np.float32] | None = None


def rope_of(config: Mapping[str, Any], shape: Shape, where: str) -> Rope:
    """Read the rope settings, in the layout of transformers 5 (``rope_parameters``) or older.

    Raises:
        ExportError: a kind of scaling that llama.cpp cannot reproduce, or a setting that is missing.
    """
    settings = dict(config.get("rope_scaling") or {})
    settings.update(config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise ExportError(f"{where}: rope settings that differ between layers cannot be exported to GGUF")
    kind = str(settings.get("rope_type", settings.get("type", "default")))
    require_known(kind, SCALINGS, f"rope scaling in {where}, which GGUF cannot hold:", ExportError)
    if settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise ExportError(f"{where}: partial_rotary_factor other than 1 cannot be exported to GGUF")
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA)
    if kind == "default":
        return Rope(theta)
    factor = _number(settings, "factor", where)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    original = settings.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    if not original:
        raise ExportError(f"{where}: rope scaling needs original_max_position_embeddings; mend the config")
    if kind == "yarn":
        return _yarn(settings, theta, factor, int(original), where)
    return Rope(
        theta,
        frequency_factors=llama3_frequency_factors(settings, theta, shape.head_dim, float(original), where),
    )


def _yarn(settings: Mapping[str, Any], theta: float, factor: float, original: int, where: str) -> Rope:
    if settings.get("truncate") is False:
        raise ExportError(f"{where}: yarn scaling with truncate = false cannot be exported to GGUF")
    magnitude = settings.get("attention_factor")
    if magnitude is None and settings.get("mscale") and settings.get("mscale_all_dim"):
        magnitude = _yarn_magnitude(factor, float(settings["mscale"])) / _yarn_magnitude(
            factor, float(settings["mscale_all_dim"])
        )
    relative = 1.0 if magnitude is None else float(magnitude) / _yarn_magnitude(factor, 1.0)
    return Rope(
        theta, "yarn", factor, original, relative,
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
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * frequency / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def _number(settings: Mapping[str, Any], key: str, where: str) -> float:
    value = settings.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ExportError(f"{where}: the rope setting {key} must be a positive number, not {value!r}")
    return float(value)
