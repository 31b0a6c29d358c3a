"""``tokenizer.json`` from the parts of a GGUF vocabulary, so that it cuts text as llama.cpp does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

_SPACE = "\u2581"  # SentencePiece's visible space
_SPECIAL = (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)


@dataclass(frozen=True)
class Vocabulary:
    """Everything a GGUF says about its tokens; ``types`` are ``gguf.TokenType`` numbers.

    ``merges`` and ``pre`` belong to byte-level vocabularies, ``scores`` to SentencePiece ones.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    merges: tuple[tuple[str, str], ...] = ()
    pre: Any = None
    scores: tuple[float, ...] = ()

    def is_added(self, token: int) -> bool:
        """Say whether the token is matched in text as it stands, before anything else."""
        return self.types[token] in (*_SPECIAL, gguf.TokenType.USER_DEFINED)

    def ids(self) -> dict[str, int]:
        """Return the id of each token."""
        return {text: n for n, text in enumerate(self.tokens)}


def byte_level_tokenizer(words: Vocabulary) -> str:
    """Return ``tokenizer.json`` of a byte-level BPE vocabulary."""
    tokenizer = Tokenizer(
        models.BPE(vocab=words.ids(), merges=list(words.merges), ignore_merges=words.pre.ignore_merges)
    )
    *others, last = words.pre.splits
    splits = [_split(name) for name in (*others, *([last] if last != "gpt2" else []))]
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=last == "gpt2")
    tokenizer.pre_tokenizer = pre.Sequence([*splits, byte_level, *_absent_bytes(words)])
    tokenizer.decoder = decoders.ByteLevel()
    return _complete(tokenizer, words)


def _absent_bytes(words: Vocabulary) -> list[Any]:
    """Cut at bytes that have no token (SmolLM2 lacks some control characters), and drop them.

    tokenizers drops such a byte before merging, so that its neighbours could merge; llama.cpp does after.
    """
    known = set(words.tokens)
    absent = "".join(re.escape(letter) for letter in sorted(pre.ByteLevel.alphabet()) if letter not in known)
    return [pre.Split(Regex(f"[{absent}]"), "removed")] if absent else []


def _split(pattern: str) -> Any:
    if pattern == "digits":
        return pre.Digits(individual_digits=True)
    return pre.Split(Regex(pattern), "isolated")


def sentencepiece_tokenizer(words: Vocabulary) -> str:
    """Return ``tokenizer.json`` of a SentencePiece vocabulary with scores.

    llama.cpp joins the two neighbours whose union has the best score, the leftmost of equals, until none is
    left; what is no token then becomes bytes. As merges: every way to cut a token into two tokens, best score
    first. A prefix space goes before every stretch of text between special tokens, even before a space.

    Two things cannot be said in merges: that of two different unions with equal scores the leftmost goes
    first, and a union whose halves are no tokens. Vocabularies trained by SentencePiece have neither.
    """
    ids = words.ids()
    has_bytes = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[pair for _, _, pair in sorted(_merges(words, ids), key=lambda item: item[:2])],
            unk_token=None if words.unknown_id is None else words.tokens[words.unknown_id],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    replace = normalizers.Replace(" ", _SPACE)
    prefix = [normalizers.Prepend(_SPACE)] if words.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, replace])
    strip = [decoders.Strip(" ", 1, 0)] if words.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _complete(tokenizer, words)


def _merges(words: Vocabulary, ids: dict[str, int]) -> Iterator[tuple[float, int, tuple[str, str]]]:
    for token, text in enumerate(words.tokens):
        for cut in range(1, len(text)):
            if text[:cut] in ids and text[cut:] in ids:
                yield -words.scores[token], token, (text[:cut], text[cut:])


def _complete(tokenizer: Tokenizer, words: Vocabulary) -> str:
    added = [
        AddedToken(text, special=words.types[n] in _SPECIAL, normalized=False)
        for n, text in enumerate(words.tokens)
        if words.is_added(n)
    ]
    tokenizer.add_tokens(added)  # they are in the vocabulary already and keep their ids
    tokenizer.post_processor = _template(words)
    return str(tokenizer.to_str(pretty=True))


def _template(words: Vocabulary) -> processors.TemplateProcessing:
    """Add BOS and EOS as the file says; for a pair of texts to each of them, as transformers does."""
    before = (
        [(words.tokens[words.bos_id], words.bos_id)] if words.add_bos and words.bos_id is not None else []
    )
    after = [(words.tokens[words.eos_id], words.eos_id)] if words.add_eos and words.eos_id is not None else []

    def around(text: str, part: int) -> list[str]:
        return [*(f"{t}:{part}" for t, _ in before), f"${text}:{part}", *(f"{t}:{part}" for t, _ in after)]

    return processors.TemplateProcessing(
        single=around("A", 0), pair=[*around("A", 0), *around("B", 1)], special_tokens=before + after
    )
