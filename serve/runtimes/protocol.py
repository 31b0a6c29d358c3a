"""What every runtime can do, whatever runs the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cusprun.records import Message


@dataclass(frozen=True)
class SpecialIds:
    """Special tokens as the runtime sees them; ``stop`` are the ids that end generation."""

    bos: int | None
    eos: int | None
    stop: tuple[int, ...]


@dataclass(frozen=True)
class TopLogProbs:
    """The likeliest next tokens after each token of a text, from a runtime that gives no whole logits.

    ``ids`` int64 and ``log_probs`` float32 ``[tokens, k]``, likeliest first, in nats; ``next_log_probs``
    float32 ``[tokens - 1]`` are those of the tokens that come next in the text, among the ``k`` or not.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    next_log_probs: NDArray[np.float32]


class Runtime(Protocol):
    """A loaded model with its tokenizer."""

    @property
    def name(self) -> str:
        """Name and version of the library that runs the model."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits per token."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the longest text that can be run; ``None`` where the model's own length is the limit."""
        ...

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        """Return the token ids of ``text``; special tokens in the text are recognised.

        With ``add_special`` the model's own BOS and EOS are added, as far as it wants them.
        """
        ...

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each token, float32 ``[tokens, vocab_size]``."""
        ...

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the greedy continuation, token by token; ends before the first stop token."""
        ...

    def render_chat(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt text of a chat, generation prompt included; ``None`` without a template.

        Raises:
            ModelError: the template refuses the messages or is broken.
        """
        ...

    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that the runtime feeds the model for a chat; empty without a template."""
        ...

    @property
    def special_ids(self) -> SpecialIds:
        """Special tokens as the runtime sees them."""
        ...

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts of the tokens that are recognised as special inside a text."""
        ...

    def close(self) -> None:
        """Free the model; the runtime cannot be used afterwards."""
        ...
