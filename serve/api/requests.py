"""What a request may hold: read strictly, every field checked, before an engine sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from serve.api.errors import ApiError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATING = (CHAT, COMPLETIONS)

DEFAULT_COMPLETION_TOKENS = 16
"""Tokens of a completion (a chat has no such limit) unless a request says otherwise, as in OpenAI's API."""

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SEED = 2**32 - 1  # llama.cpp and onnxruntime-genai keep 32 bits and cut the rest off
MAX_PENALTY = 2.0
MAX_TEMPERATURE = 2.0
MAX_TOKEN_ID = 2**31 - 1  # engines keep 32 bits and cut the rest off
MAX_DEPTH = 128

_TOO_DEEP = f"the body is nested more than {MAX_DEPTH} deep"

Check = Callable[[Any], "str | None"]
"""Returns what a value must be when it is not that, else None."""


@dataclass(frozen=True)
class Request:
    """A request that was read: its route, its fields without nulls, and the bytes that say the same."""

    route: str
    fields: Mapping[str, Any]
    body: bytes

    @property
    def is_stream(self) -> bool:
        """Whether the answer is wanted as a stream of events."""
        return self.fields.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with an event that counts the tokens."""
        return bool((self.fields.get("stream_options") or {}).get("include_usage"))

    @property
    def max_new_tokens(self) -> int | None:
        """The limit on the answer's tokens, if there is one; the newer of OpenAI's two names wins."""
        found = self.fields.get("max_completion_tokens", self.fields.get("max_tokens"))
        return None if found is None else int(found)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which the answer ends."""
        found = self.fields.get("stop") or ()
        return (found,) if isinstance(found, str) else tuple(found)


def read(route: str, body: bytes, *, default_model: str | None = None) -> Request:
    """Read and check the JSON of a request, and fill in the model and a completion's ``max_tokens``.

    Raises:
        ApiError: 400 for what is no JSON object, holds NaN, infinities or unpaired surrogates, or has a field
            of a wrong type or range; 404 for another model than ``default_model``.
    """
    plain = _object(body)
    fields = {name: value for name, value in plain.items() if value is not None}
    for name, check in FIELDS.items():
        wanted = check(fields[name]) if name in fields else None
        if wanted:
            raise ApiError(400, f"{name} must be {wanted}", param=name)
    required = {CHAT: "messages", COMPLETIONS: "prompt"}.get(route)
    if required is not None and required not in fields:
        raise ApiError(400, f"{required} is missing", param=required)
    if route == COMPLETIONS and "max_completion_tokens" not in fields:
        fields.setdefault("max_tokens", DEFAULT_COMPLETION_TOKENS)
    if fields.get("stream_options") is not None and fields.get("stream") is not True:
        raise ApiError(400, "stream_options goes with stream: true only", param="stream_options")
    if default_model is not None and fields.setdefault("model", default_model) != default_model:
        raise ApiError(
            404,
            f"the model {fields['model'][:100]!r} is not served here; the one that is: {default_model!r}",
            param="model",
            code="model_not_found",
        )
    return Request(route, fields, encode(fields))


def encode(fields: Mapping[str, Any]) -> bytes:
    """Return a request's fields as JSON bytes; raises ``ApiError`` for what JSON in UTF-8 cannot say."""
    try:
        return json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "a text holds an unpaired surrogate, which no UTF-8 can say") from None
    except ValueError:
        raise ApiError(400, "a number is infinite or not a number") from None


def _object(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ApiError(400, f"a number is {constant}; JSON has none such")

    try:
        plain = json.loads(body.decode(), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (at byte {error.start})") from None
    except RecursionError:
        raise ApiError(400, _TOO_DEEP) from None
    except ValueError as error:
        raise ApiError(400, f"the body is no valid JSON ({error})") from None
    if not isinstance(plain, dict):
        raise ApiError(400, "the body must be a JSON object")
    if _is_deep(plain):
        raise ApiError(400, _TOO_DEEP)
    return plain


def _is_deep(plain: Any) -> bool:
    """Return whether objects and lists are more than ``MAX_DEPTH`` deep, where engines' stacks may end."""
    level = [plain]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _of(kind: type | tuple[type, ...], name: str) -> Check:
    def check(value: Any) -> str | None:
        return None if isinstance(value, kind) else name

    return check


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return None if is_whole and low <= value <= high else f"a whole number from {low} to {high}"

    return check


def _number(low: float, high: float, *, above: bool = False) -> Check:
    def check(value: Any) -> str | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and low <= value <= high and not (above and value == low)
        return None if fits else f"a number {'above' if above else 'from'} {low:g} to {high:g}"

    return check


def _stop(value: Any) -> str | None:
    texts = [value] if isinstance(value, str) else value
    fits = (
        isinstance(texts, list)
        and len(texts) <= MAX_STOPS
        and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARACTERS for text in texts)
    )
    return None if fits else f"a text or at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters"


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= MAX_TOKEN_ID
            for token in value
        )
    )


def _prompt(value: Any) -> str | None:
    texts = isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)
    rows = isinstance(value, list) and bool(value) and all(_is_tokens(part) for part in value)
    fits = isinstance(value, str) or texts or _is_tokens(value) or rows
    return None if fits else "a text, a list of texts, or token ids"


def _messages(value: Any) -> str | None:
    fits = isinstance(value, list) and bool(value) and all(_is_message(message) for message in value)
    return None if fits else "a list of messages, each with a role and a content"


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str | list) or (content is None and "tool_calls" in value)


def _stream_options(value: Any) -> str | None:
    fits = isinstance(value, dict) and all(isinstance(flag, bool) for flag in value.values())
    return None if fits else "an object of true and false values"


_BOOL = _of(bool, "true or false")
FIELDS: Mapping[str, Check] = {
    "model": _of(str, "a text"),
    "messages": _messages,
    "prompt": _prompt,
    "stream": _BOOL,
    "stream_options": _stream_options,
    "max_tokens": _whole(1, 2**31 - 1),
    "max_completion_tokens": _whole(1, 2**31 - 1),
    "n": _whole(1, 128),
    "best_of": _whole(1, 128),
    "temperature": _number(0, MAX_TEMPERATURE),
    "top_p": _number(0, 1, above=True),
    "frequency_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
    "seed": _whole(0, MAX_SEED),
    "stop": _stop,
    "echo": _BOOL,
    "ignore_eos": _BOOL,
    "logit_bias": _of(dict, "an object"),
    "top_logprobs": _whole(0, 20),
    "user": _of(str, "a text"),
    "tools": _of(list, "a list"),
    "response_format": _of(dict, "an object"),
}
"""The fields that are checked; an engine's own fields, such as ``top_k``, pass through to it."""
