"""``config.json`` and ``generation_config.json`` of a vLLM folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from cusprun.checkpoint.files import read_generation_config, stop_ids
from cusprun.checkpoint.index import CheckpointIndex
from cusprun.codec import from_plain
from cusprun.errors import ExportError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_GENERATION_NAME = "generation_config.json"
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FOREIGN_KEYS = ("auto_map", "torch_dtype", "_name_or_path", "quantization_config")
"""Keys that would run code of the folder, are spelt otherwise, or speak of another folder."""

_STATED_KEYS = ("rms_norm_eps", "hidden_act", "max_position_embeddings", "attention_bias", "mlp_bias")
"""Keys whose defaults differ between families, so that a sibling's config states them."""


@dataclass(frozen=True)
class Sibling:
    """One row of ``vllm_siblings.toml``; see there."""

    when: str
    model_type: str
    architecture: str
    without: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    null: tuple[str, ...] = ()
    copy: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


@cache
def _siblings() -> Mapping[str, tuple[Sibling, ...]]:
    text = resources.files("exporters").joinpath("vllm_siblings.toml").read_text(encoding="utf-8")
    return {
        family: tuple(from_plain(Sibling, row, f"vllm_siblings.toml: {family}") for row in rows)
        for family, rows in tomllib.loads(text).items()
    }


def sibling_of(index: CheckpointIndex) -> Sibling | None:
    """Return the family to save the model under when vLLM cannot take it under its own, or None.

    Raises:
        ExportError: no family computes the same with the model's head counts.
    """
    shape, family = index.shape, index.family
    obstacles = {
        "heads_divide_hidden": family.heads_divide_hidden
        and shape.hidden_size % shape.num_attention_heads != 0,
        "square_attention": shape.num_attention_heads * shape.head_dim != shape.hidden_size,
    }
    rows = [row for row in _siblings().get(family.model_type, ()) if obstacles[row.when]]
    for row in rows:
        if not any(index.config.get(key) for key in row.without):
            return row
    if rows or obstacles["heads_divide_hidden"]:
        raise ExportError(
            f"{index.folder / 'config.json'}: stock code of {family.model_type} takes no "
            f"{shape.num_attention_heads} heads of {shape.head_dim} at the hidden size {shape.hidden_size}, "
            "and no other family computes the same; prune to a head count that divides the hidden size"
        )
    return None


def config_of(
    index: CheckpointIndex, sibling: Sibling | None, dtype: str, quantization: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the config: the model's own, with a stock architecture, ``dtype`` and the quantisation."""
    config = {key: value for key, value in index.config.items() if key not in _FOREIGN_KEYS}
    if sibling is not None:
        config = _as_sibling(index, sibling, config)
    else:
        config["architectures"] = [index.family.architecture]
    config["dtype"] = dtype
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    return config


def _as_sibling(index: CheckpointIndex, sibling: Sibling, config: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    own = CONFIG_MAPPING[index.family.model_type]
    stated = {key: getattr(own, key) for key in (*_STATED_KEYS, *_TOKEN_KEYS) if hasattr(own, key)}
    shape = index.shape
    widths = {
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tie_word_embeddings,
    }
    source = {**stated, **{key: value for key, value in config.items() if key not in sibling.drop}, **widths}
    return {
        **source,
        **sibling.set,
        **dict.fromkeys(sibling.null),
        **{key: source.get(origin) for key, origin in sibling.copy.items()},
        **({"pad_token_id": config.get("pad_token_id")} if "pad_token_id" in config else {}),
        "model_type": sibling.model_type,
        "architectures": [sibling.architecture],
    }


def generation_config_of(index: CheckpointIndex) -> dict[str, Any] | None:
    """Return the generation config to write, or None when the folder's own says all stop ids already.

    vLLM stops at the EOS of the tokenizer and the ``eos_token_id`` of this file; those that only
    ``config.json`` names are added here.

    Raises:
        ExportError: the folder's own file cannot be read.
    """
    own = read_generation_config(index.folder)
    wanted = stop_ids(index.config, own, index.shape.vocab_size)
    if own and set(wanted) <= set(_ids(own.get("eos_token_id"))):
        return None
    if not own:
        own = {key: index.config[key] for key in _TOKEN_KEYS if index.config.get(key) is not None}
    if wanted:
        own["eos_token_id"] = wanted[0] if len(wanted) == 1 else wanted
    return own


def write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``generation_config.json``."""
    (folder / _GENERATION_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _ids(value: Any) -> list[int]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
