"""Prompts of about a wanted length, drawn from a seed; none is sent twice where there is text enough."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from cusprun.errors import CorpusError

CutText = Callable[[str, int], str]
"""Returns the beginning of a text that has so many tokens, or all of it."""

WORDS_PER_TOKEN = 5 / 6
"""Of plain English, where the tokenizer is not known: those of SmolLM2 and Gemma 3 give 0.83 and 0.85."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Prompts(Protocol):
    """Where prompts come from."""

    def draw(self, count: int, key: str) -> list[str]:
        """Return the prompts of the run that ``key`` names; the same key gives the same ones."""
        ...


class TextPrompts:
    """Prompts of sentences that are drawn from texts.

    Sentences in a new order for each prompt, not passages: two prompts with the same beginning would let an
    endpoint that keeps prefixes compute less. ``cut`` makes the length exact; without it a token is taken for
    five sixths of a word.

    Raises:
        CorpusError: the texts hold no sentence.
    """

    def __init__(self, texts: Sequence[str], num_tokens: int, seed: int, cut: CutText | None = None) -> None:
        self._sentences = [
            sentence for text in texts for sentence in _SENTENCE_END.split(text.strip()) if sentence
        ]
        if not self._sentences:
            raise CorpusError("there is no text to make prompts of; give some with --prompts")
        self._num_tokens = num_tokens
        self._seed = seed
        self._cut = cut

    def draw(self, count: int, key: str) -> list[str]:
        """See :class:`Prompts`."""
        generator = random.Random(f"{self._seed}/{key}/prompts")
        return [self._prompt(generator) for _ in range(count)]

    def _prompt(self, generator: random.Random) -> str:
        # With a tokenizer more words than needed, since each has at least one token.
        wanted = self._num_tokens if self._cut else max(1, round(self._num_tokens * WORDS_PER_TOKEN))
        words: list[str] = []
        while len(words) < wanted:
            words += generator.choice(self._sentences).split()
        text = " ".join(words[:wanted])
        return text if self._cut is None else self._cut(text, self._num_tokens)


class GivenPrompts:
    """Prompts that a user gave, in an order drawn for each run; repeated where they do not suffice.

    Raises:
        CorpusError: there is none.
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        if not prompts:
            raise CorpusError("the file of prompts holds none; write one object with a text a line")
        self._prompts = tuple(prompts)
        self._seed = seed

    def draw(self, count: int, key: str) -> list[str]:
        """See :class:`Prompts`."""
        generator = random.Random(f"{self._seed}/{key}/prompts")
        drawn: list[str] = []
        while len(drawn) < count:
            drawn += generator.sample(self._prompts, len(self._prompts))
        return drawn[:count]
