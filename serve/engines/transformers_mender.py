"""What ``transformers serve`` lacks, made good for one request: limits, stops, usage, the end of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from cusprun.errors import ModelError
from serve.api.errors import ApiError, too_long
from serve.api.requests import CHAT, Request
from serve.front.stop_mender import StopMender

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLING = ("top_k", "min_p", "repetition_penalty")
"""Fields that transformers takes in its generation config alone."""

_NO_TOKEN = 2**31 - 1
"""A token that no model says; transformers puts its own end in the place of none."""

_DROPPED = (
    "ignore_eos",
    *_SAMPLING,
    "stream_options",
    "user",
    "store",
    "metadata",
    "service_tier",
    "max_completion_tokens",
)


def prompt_of(request: Request) -> str | None:
    """Return the one text of a completion's prompt; None for several texts and for token ids."""
    prompt = request.fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return prompt if isinstance(prompt, str) else None


def sampling_of(folder: Path) -> Mapping[str, Any]:
    """Return what the folder says about generating: its generation config and the stop tokens."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        try:
            plain = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        kept = _SPECIAL if name == "config.json" else plain
        found.update({key: plain[key] for key in kept if plain.get(key) is not None})
    return found


class PromptCounter:
    """Counts a prompt's tokens as ``transformers serve`` does, with the folder's own tokenizer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, request: Request) -> int:
        """Return the number of tokens; raises ``ApiError`` when the template refuses the messages."""
        if request.route != CHAT:
            return len(self._tokenizer(prompt_of(request))["input_ids"])
        try:
            return len(
                self._tokenizer.apply_chat_template(
                    request.fields["messages"],
                    tools=request.fields.get("tools"),
                    add_generation_prompt=True,
                    return_dict=True,
                )["input_ids"]
            )
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())
            raise ApiError(
                400, f"the chat template refuses the messages ({reason})", param="messages"
            ) from None

    def load(self) -> None:
        """Load the tokenizer, which else the first count does; raises ``ModelError`` when that fails."""
        try:
            _ = self._tokenizer
        except Exception as error:  # transformers raises many types
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelError(f"{self._folder}: its tokenizer cannot be loaded ({reason}); mend it") from None

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)


class TransformersMender(StopMender):
    """Mends one request and its answer.

    Raises:
        ApiError: the prompt leaves no room in the context, or has no tokens.
    """

    def __init__(
        self,
        request: Request,
        engine_model: str,
        counter: PromptCounter,
        context_tokens: int,
        sampling: Mapping[str, Any],
    ) -> None:
        super().__init__(request)
        self._engine_model = engine_model
        self._sampling = sampling
        num_prompt_tokens = counter(request)
        if not num_prompt_tokens:
            raise ApiError(400, "the prompt has no tokens; say something", param="prompt")
        if num_prompt_tokens >= context_tokens:
            raise too_long(num_prompt_tokens, context_tokens)
        room = context_tokens - num_prompt_tokens
        self._max_tokens = min(request.max_new_tokens or room, room)

    def request(self) -> Mapping[str, Any]:
        """Return the fields that transformers knows, with the answer's limit always stated.

        A temperature switches sampling on: transformers 5.24 leaves it off where the folder does not ask.
        """
        fields = {name: value for name, value in self._request.fields.items() if name not in _DROPPED}
        temperature = fields.get("temperature")
        sampling = {} if temperature is None else {"do_sample": temperature > 0}
        sampling |= {name: self._request.fields[name] for name in _SAMPLING if name in self._request.fields}
        if self._request.fields.get("ignore_eos"):
            sampling |= {"eos_token_id": _NO_TOKEN, "pad_token_id": self._sampling.get("pad_token_id", 0)}
        return {
            **fields,
            **({} if self._is_chat else {"prompt": prompt_of(self._request)}),
            **({"stop": list(self._request.stops)} if self._request.stops else {}),
            "model": self._engine_model,
            "max_tokens": self._max_tokens,
            "generation_config": json.dumps({**self._sampling, **sampling}),
        }

    def whole(self, body: bytes) -> bytes:
        """Cut the answer, and give it the name that the client knows."""
        plain = json.loads(super().whole(body))
        plain["model"] = self._request.fields["model"]
        return json.dumps(plain, ensure_ascii=False).encode()

    def _mended(self, plain: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Set the usage apart, in an event of its own and only where it is asked for."""
        usage = plain.pop("usage", None)
        plain["model"] = self._request.fields["model"]
        yield from super()._mended(plain)
        if usage and self._request.wants_usage:
            yield {**plain, "choices": [], "usage": usage}
