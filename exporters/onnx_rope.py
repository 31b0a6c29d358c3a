"""Rotary tables as transformers computes them.

The model builder of onnxruntime-genai writes its own: it ignores linear scaling in llama models, does not
round the band of yarn as transformers does, and takes one scaling for both kinds of Gemma 3 blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cusprun.errors import ExportError, require_known
from exporters.rotated_share import rope_groups

if TYPE_CHECKING:
    import torch

SCALINGS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that do not depend on the length of the text."""

KINDS_OF_BLOCKS = ("full_attention", "sliding_attention")
"""Kinds of blocks with a table each, in the order in which the builder asks for them."""


def check_rope(config: Mapping[str, Any], where: str) -> None:
    """Raise ``ExportError`` for a scaling that a table cannot hold."""
    for settings in rope_groups(config):
        kind = str(settings.get("rope_type", settings.get("type", "default")))
        require_known(
            kind, SCALINGS, f"rope scaling in {where}, which an ONNX graph cannot hold:", ExportError
        )


def rotary_tables(config: Any, head_dim: int, context_length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return cosines and sines, float32 ``[context_length, rotary_dim]``, for each kind of block.

    ``config`` is the config object of transformers, untouched. A model with blocks of one kind has one pair.
    """
    if "rope_type" in config.rope_parameters:
        return [_table(config, None, config.rope_parameters, head_dim, context_length)]
    return [
        _table(config, kind, config.rope_parameters[kind], head_dim, context_length)
        for kind in KINDS_OF_BLOCKS
    ]


def flat_settings(config: Any) -> dict[str, Any]:
    """Return rope settings that the builder can read; all it takes from them is superseded by our tables."""
    settings = config.rope_parameters
    chosen = settings if "rope_type" in settings else settings[KINDS_OF_BLOCKS[0]]
    kept = {key: chosen[key] for key in ("rope_theta", "partial_rotary_factor") if key in chosen}
    return {"rope_type": "default", **kept}


def _table(
    config: Any, kind: str | None, settings: Mapping[str, Any], head_dim: int, context_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if settings["rope_type"] == "default":
        dim = int(head_dim * settings.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        frequencies, magnitude = 1.0 / settings["rope_theta"] ** exponents, 1.0
    else:
        initialise = ROPE_INIT_FUNCTIONS[settings["rope_type"]]
        frequencies, magnitude = initialise(config, torch.device("cpu"), layer_type=kind)
    angles = torch.outer(torch.arange(context_length).float(), frequencies.float())
    both_halves = torch.cat((angles, angles), dim=-1)
    return both_halves.cos() * magnitude, both_halves.sin() * magnitude
