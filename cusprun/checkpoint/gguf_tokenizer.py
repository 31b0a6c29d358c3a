"""The tokenizer of a GGUF file: vocabulary, token types, special tokens, BOS and EOS, chat templates.

The aim is llama.cpp's behaviour on the file, id for id: that is the tokenizer that users of the file have.
What cannot be carried over:

- Code points that Unicode 16 and later assigned are unassigned for llama.cpp and letters, numbers or marks
  for tokenizers, so words may be cut elsewhere around them.
- For every qwen2 folder stock transformers composes the text first (NFC) and cuts words by Qwen's own rules,
  whatever ``tokenizer.json`` says; on text that is composed already the ids are the same.
- Where two special tokens overlap in text, llama.cpp takes the longer and transformers the earlier.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import gguf

from cusprun.checkpoint.gguf_header import GgufFile
from cusprun.checkpoint.gguf_tokenizer_json import Vocabulary, byte_level_tokenizer, sentencepiece_tokenizer
from cusprun.errors import ModelError, UnsupportedModelError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_ROLES = (
    "bos",
    "eos",
    "unknown",
    "padding",
    "seperator",
    "mask",
    "eot",
    "eom",
)  # "seperator" is GGUF's spelling
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class PreTokenizer:
    """One entry of ``gguf_pre_tokenizers.toml``, which explains the fields."""

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


@cache
def pre_tokenizers() -> Mapping[str, PreTokenizer]:
    """Return the pre-tokenizers by the values of ``tokenizer.ggml.pre``."""
    entries = [
        PreTokenizer(names=tuple(entry.pop("names")), splits=tuple(entry.pop("splits")), **entry)
        for entry in _table("gguf_pre_tokenizers.toml").values()
    ]
    return {name: entry for entry in entries for name in entry.names}


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("cusprun.checkpoint").joinpath(name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer ready to be written: ``ids`` holds the special tokens by role (``bos``, ``eos``, ...)."""

    vocabulary: Vocabulary
    tokenizer_json: str
    ids: Mapping[str, int]
    end_ids: tuple[int, ...]
    model_max_length: int
    chat_templates: Mapping[str, str]

    def config_ids(self) -> dict[str, int | None]:
        """Return the token ids that ``config.json`` holds."""
        return {f"{ours}_token_id": self.ids.get(role) for ours, role in _CONFIG_ROLES.items()}

    def write(self, folder: Path) -> None:
        """Write ``tokenizer.json``, its config, the chat templates and ``generation_config.json``."""
        (folder / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", self._tokenizer_config())
        end: Any = self.end_ids[0] if len(self.end_ids) == 1 else list(self.end_ids)
        generation = self.config_ids() | {"eos_token_id": end or None}
        _write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
        for name, template in self.chat_templates.items():
            target = folder / "chat_template.jinja"
            if name:
                target = folder / "additional_chat_templates" / f"{name}.jinja"
                target.parent.mkdir(exist_ok=True)
            target.write_text(template, encoding="utf-8", newline="")

    def _tokenizer_config(self) -> dict[str, Any]:
        words = self.vocabulary
        # Naming a token makes transformers match it in text; only tokens that llama.cpp matches are named.
        named = {
            name: words.tokens[self.ids[role]]
            for role, name in _NAMED.items()
            if role in self.ids and words.is_added(self.ids[role])
        }
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": self.model_max_length,
        }
        # With these keys transformers writes the post-processor anew, which it can for named tokens only.
        if "bos_token" in named or not words.add_bos:
            config["add_bos_token"] = words.add_bos
        if "eos_token" in named or not words.add_eos:
            config["add_eos_token"] = words.add_eos
        return config


_CONFIG_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tokenizer(file: GgufFile, vocab_size: int) -> GgufTokenizer:
    """Build the tokenizer of a file whose embedding has ``vocab_size`` rows.

    Raises:
        ModelError: the vocabulary is missing, malformed or does not fit the embedding.
        UnsupportedModelError: a kind of vocabulary or pre-tokenizer that is not known.
    """
    kind = file.text(f"{_PREFIX}model")
    if kind not in _BUILDERS:
        known = ", ".join(sorted(_BUILDERS))
        raise UnsupportedModelError(
            f"{file.path} has a vocabulary of the kind {kind[:40]!r}, which is not supported "
            f"(supported: {known})"
        )
    tokens = [text or f"[EMPTY_{n}]" for n, text in enumerate(file.array(f"{_PREFIX}tokens", str))]
    if len(tokens) != vocab_size:
        raise ModelError(f"{file.path} has {len(tokens):,} tokens and {vocab_size:,} rows of embedding")
    if len(set(tokens)) != len(tokens):
        raise ModelError(
            f"{file.path} has a token twice in its vocabulary; convert or download the file again"
        )
    vocabulary, ids, end_ids = _BUILDERS[kind][0](file, tokens)
    try:
        tokenizer_json = _BUILDERS[kind][1](vocabulary)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"{file.path}: its vocabulary is inconsistent ({str(error)[:200]})") from None
    context = file.integer(f"{file.text('general.architecture')}.context_length")
    return GgufTokenizer(vocabulary, tokenizer_json, ids, end_ids, context, _chat_templates(file))


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Vocabulary, dict[str, int], tuple[int, ...]]:
    name = file.text(f"{_PREFIX}pre", "default")
    if name not in pre_tokenizers():
        raise UnsupportedModelError(
            f"{file.path} cuts words by the pre-tokenizer {name[:40]!r}, which is not known"
            f"{nearest(name, pre_tokenizers())} (known: {', '.join(sorted(pre_tokenizers()))})"
        )
    pre = pre_tokenizers()[name]
    merges: dict[tuple[str, str], None] = {}
    for merge in file.array(f"{_PREFIX}merges", str):
        left, space, right = merge[1:].partition(" ")  # a space may be the first character
        left = merge[:1] + left
        if not space:
            raise ModelError(
                f"{file.path}: the merge {merge[:40]!r} has no two parts; download the file again"
            )
        merges.setdefault((left, right))
    return _finish(file, tokens, {}, pre.add_bos, merges=tuple(merges), pre=pre)


