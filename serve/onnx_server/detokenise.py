"""Tokens to text while they come, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What stands in a decoded text for bytes that are no whole character, or not yet."""

CONTEXT_TOKENS = 8


class Detokenizer:
    """The text that tokens add to those before them.

    ``decode`` gives the text of a row of tokens. ``before`` are the tokens that the text goes on from:
    decoders take a space off the beginning of a text, which inside one belongs to it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-CONTEXT_TOKENS:])
        self._shown = decode(self._ids) if self._ids else ""
        if self._shown.endswith(REPLACEMENT):  # the prompt ends inside a character
            self._ids, self._shown = [], ""
        self._num_shown = len(self._ids)

    def push(self, token: int) -> str:
        """Return the text that is whole after one more token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        added = text[len(self._shown) :]
        if added:
            del self._ids[: self._num_shown]
            self._shown = self._decode(self._ids)
        self._num_shown = len(self._ids)
        return added

    def finish(self) -> str:
        """Return what was held back when no more tokens come; an end that is no character is left out."""
        return self._decode(self._ids)[len(self._shown) :].rstrip(REPLACEMENT)
