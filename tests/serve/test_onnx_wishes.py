"""What a request may wish of onnxruntime-genai, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.api.errors import ApiError
from serve.api.requests import CHAT, COMPLETIONS, read
from serve.onnx_server.wishes import Wish, read_wish

VOCAB_SIZE = 387
REFUSED = {
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "n": 2,
    "best_of": 2,
    "echo": True,
    "logprobs": 0,
    "logit_bias": {"1": 5},
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
    "top_k": 1.5,
    "repetition_penalty": 0,
    "topk": 5,
}
NOTHING = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "user": "x",
}


def wish(**fields: Any) -> Wish:
    return read_wish(read(COMPLETIONS, json.dumps({"prompt": "a", **fields}).encode()), VOCAB_SIZE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(name: str) -> None:
    with pytest.raises(ApiError, match=name) as caught:
        wish(**{name: REFUSED[name]})
    assert (caught.value.status, caught.value.param) == (400, name)


def test_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ApiError, match="did you mean 'repetition_penalty'"):
        wish(repetition_penality=1.1)


def test_fields_that_ask_for_nothing_pass() -> None:
    assert wish(**NOTHING) == wish()


def test_options_are_as_in_openais_interface() -> None:
    plain = wish().search
    assert {name: plain[name] for name in ("do_sample", "temperature", "top_p", "top_k", "random_seed")} == {
        "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "random_seed": -1,
    }  # fmt: skip
    assert wish(temperature=0).search["do_sample"] is False
    assert wish(temperature=0, repetition_penalty=1.5).search["repetition_penalty"] == 1.5
    assert wish(top_k=VOCAB_SIZE + 1).search["top_k"] == wish(top_k=-1).search["top_k"] == 0
    assert wish(seed=2**32 - 1).search["random_seed"] == 2**31 - 1
    assert wish(seed=5).search["random_seed"] == 5


def test_only_completions_have_a_limit_of_their_own() -> None:
    assert wish().max_new_tokens == 16
    assert wish(stop="x", max_tokens=3) == Wish(wish().search, ("x",), 3)
    chat = read(CHAT, b'{"messages": [{"role": "user", "content": "x"}]}')
    assert read_wish(chat, VOCAB_SIZE).max_new_tokens is None
