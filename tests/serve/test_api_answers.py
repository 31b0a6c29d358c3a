"""Answers in OpenAI's shapes, read with the official client's own types."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.api.answers import Answer, Choice, Usage, answer_to
from serve.api.events import DONE, EventReader
from serve.api.requests import CHAT, COMPLETIONS, read

types = pytest.importorskip("openai.types")
chat_types = pytest.importorskip("openai.types.chat")

USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
COUNTS = Usage(7, 2)


def events(data: bytes) -> list[Any]:
    return [json.loads(text) if text != b"[DONE]" else "[DONE]" for text in EventReader().push(data)]


def head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.identity, "object": kind, "created": answer.created, "model": "m"}


def test_whole_completion() -> None:
    answer = Answer(False, "m", "cmpl-1", 5)
    plain = answer.whole([Choice("a", "stop"), Choice("b", "length")], COUNTS)
    assert plain == {
        **head(answer, "text_completion"),
        "choices": [
            {"index": 0, "text": "a", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "b", "logprobs": None, "finish_reason": "length"},
        ],
        "usage": USAGE,
    }
    types.Completion.model_validate(plain)


def test_whole_chat() -> None:
    answer = Answer(True, "m", "chatcmpl-1", 5)
    plain = answer.whole([Choice("ä", "stop")], COUNTS)
    message = {"role": "assistant", "content": "ä", "refusal": None}
    assert plain == {
        **head(answer, "chat.completion"),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    chat_types.ChatCompletion.model_validate(plain)


@pytest.mark.parametrize("shows_usage", [False, True])
def test_stream_of_a_chat(shows_usage: bool) -> None:
    answer = Answer(True, "m", "chatcmpl-1", 5, shows_usage)
    parts = answer.opening(0), answer.piece(0, "ä\n"), answer.closing(0, "stop"), answer.end(COUNTS)
    *chunks, done = events(b"".join(parts))
    assert done == "[DONE]"
    common = head(answer, "chat.completion.chunk")
    deltas = [({"role": "assistant", "content": ""}, None), ({"content": "ä\n"}, None), ({}, "stop")]
    wanted = [
        {
            **common,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
            **({"usage": None} if shows_usage else {}),
        }
        for delta, reason in deltas
    ]
    if shows_usage:
        wanted.append({**common, "choices": [], "usage": USAGE})
    assert chunks == wanted
    for chunk in chunks:
        chat_types.ChatCompletionChunk.model_validate(chunk)


def test_stream_of_a_completion() -> None:
    answer = Answer(False, "m", "cmpl-1", 5, True)
    assert answer.opening(0) == b""
    *chunks, done = events(answer.piece(1, "x") + answer.closing(1, "length") + answer.end(COUNTS))
    assert done == "[DONE]"
    common = head(answer, "text_completion")
    choice = {"index": 1, "text": "x", "logprobs": None, "finish_reason": None}
    assert chunks == [
        {**common, "choices": [choice], "usage": None},
        {**common, "choices": [{**choice, "text": "", "finish_reason": "length"}], "usage": None},
        {**common, "choices": [], "usage": USAGE},
    ]
    types.Completion.model_validate(chunks[1])  # the type does not know the null before the end


def test_answers_have_ids_of_their_own() -> None:
    chat = read(CHAT, b'{"messages": [{"role": "user", "content": "x"}]}')
    completion = read(
        COMPLETIONS, b'{"prompt": "x", "stream": true, "stream_options": {"include_usage": true}}'
    )
    first, second = answer_to(chat, "m"), answer_to(chat, "m")
    assert first.identity != second.identity
    assert first.identity.startswith("chatcmpl-")
    assert not first.shows_usage
    other = answer_to(completion, "m")
    assert other.identity.startswith("cmpl-")
    assert other.shows_usage
    assert other.end(COUNTS).endswith(DONE)
    plain = read(COMPLETIONS, b'{"prompt": "x", "stream": true}')
    assert answer_to(plain, "m").end(COUNTS) == DONE
