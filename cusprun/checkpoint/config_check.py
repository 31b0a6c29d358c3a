"""The values of a config that everything after it relies on, checked once: their types and ranges as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cusprun.errors import ModelError

_LARGEST_INT = (1 << 31) - 1  # what the runtimes' files hold lengths in


@dataclass(frozen=True)
class _Kind:
    """What a value must be: a test, and words for it."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_whole(value) and abs(value) <= _LARGEST_INT


_LENGTH = _Kind(
    lambda value: _is_whole(value) and 0 < value <= _LARGEST_INT, f"a whole number from 1 to {_LARGEST_INT}"
)
_POSITIVE = _Kind(lambda value: _is_number(value) and value > 0, "a number above 0")
_NOT_NEGATIVE = _Kind(lambda value: _is_number(value) and value >= 0, "a number from 0 up")
_ID = _Kind(_is_id, "a token id")
_IDS = _Kind(
    lambda value: _is_id(value) or (isinstance(value, list) and all(map(_is_id, value))),
    "a token id or a list of them",
)
_MAPPING = _Kind(lambda value: isinstance(value, Mapping), "a mapping")
_TEXT = _Kind(lambda value: isinstance(value, str), "text")
_TEXTS = _Kind(
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of texts"
)

_KINDS: Mapping[str, _Kind] = {
    "max_position_embeddings": _LENGTH,
    "sliding_window": _LENGTH,
    "rms_norm_eps": _NOT_NEGATIVE,
    "rope_theta": _POSITIVE,
    "rope_local_base_freq": _POSITIVE,
    "query_pre_attn_scalar": _POSITIVE,
    "partial_rotary_factor": _POSITIVE,
    "max_window_layers": _Kind(lambda value: _is_whole(value) and value >= 0, "a whole number from 0 up"),
    "layer_types": _TEXTS,
    "hidden_act": _TEXT,
    "hidden_activation": _TEXT,
    "bos_token_id": _ID,
    "eos_token_id": _IDS,
    "pad_token_id": _ID,
    "rope_parameters": _MAPPING,
    "rope_scaling": _MAPPING,
}
_ROPE_KINDS: Mapping[str, _Kind] = {
    "rope_type": _TEXT,
    "type": _TEXT,
    "original_max_position_embeddings": _POSITIVE,
    "mscale": _NOT_NEGATIVE,
    "mscale_all_dim": _NOT_NEGATIVE,
    "truncate": _Kind(lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(
        (
            "rope_theta", "factor", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow",
            "low_freq_factor", "high_freq_factor",
        ),
        _POSITIVE,
    ),
}  # fmt: skip


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check the values that are there and not null, also those of rope settings, one group per kind of block.

    Widths are checked where they are read (``cusprun.families.shape_of``).

    Raises:
        ModelError: a value has another type or lies out of range.
    """
    _check(config, _KINDS, where, "")
    for key in ("rope_parameters", "rope_scaling"):
        settings = config.get(key) or {}
        _check(settings, _ROPE_KINDS, where, f"{key}.")
        for name, inner in settings.items():
            if isinstance(inner, Mapping):
                _check(inner, _ROPE_KINDS, where, f"{key}.{name}.")
    kinds, blocks = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds is not None and len(kinds) != blocks:
        raise ModelError(
            f"{where}: layer_types has {len(kinds)} entries for {blocks} blocks; mend the config"
        )


def _check(settings: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str, prefix: str) -> None:
    for key, kind in kinds.items():
        value = settings.get(key)
        if value is not None and not kind.holds(value):
            raise ModelError(
                f"{where}: {prefix}{key} must be {kind.words}, not {value!r:.60}; mend the config"
            )
