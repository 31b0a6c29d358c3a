"""A Hugging Face tokenizer in the terms of GGUF: tokens, types, scores, merges, special ids, template."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from cusprun.errors import ExportError
from exporters.gguf_tokenizer import LoadedTokenizer, load_tokenizer, pretokenizer_of

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL = gguf.TokenType.NORMAL, gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL
_USER, _UNUSED, _BYTE = gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED, gguf.TokenType.BYTE
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_PHI3_KEEPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Special tokens of Phi 3 that leave the space after them alone."""

_UNREACHABLE_SCORE = -1e9  # below every merge rank, so llama.cpp merges into such a token last


@dataclass(frozen=True)
class GgufVocab:
    """All that GGUF stores of a tokenizer; ``losses`` says in words what llama.cpp will do differently.

    ``model`` and ``pre`` are GGUF's names of the algorithm and the pre-tokenizer. ``scores`` are empty for
    byte-level BPE, ``merges`` for all others. ``special_ids`` maps GGUF's names (``bos``, ``eos``, ``eot``,
    ``eom``, ``unk``, ``pad``) to ids. ``chat_templates`` maps template names to Jinja sources.
    ``strips_as_phi3``: the added tokens swallow the space after them as llama.cpp has it for Phi 3 alone.
    """

    model: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    special_ids: Mapping[str, int]
    pre: str = ""
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool = False
    precompiled_charsmap: bytes = b""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    strips_as_phi3: bool = False
    losses: tuple[str, ...] = ()


def read_vocab(folder: Path, vocab_size: int, config: Mapping[str, Any]) -> GgufVocab:
    """Read the tokenizer of ``folder`` for a model whose embedding has ``vocab_size`` rows.

    Raises:
        ExportError: there is no tokenizer, it holds more tokens than the embedding has rows, or it does
            something that llama.cpp cannot reproduce.
    """
    tokenizer = load_tokenizer(folder, str(config.get("model_type", "")))
    strips = _strips_as_phi3(tokenizer)
    losses = list(_added_token_losses(tokenizer, ("rstrip",) if strips else ()))
    tokens = _token_list(tokenizer, vocab_size, losses)
    algorithm = _ALGORITHMS.get(tokenizer.model["type"])
    if algorithm is None:
        raise ExportError(
            f"{folder}: the tokenizer model {tokenizer.model['type']!r} has no GGUF form (known: "
            f"{', '.join(sorted(_ALGORITHMS))}); export to another format"
        )
    fields = algorithm(tokenizer, tokens, losses)
    bos, eos = tokenizer.added_around
    return GgufVocab(
        tokens=tuple(tokens),
        token_types=tuple(_token_types(tokenizer, tokens, fields["model"])),
        add_bos=bos is not None,
        add_eos=eos is not None,
        special_ids=_special_ids(tokenizer, bos, eos, config, vocab_size, losses),
        chat_templates=tokenizer.chat_templates(),
        strips_as_phi3=strips,
        losses=tuple(losses),
        **fields,
    )


def _token_list(tokenizer: LoadedTokenizer, vocab_size: int, losses: list[str]) -> list[str]:
    texts = tokenizer.token_texts()
    if not texts:
        raise ExportError(f"{tokenizer.folder}: the tokenizer holds no tokens; restore its files")
    if max(texts) >= vocab_size:
        raise ExportError(
            f"{tokenizer.folder}: the tokenizer has token ids up to {max(texts)} and the embedding "
            f"{vocab_size} rows; use the tokenizer that belongs to this model"
        )
    missing = vocab_size - len(texts)
    if missing:
        losses.append(
            f"{missing} embedding rows without a token get placeholder names like [PAD{max(texts) + 1}]"
        )
    tokens = [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)]
    if len(set(tokens)) != len(tokens):
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise ExportError(f"{tokenizer.folder}: the token {twice!r} has two ids, which GGUF cannot hold")
    return tokens


