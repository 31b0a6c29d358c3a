"""What a request wishes of the generation, and the refusal of what onnxruntime-genai cannot do."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cusprun.errors import nearest
from serve.api.errors import ApiError
from serve.api.requests import Request
from serve.runtimes.onnx_genai import GREEDY

MIN_TEMPERATURE = 1e-6
"""Below, the likeliest token is taken: logits in float32 divided by less would overflow."""

_TAKEN = frozenset(
    {
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "repetition_penalty",
        "ignore_eos",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
    }
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are not supported, and the values with which they ask for nothing."""


@dataclass(frozen=True)
class Wish:
    """How to generate: search options of onnxruntime-genai, stop texts, the most tokens (None: no limit).

    With ``ignore_eos`` an answer goes on after a token that ends it.
    """

    search: Mapping[str, bool | float]
    stops: tuple[str, ...]
    max_new_tokens: int | None
    ignore_eos: bool = False


def read_wish(request: Request, vocab_size: int) -> Wish:
    """Return what a request wishes.

    Raises:
        ApiError: 400 for a field that is unknown, not supported, or out of its range.
    """
    for name, value in request.fields.items():
        if name in _NEUTRAL:
            if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[name]):
                raise ApiError(400, f"{name} is not supported by the ONNX engine; leave it out", param=name)
        elif name not in _TAKEN:
            near = nearest(name, _TAKEN)
            raise ApiError(
                400, f"there is no field {name[:100]!r} in the ONNX engine{near}", param=name[:100]
            )
    search = _search(request.fields, vocab_size)
    return Wish(search, request.stops, request.max_new_tokens, bool(request.fields.get("ignore_eos")))


def _search(fields: Mapping[str, Any], vocab_size: int) -> Mapping[str, bool | float]:
    """Return the search options; what is not asked for is as in OpenAI's interface, not the folder's."""
    penalty = {"repetition_penalty": _positive(fields, "repetition_penalty", 1.0)}
    top_k = _top_k(fields, vocab_size)
    temperature = float(fields.get("temperature", 1.0))
    if temperature < MIN_TEMPERATURE:
        return {**GREEDY, **penalty}
    sampling: dict[str, bool | float] = {
        "do_sample": True,
        "temperature": temperature,
        "top_p": float(fields.get("top_p", 1.0)),
        "top_k": top_k,
        "random_seed": _seed(fields),
    }
    return {**GREEDY, **sampling, **penalty}


def _seed(fields: Mapping[str, Any]) -> int:
    """Return the seed in the 31 bits that the library takes: seeds 2^31 apart are the same; -1 draws one."""
    return int(fields["seed"]) % 2**31 if "seed" in fields else -1


def _top_k(fields: Mapping[str, Any], vocab_size: int) -> int:
    """Return how many of the likeliest tokens are drawn from; 0: all."""
    value = fields.get("top_k", 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < -1:
        raise ApiError(400, "top_k must be a whole number; 0 and -1 take all tokens", param="top_k")
    return 0 if value == -1 or value >= vocab_size else value


def _positive(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ApiError(400, f"{name} must be a number above 0", param=name)
    return float(value)
