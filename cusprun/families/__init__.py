"""Model families as data: one TOML file each, found by the ``model_type`` of a config.

A family says which tensors a checkpoint has, what each of their axes stands for, which modules the
forward pass is observed at, and what the runtimes call it. Everything else in the package reads these
tables and knows no family by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from cusprun.errors import ModelError, UnsupportedModelError
from cusprun.families.features import unsupported_feature
from cusprun.records import Shape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SLIDING_WINDOWS = ("never", "always", "flagged", "by_layer")


@dataclass(frozen=True)
class Modules:
    """Paths of the stock modules that are observed: ``decoder`` in the model, the others in a block."""

    decoder: str
    attention: str
    attention_output: str
    mlp: str
    mlp_output: str


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint: its full name, the meaning of each axis, whether it may be absent."""

    name: str
    axes: tuple[str, ...]
    optional: bool

    @property
    def is_norm(self) -> bool:
        """Whether it is the weight of a norm, over the hidden size or over each head."""
        return self.name.endswith("norm.weight")


@dataclass(frozen=True)
class GgufLayers:
    """What GGUF leaves unsaid about blocks of two kinds; see ``gemma3_text.toml``."""

    full_attention_every: int
    sliding_rope_theta: float
    wide_query_scale_blocks: int


@dataclass(frozen=True)
class Family:
    """One row of the family table; see ``llama.toml`` for the meaning of each key."""

    model_type: str
    architecture: str
    gguf_architecture: str
    gguf_permutes_rope: bool
    heads_divide_hidden: bool
    modules: Modules
    tensors: Mapping[str, tuple[str, ...]]
    optional_tensors: Mapping[str, tuple[str, ...]]
    layer_tensors: Mapping[str, tuple[str, ...]]
    optional_layer_tensors: Mapping[str, tuple[str, ...]]
    bias_flags: Mapping[str, tuple[str, ...]]
    sliding_window: str
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    norm_offset: float = 0.0
    activation_key: str = "hidden_act"
    activation: str = "silu"
    partial_rotary: bool = False
    overflows_float16: bool = False
    normalises_outputs: bool = False
    length_dependent_rope_types: tuple[str, ...] = ()
    gguf_layers: GgufLayers | None = None

    def setting(self, config: Mapping[str, Any], key: str) -> Any:
        """Return a config's value, or the stock config's default when the config does not state it."""
        return config.get(key, self.config_defaults.get(key))

    def has_sliding_window(self, config: Mapping[str, Any]) -> bool:
        """Tell whether some block sees only the last ``sliding_window`` tokens."""
        if self.sliding_window == "never" or not self.setting(config, "sliding_window"):
            return False
        if self.sliding_window == "always":
            return True
        kinds = config.get("layer_types")
        if self.sliding_window == "flagged":
            if not config.get("use_sliding_window"):
                return False
            if not kinds:
                first = config.get("max_window_layers")
                return not isinstance(first, int) or first < int(config.get("num_hidden_layers") or 0)
        return not kinds or "sliding_attention" in kinds

    def layer_specs(self, layer: int) -> Iterator[TensorSpec]:
        """Yield the tensors of decoder block ``layer``."""
        for table, optional in ((self.layer_tensors, False), (self.optional_layer_tensors, True)):
            for pattern, axes in table.items():
                yield TensorSpec(pattern.replace("{layer}", str(layer)), axes, optional)

    def specs(self, num_hidden_layers: int) -> Iterator[TensorSpec]:
        """Yield every tensor of a checkpoint, embedding first, then block by block."""
        for table, optional in ((self.tensors, False), (self.optional_tensors, True)):
            for name, axes in table.items():
                yield TensorSpec(name, axes, optional)
        for layer in range(num_hidden_layers):
            yield from self.layer_specs(layer)

    def layer_prefix(self, layer: int) -> str:
        """Return the name prefix that the tensors of block ``layer`` share."""
        return f"{self.modules.decoder}.layers.{layer}."

    def embedding_name(self) -> str:
        """Return the name of the token embedding."""
        return f"{self.modules.decoder}.embed_tokens.weight"

    def final_norm_name(self) -> str:
        """Return the name of the last norm."""
        return f"{self.modules.decoder}.norm.weight"


@cache
def families() -> Mapping[str, Family]:
    """Load every family file, keyed by ``model_type``."""
    table = {}
    for entry in sorted(resources.files(__name__).iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            family = _parse(tomllib.loads(entry.read_text(encoding="utf-8")))
            table[family.model_type] = family
    return table


def _parse(data: dict[str, Any]) -> Family:
    tables: dict[str, Any] = {
        key: {name: tuple(axes) for name, axes in data.pop(key).items()}
        for key in ("tensors", "optional_tensors", "layer_tensors", "optional_layer_tensors", "bias_flags")
    }
    layers = data.pop("gguf_layers", None)
    family = Family(
        modules=Modules(**data.pop("modules")),
        gguf_layers=GgufLayers(**layers) if layers else None,
        length_dependent_rope_types=tuple(data.pop("length_dependent_rope_types", ())),
        **tables,
        **data,
    )
    assert family.sliding_window in SLIDING_WINDOWS, family.sliding_window
    return family


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a Hugging Face config.

    Raises:
        UnsupportedModelError: the family is unknown, or the model has a feature that cannot be pruned.
    """
    known = ", ".join(sorted(families()))
    model_type = str(config.get("model_type", ""))
    rope_types = families()[model_type].length_dependent_rope_types if model_type in families() else ()
    reason = unsupported_feature(config, rope_types)
    if reason:
        raise UnsupportedModelError(
            f"{where} ({model_type or 'unknown family'!r}) {reason}; "
            f"use a dense text decoder of one of: {known}"
        )
    if model_type not in families():
        raise UnsupportedModelError(
            f"{where} is of the family {model_type or 'unknown'!r}, which is not supported "
            f"(supported: {known})"
        )
    return families()[model_type]


def shape_of(config: Mapping[str, Any], where: str) -> Shape:
    """Read the widths from a Hugging Face config, with the defaults that the stock configs use.

    Raises:
        ModelError: a width is missing or is not a positive integer.
    """

    family = families().get(str(config.get("model_type")))
    defaults = family.config_defaults if family else {}

    def width(key: str, default: int | None = None) -> int:
        value = config.get(key, defaults.get(key))
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"{where}: {key} must be a positive integer, not {value!r}; mend the config")
        return value

    heads, hidden = width("num_attention_heads"), width("hidden_size")
    tied = config.get("tie_word_embeddings", defaults.get("tie_word_embeddings", False))
    shape = Shape(
        num_hidden_layers=width("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=width("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=width("num_key_value_heads", heads),
        head_dim=width("head_dim", hidden // heads),
        vocab_size=width("vocab_size"),
        tie_word_embeddings=bool(tied),
    )
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ModelError(
            f"{where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {shape.num_key_value_heads}; mend the config"
        )
    return shape


def axis_length(axis: str, shape: Shape) -> int:
    """Return the length of an axis (for a fused axis the sum of its parts)."""
    lengths = {
        "heads": shape.num_attention_heads * shape.head_dim,
        "kv": shape.num_key_value_heads * shape.head_dim,
        "ffn": shape.intermediate_size,
        "hidden": shape.hidden_size,
        "vocab": shape.vocab_size,
        "head_dim": shape.head_dim,
    }
    return sum(lengths[part] for part in axis.split("+"))
