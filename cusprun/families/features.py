"""What a config or a tensor name gives away that cannot be pruned: a table of signs and reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Feature:
    """One feature: the config keys that show it, which of their values do, and a reason for a sentence."""

    keys: tuple[str, ...]
    shows: Callable[[Any], bool]
    reason: str


def _is_several(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


_FEATURES = (
    _Feature(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "moe_intermediate_size",
        ),
        _is_several,
        "is a mixture of experts ({key} = {value}), which cannot be pruned",
    ),
    _Feature(
        (
            "attention_sinks",
            "use_attention_sinks",
            "add_attention_sinks",
            "num_attention_sinks",
            "add_swa_attention_sink_bias",
            "add_full_attention_sink_bias",
        ),
        bool,
        "has attention sinks ({key}), which take part in each softmax and cannot be pruned",
    ),
    _Feature(
        ("is_encoder_decoder", "add_cross_attention", "cross_attention_layers"),
        bool,
        "has cross-attention to another sequence ({key}), and only decoders of one text can be pruned",
    ),
    _Feature(
        ("vision_config", "audio_config"),
        bool,
        "has a tower for other inputs than text ({key}): save its text model by itself "
        "(Gemma 3: Gemma3ForCausalLM, model_type gemma3_text) and give that",
    ),
    _Feature(
        ("final_logit_softcapping", "attn_logit_softcapping"),
        bool,
        "caps its logits ({key} = {value}), which the measurements here do not compute",
    ),
    _Feature(
        ("use_bidirectional_attention",),
        bool,
        "lets tokens see later ones ({key}): it gives embeddings, not text",
    ),
)
_LENGTH_DEPENDENT_ROPE_TYPES = ("longrope", "su")

_TENSOR_SIGNS = (
    (".sinks", "is an attention sink, which takes part in each softmax and cannot be pruned"),
    (".experts.", "belongs to a mixture of experts, which cannot be pruned"),
    ("block_sparse_moe", "belongs to a mixture of experts, which cannot be pruned"),
    ("cross_attn", "belongs to cross-attention, and only decoders of one text can be pruned"),
    ("encoder_attn", "belongs to cross-attention, and only decoders of one text can be pruned"),
    ("vision_tower", "belongs to a vision tower; save the text model by itself and give that"),
)


def unsupported_feature(config: Mapping[str, Any], rope_types: Iterable[str] = ()) -> str | None:
    """Return why a model with this config cannot be pruned, as the rest of a sentence about it.

    ``rope_types`` are kinds of rotary embedding that depend on the length of the text in the model's family,
    beyond those that do in every family.
    """
    for feature in _FEATURES:
        for key in feature.keys:
            if feature.shows(config.get(key)):
                return feature.reason.format(key=key, value=config[key])
    refused = {*rope_types, *_LENGTH_DEPENDENT_ROPE_TYPES}
    found = next((kind for kind in _rope_types(config) if kind in refused), None)
    if found:
        return (
            f"has the rotary embedding {found!r}, whose table switches with the length of a text and whose "
            "factors fit one head count only"
        )
    return None


def _rope_types(config: Mapping[str, Any]) -> list[str]:
    """Return every kind of rotary scaling that a config names, in the layout of transformers 5 or older."""
    groups = [config.get("rope_parameters"), config.get("rope_scaling")]
    # A model with blocks of several kinds has one group for each kind.
    groups += [inner for group in groups if isinstance(group, Mapping) for inner in group.values()]
    return [str(group.get("rope_type", group.get("type"))) for group in groups if isinstance(group, Mapping)]


def foreign_tensor_reason(name: str) -> str | None:
    """Return what a tensor that no family knows gives away, as the rest of a sentence about it."""
    return next((reason for sign, reason in _TENSOR_SIGNS if sign in f".{name}"), None)