def _strips_as_phi3(tokenizer: LoadedTokenizer) -> bool:
    """Return whether all special tokens swallow the space after them but those that Phi 3 excepts."""
    strips = {
        token["content"]: bool(token.get("rstrip")) for token in tokenizer.added if token.get("special")
    }
    wanted = {text: text not in _PHI3_KEEPING for text in strips}
    return strips == wanted and {*_PHI3_KEEPING, "</s>"} <= strips.keys()


def _added_token_losses(tokenizer: LoadedTokenizer, kept: Container[str]) -> Iterator[str]:
    for flag, meaning in (
        ("lstrip", "swallow the space before them"),
        ("rstrip", "swallow the space after them"),
        ("single_word", "match whole words only"),
    ):
        names = [token["content"] for token in tokenizer.added if token.get(flag)]
        if names and flag not in kept:
            yield f"{len(names)} added tokens ({names[0]!r}, ...) {meaning}; llama.cpp matches them literally"


def _token_types(tokenizer: LoadedTokenizer, tokens: list[str], model: str) -> Iterator[int]:
    special = {token["id"]: bool(token.get("special")) for token in tokenizer.added}
    present = tokenizer.token_texts()
    unknown = tokenizer.unknown_id() if model != "gpt2" else None
    byte_fallback = bool(tokenizer.model.get("byte_fallback"))
    for token_id, text in enumerate(tokens):
        if token_id not in present:
            yield _UNUSED
        elif token_id == unknown:
            yield _UNKNOWN
        elif byte_fallback and text in _BYTE_TOKENS:
            yield _BYTE
        elif token_id in special:
            yield _CONTROL if special[token_id] else _USER
        else:
            yield _NORMAL


def _bpe(tokenizer: LoadedTokenizer, tokens: list[str], losses: list[str]) -> dict[str, Any]:
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if tokenizer.model.get(key):
            raise ExportError(f"{tokenizer.folder}: the tokenizer uses {key}, which llama.cpp cannot do")
    if any(step["type"] == "ByteLevel" for step in tokenizer.pre_tokenizers):
        return _byte_level_bpe(tokenizer, losses)
    return _sentencepiece_bpe(tokenizer, tokens, losses)


def _byte_level_bpe(tokenizer: LoadedTokenizer, losses: list[str]) -> dict[str, Any]:
    for step in tokenizer.normalizers:
        if step["type"] != "NFC":
            raise ExportError(
                f"{tokenizer.folder}: the normalizer {step['type']} has no counterpart in llama.cpp"
            )
        losses.append("text is not normalised to NFC by llama.cpp; composed characters tokenise the same")
    merges = tokenizer.merges()
    if not merges:
        raise ExportError(f"{tokenizer.folder}: the tokenizer has no merges, which llama.cpp refuses")
    absent = len(tokenizer.absent_bytes())
    if absent and not tokenizer.drops_absent_bytes():
        losses.append(
            f"{absent} byte values have no token; llama.cpp drops them after merging, the tokenizer before"
        )
    pre, exact = pretokenizer_of(tokenizer)
    if not exact:
        losses.append(
            f"ignore_merges of the tokenizer differs from llama.cpp's {pre!r}; rare words may split"
        )
    return {"model": "gpt2", "pre": pre, "merges": tuple(f"{left} {right}" for left, right in merges)}


def _sentencepiece_bpe(tokenizer: LoadedTokenizer, tokens: list[str], losses: list[str]) -> dict[str, Any]:
    """BPE over ``▁``: llama.cpp merges the pair whose text has the highest score, so a score is minus the
    rank of the first merge that makes the token."""
    prefix = _space_handling(tokenizer, losses, allowed=frozenset({"NFC"}))
    if not tokenizer.model.get("byte_fallback"):
        raise ExportError(
            f"{tokenizer.folder}: the tokenizer is neither byte-level nor has it byte fallback, and "
            "llama.cpp has no such BPE"
        )
    rank: dict[str, int] = {}
    for position, (left, right) in enumerate(tokenizer.merges()):
        rank.setdefault(left + right, position)
    unmade = [
        text
        for text, kind in zip(tokens, _token_types(tokenizer, tokens, "llama"), strict=True)
        if kind == _NORMAL and len(text) > 1 and text not in rank
    ]
    if unmade:
        losses.append(
            f"{len(unmade)} tokens ({unmade[0]!r}, ...) come from no merge; llama.cpp makes them last"
        )
    return {
        "model": "llama",
        "pre": "default",
        "scores": tuple(float(-rank[text]) if text in rank else _UNREACHABLE_SCORE for text in tokens),
        "add_space_prefix": prefix,
    }