def _sentencepiece(file: GgufFile, tokens: list[str]) -> tuple[Vocabulary, dict[str, int], tuple[int, ...]]:
    scores = file.array(f"{_PREFIX}scores", (int, float), [0.0] * len(tokens))
    if len(scores) < len(tokens) or any(map(math.isnan, scores)):
        raise ModelError(
            f"{file.path} has {len(scores):,} scores for {len(tokens):,} tokens, or some are NaN"
        )
    defaults = {"bos": 1, "eos": 2, "unknown": 0}
    return _finish(file, tokens, defaults, True, scores=tuple(scores[: len(tokens)]))


_BUILDERS = {
    "gpt2": (_byte_level, byte_level_tokenizer),
    "llama": (_sentencepiece, sentencepiece_tokenizer),
}


def _finish(
    file: GgufFile, tokens: list[str], defaults: dict[str, int], add_bos: bool, **parts: Any
) -> tuple[Vocabulary, dict[str, int], tuple[int, ...]]:
    """Add what both kinds of vocabulary share: token types, special ids, BOS and EOS."""
    ids = dict(defaults)
    for role in (*_ROLES, *_texts()["fill_in_the_middle"]):
        found = file.integer(f"{_PREFIX}{role}_token_id", len(tokens))
        if found < len(tokens):  # llama.cpp too keeps its default where a file names no such token
            ids[role] = found
    ids = {role: token for role, token in ids.items() if token < len(tokens)}
    normal = int(gguf.TokenType.NORMAL)
    types = file.array(f"{_PREFIX}token_type", int, [normal] * len(tokens))[: len(tokens)]
    if len(types) < len(tokens):
        raise ModelError(f"{file.path} has {len(types):,} token types for {len(tokens):,} tokens")
    ends = _apply_known_texts(tokens, types, ids)
    add = {
        role: file.flag(f"{_PREFIX}add_{role}_token", default)
        for role, default in (("bos", add_bos), ("eos", False))
    }
    for role, wanted in add.items():
        if wanted and role not in ids:
            raise ModelError(f"{file.path} asks for a {role.upper()} token and names none; convert it again")
    vocabulary = Vocabulary(
        tokens=tuple(tokens),
        types=tuple(types),
        bos_id=ids.get("bos"),
        eos_id=ids.get("eos"),
        unknown_id=ids.get("unknown"),
        add_bos=add["bos"],
        add_eos=add["eos"],
        add_space_prefix=file.flag(f"{_PREFIX}add_space_prefix", "scores" in parts),
        **parts,
    )
    end_ids = [ids[role] for role in ("eos", "eot", "eom") if role in ids] + ends
    return vocabulary, ids, tuple(dict.fromkeys(end_ids))


@cache
def _texts() -> dict[str, Any]:
    return _table("gguf_token_texts.toml")


def _apply_known_texts(tokens: list[str], types: list[int], ids: Mapping[str, int]) -> list[int]:
    """Make tokens with a known text control tokens, in place; return the ids that end a turn."""
    table = _texts()
    position = {text: n for n, text in enumerate(tokens)}
    ends = [position[text] for text in table["end_of_turn"] if text in position]
    control = ends + [position[text] for text in table["control"] if text in position]
    for role, texts in table["fill_in_the_middle"].items():
        found = [position[text] for text in texts if text in position]
        control += found[:1] if role not in ids else []
    for token in control:
        types[token] = int(gguf.TokenType.CONTROL)
    return ends


def _chat_templates(file: GgufFile) -> dict[str, str]:
    """Return the templates by name, the default one under an empty name."""
    templates = {}
    for key in file.metadata:
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            name = key.removeprefix(_TEMPLATE).removeprefix(".")
            if name and not _SAFE_NAME.fullmatch(name):
                raise ModelError(f"{file.path} has a chat template with the unsafe name {name[:40]!r}")
            templates[name] = file.text(key)
    return templates
