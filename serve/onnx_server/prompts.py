"""A request's prompts as token ids: BOS once, special tokens once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cusprun.errors import ModelError
from cusprun.records import Message
from serve.api.errors import ApiError, too_long
from serve.api.requests import CHAT, Request
from serve.runtimes.onnx_folder import OnnxFolder

MAX_PROMPTS = 128


@dataclass(frozen=True)
class Prompt:
    """The tokens that the model reads; ``continues`` when the answer goes on in the text of the prompt."""

    token_ids: tuple[int, ...]
    continues: bool


def read_prompts(request: Request, folder: OnnxFolder, context_tokens: int) -> list[Prompt]:
    """Return the prompts of a request, one for a chat.

    A completion gets the tokenizer's own special tokens, such as BOS; a chat those of its template alone.

    Raises:
        ApiError: 400 for a prompt that is empty, too long, or has tokens that the model has not; for a chat
            that the template refuses, that holds more than texts, or without a template.
    """
    if request.route == CHAT:
        prompts = [Prompt(tuple(_chat(request.fields["messages"], folder)), continues=False)]
    else:
        rows = _rows(request.fields["prompt"])
        if len(rows) > MAX_PROMPTS:
            raise ApiError(
                400, f"{len(rows)} prompts in one request; {MAX_PROMPTS} are taken", param="prompt"
            )
        ids = [folder.tokenize(row, True) if isinstance(row, str) else row for row in rows]
        prompts = [Prompt(tuple(row), continues=True) for row in ids]
    for prompt in prompts:
        _check(prompt.token_ids, folder.vocab_size, context_tokens)
    return prompts


def _rows(value: Any) -> list[str] | list[list[int]]:
    if isinstance(value, str):
        return [value]
    if isinstance(value[0], int):
        return [value]
    rows: list[str] | list[list[int]] = value
    return rows


def _check(token_ids: Sequence[int], vocab_size: int, context_tokens: int) -> None:
    if not token_ids:
        raise ApiError(400, "the prompt is empty", param="prompt")
    if len(token_ids) >= context_tokens:
        raise too_long(len(token_ids), context_tokens)
    unknown = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise ApiError(400, f"the model has no token {unknown}; it has {vocab_size}", param="prompt")


def _chat(messages: Sequence[Mapping[str, Any]], folder: OnnxFolder) -> list[int]:
    turns = [Message(message["role"], _text(message)) for message in messages]
    try:
        text = folder.render_chat(turns)
    except ModelError as error:
        raise ApiError(400, str(error), param="messages") from None
    if text is None:
        raise ApiError(400, "the model has no chat template; use /v1/completions", param="messages")
    return folder.tokenize(text, False)


def _text(message: Mapping[str, Any]) -> str:
    """Return a message's content; parts of text are joined."""
    if message.get("tool_calls") or message["role"] in ("tool", "function"):
        raise ApiError(400, "tools are not supported by the ONNX engine", param="messages")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ApiError(400, "the ONNX engine takes messages of texts only", param="messages")
    return "".join(part["text"] for part in parts)