def _unigram(tokenizer: LoadedTokenizer, tokens: list[str], losses: list[str]) -> dict[str, Any]:
    if tokenizer.model.get("byte_fallback"):
        raise ExportError(
            f"{tokenizer.folder}: llama.cpp's unigram tokenizer has no byte fallback; choose another format"
        )
    prefix = _space_handling(tokenizer, losses, allowed=frozenset({"Precompiled", "NFC"}))
    scores = {text: float(score) for text, score in tokenizer.model["vocab"]}
    return {
        "model": "t5",
        "pre": "default",
        "scores": tuple(scores.get(text, 0.0) for text in tokens),
        "add_space_prefix": prefix,
        "remove_extra_whitespaces": tokenizer.collapses_spaces(),
        "precompiled_charsmap": tokenizer.precompiled_charsmap(),
    }


def _space_handling(tokenizer: LoadedTokenizer, losses: list[str], allowed: frozenset[str]) -> bool:
    """Return whether a space is put before text; refuses normalizers and splits llama.cpp does not have."""
    prefix = False
    for step in tokenizer.normalizers:
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "NFC" and "NFC" in allowed:
            losses.append("text is not normalised to NFC by llama.cpp; composed characters tokenise the same")
        elif step["type"] not in allowed and not tokenizer.is_space_replacement(step):
            raise ExportError(
                f"{tokenizer.folder}: the normalizer {step['type']} has no counterpart in llama.cpp"
            )
    for step in tokenizer.pre_tokenizers:
        if step["type"] == "Metaspace" and step.get("replacement", _SPACE) == _SPACE:
            scheme = step.get("prepend_scheme", "always")
            prefix = prefix or scheme != "never"
            if scheme == "first":
                losses.append("llama.cpp puts a space before text that follows a special token")
            if scheme != "never":
                losses.append("llama.cpp puts a space also before text that starts with one")
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "}):
            raise ExportError(
                f"{tokenizer.folder}: the pre-tokenizer {step['type']} has no counterpart in llama.cpp"
            )
    return prefix


_ALGORITHMS = {"BPE": _bpe, "Unigram": _unigram}


def _special_ids(
    tokenizer: LoadedTokenizer,
    bos: int | None,
    eos: int | None,
    config: Mapping[str, Any],
    vocab_size: int,
    losses: list[str],
) -> dict[str, int]:
    stops = tokenizer.stop_ids(config, vocab_size)
    if not stops:
        raise ExportError(
            f"{tokenizer.folder} names no eos_token_id, and llama.cpp would take a token of its own choice "
            "for the end; add it to generation_config.json"
        )
    if eos is None:
        eos = tokenizer.special_id("eos")
    if eos is None and stops:
        eos = stops[0]
    if bos is None:
        bos = tokenizer.special_id("bos")
    stated = config.get("bos_token_id")
    if bos is None and isinstance(stated, int) and 0 <= stated < vocab_size:
        bos = stated
    others = [stop for stop in stops if stop != eos]
    if len(others) > 2:
        losses.append(f"{len(others) - 2} of {len(others) + 1} stop tokens have no field in GGUF")
    found = {
        "bos": bos,
        "eos": eos,
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "unk": tokenizer.unknown_id(),
        "pad": tokenizer.special_id("pad"),
    }
    return {name: token_id for name, token_id in found.items() if token_id is not None}
