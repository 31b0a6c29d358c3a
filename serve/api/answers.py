"""Answers in OpenAI's shapes: whole ones, and the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.events import DONE, event
from serve.api.requests import CHAT, Request


@dataclass(frozen=True)
class Usage:
    """Token counts of a request, over all its prompts; every generated token counts, one that ends it too."""

    num_prompt_tokens: int
    num_completion_tokens: int

    def plain(self) -> dict[str, int]:
        """Return OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
        }


@dataclass(frozen=True)
class Choice:
    """One finished text; ``finish_reason`` is ``stop`` or ``length``."""

    text: str
    finish_reason: str


@dataclass(frozen=True)
class Answer:
    """What all the objects of one answer share; ``created`` is in seconds since 1970."""

    is_chat: bool
    model: str
    identity: str
    created: int
    shows_usage: bool = False

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return a ``chat.completion`` or a ``text_completion``."""
        made = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": made, "usage": usage.plain()}

    def opening(self, index: int) -> bytes:
        """Return the event before the first text of a choice: a chat's role, nothing for completions."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.is_chat else b""

    def piece(self, index: int, text: str) -> bytes:
        """Return the event of one more piece of text."""
        return self._chunk(index, {"content": text} if self.is_chat else text, None)

    def closing(self, index: int, finish_reason: str) -> bytes:
        """Return the event after the last text of a choice."""
        return self._chunk(index, {} if self.is_chat else "", finish_reason)

    def end(self, usage: Usage) -> bytes:
        """Return the end of the stream, with the counts before it when they were asked for."""
        if not self.shows_usage:
            return DONE
        return event({**self._head(self._chunk_kind), "choices": [], "usage": usage.plain()}) + DONE

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        end = {"logprobs": None, "finish_reason": choice.finish_reason}
        if not self.is_chat:
            return {"index": index, "text": choice.text, **end}
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, **end}

    def _chunk(self, index: int, content: Mapping[str, str] | str, finish_reason: str | None) -> bytes:
        key = "delta" if self.is_chat else "text"
        choice = {"index": index, key: content, "logprobs": None, "finish_reason": finish_reason}
        counts = {"usage": None} if self.shows_usage else {}
        return event({**self._head(self._chunk_kind), "choices": [choice], **counts})


def answer_to(request: Request, model: str) -> Answer:
    """Return the answer to a request, with an id of its own, made at this moment."""
    is_chat = request.route == CHAT
    identity = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    return Answer(is_chat, model, identity, int(time.time()), request.is_stream and request.wants_usage)
