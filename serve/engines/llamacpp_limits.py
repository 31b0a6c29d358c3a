"""Requests that would end llama.cpp's server, or mean something else there, and so end everyone's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from serve.api.requests import Request
from serve.front.proxy import Refusal

MAX_GRAMMAR_CHARACTERS = 65536
MAX_SCHEMA_CHARACTERS = 65536
MAX_GRAMMAR_DEPTH = 512
"""llama.cpp's parsers recurse: 40,000 parentheses or a chain of 10,000 references overflow their stack."""

_WINDOWS = ("repeat_last_n", "dry_penalty_last_n", "speculative.n_max")
"""Numbers of tokens for which llama.cpp sets memory aside: 2^31 would take 8 GB."""

_INTERNAL = (
    "grammar_triggers",
    "grammar_lazy",
    "preserved_tokens",
    "chat_format",
    "chat_parser",
    "parse_tool_calls",
)
"""Fields with which llama.cpp's chat tells its sampler and parser what to do; regular expressions among them
that are deep overflow its stack."""

_SCHEMAS = ("response_format", "json_schema", "tools")


def limits(context_tokens: int) -> tuple[Refusal, ...]:
    """Return the refusals of a server with that context."""
    windows = [
        Refusal(
            name, _is_above(name, context_tokens), f"{name} must be at most the context, {context_tokens}"
        )
        for name in _WINDOWS
    ]
    schemas = [
        Refusal(
            name, _is_large(name), f"a schema in {name} must have at most {MAX_SCHEMA_CHARACTERS} characters"
        )
        for name in _SCHEMAS
    ]
    grammar = Refusal(
        "grammar",
        lambda request: not _is_small_grammar(request.fields.get("grammar", "")),
        f"a grammar must be a text of at most {MAX_GRAMMAR_CHARACTERS} characters with parentheses at most "
        f"{MAX_GRAMMAR_DEPTH} deep",
    )
    internal = [
        Refusal(name, _has(name), f"llama.cpp makes {name} itself; leave it out") for name in _INTERNAL
    ]
    return (*windows, *schemas, *internal, grammar)


def _has(name: str) -> Callable[[Request], bool]:
    return lambda request: name in request.fields


def _is_above(name: str, limit: int) -> Callable[[Request], bool]:
    def applies(request: Request) -> bool:
        value = request.fields.get(name)
        return isinstance(value, int | float) and value > limit

    return applies


def _is_large(name: str) -> Callable[[Request], bool]:
    def applies(request: Request) -> bool:
        value = request.fields.get(name)
        parts = value if isinstance(value, list) else [value]
        return any(len(json.dumps(part, ensure_ascii=False)) > MAX_SCHEMA_CHARACTERS for part in parts)

    return applies


def _is_small_grammar(grammar: Any) -> bool:
    if not isinstance(grammar, str) or len(grammar) > MAX_GRAMMAR_CHARACTERS:
        return False
    depth = 0
    for character in grammar:
        depth += (character == "(") - (character == ")")
        if depth > MAX_GRAMMAR_DEPTH:
            return False
    return True
