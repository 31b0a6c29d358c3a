"""A tokenizer read from its files, where it is known what transformers 5 makes of them.

The generic class takes ``tokenizer.json`` as it stands, another one replaces some of its parts; that is all,
when nothing beside the file adds or changes tokens. Whatever is in doubt is left to transformers; a test
holds what is read here against what it does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

SPECIAL_NAMES = ("bos", "eos", "unk", "pad")
"""The special tokens that GGUF has fields for."""

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Class:
    """What a class of transformers puts in place of a file's: parts, settings of the BPE, named tokens."""

    parts: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)


_QWEN2 = _Class(
    parts={
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _QWEN2_WORDS},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
    },
    model={
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    },
    tokens={"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
)
_GENERIC = _Class()
_CLASSES = {
    "PreTrainedTokenizerFast": _GENERIC,
    "TokenizersBackend": _GENERIC,
    "Qwen2Tokenizer": _QWEN2,
    "Qwen2TokenizerFast": _QWEN2,
}
_CLASS_BY_MODEL_TYPE = {"qwen2": _QWEN2, "phi3": _GENERIC, "mistral": None}
"""Model types that have one class whatever their files name; None where it depends on what is installed."""

_HARMLESS = frozenset(
    {
        "tokenizer_class", "backend", "clean_up_tokenization_spaces", "model_input_names", "model_max_length",
        "padding_side", "truncation_side", "chat_template", "add_bos_token", "add_eos_token", "is_local",
        "local_files_only", "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder",
        "errors",
    }
)  # fmt: skip
"""Keys of ``tokenizer_config.json`` that change no token, or that are looked into below."""

_HARMLESS_WHEN_OFF = frozenset({"split_special_tokens", "add_prefix_space"})
_OLD_FILES = ("special_tokens_map.json", "added_tokens.json")
_ADDED_KEYS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class StatedTokenizer:
    """``plain`` is the serialised tokenizer; the rest as in ``LoadedTokenizer``."""

    plain: Mapping[str, Any]
    added_around: tuple[int | None, int | None]
    special_ids: Mapping[str, int]
    chat_templates: Mapping[str, str]


def read_stated(folder: Path, model_type: str) -> StatedTokenizer | None:
    """Read the tokenizer of a folder from its files, or return None where only transformers can tell."""
    if any((folder / name).exists() for name in _OLD_FILES):
        return None
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        own = _class_of(config, model_type)
        if own is None:
            return None
        config = {**own.tokens, **config}
        plain = json.loads((folder / "tokenizer.json").read_bytes())
        if not _is_sound(plain):
            return None
        plain |= {**_normalised(plain), **own.parts}
        plain["model"] |= own.model
        templates = _chat_templates(folder, config)
    except Exception:  # damaged in some way; the tokenizers library raises bare Exception
        return None
    added = {token["content"]: token for token in plain["added_tokens"]}
    if templates is None or not _adds_nothing(config, added):
        return None
    special = {name: config.get(f"{name}_token") for name in SPECIAL_NAMES}
    ids = {name: int(added[text]["id"]) for name, text in special.items() if text is not None}
    around = _around(plain["post_processor"])
    if around is None or not _agrees(config, ids, around):
        return None
    return StatedTokenizer(plain, around, ids, templates)


def _class_of(config: Mapping[str, Any], model_type: str) -> _Class | None:
    """Return what transformers puts in place of the file's parts; None when that is not known."""
    known = all(
        key in _HARMLESS or key.endswith("_token") or (key in _HARMLESS_WHEN_OFF and not value)
        for key, value in config.items()
    )
    stated = _CLASSES.get(str(config.get("tokenizer_class")))
    return _CLASS_BY_MODEL_TYPE.get(model_type, stated) if known and stated else None


def _is_sound(plain: Mapping[str, Any]) -> bool:
    """Tell whether the file is a BPE that loads, and whose added tokens have the ids that they would get."""
    model = plain["model"]
    if model.get("type") != "BPE" or plain.get("padding") or plain.get("truncation"):
        return False
    vocab = model["vocab"]
    following = len(vocab)
    for token in sorted(plain["added_tokens"], key=lambda entry: int(entry["id"])):
        if vocab.get(token["content"], following) != token["id"]:
            return False
        following += token["content"] not in vocab
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    return all(left in vocab and right in vocab and left + right in vocab for left, right in pairs)


def _normalised(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the small parts as the library writes them: files of older versions spell them otherwise."""
    small = {**plain, "added_tokens": [], "model": {**plain["model"], "vocab": {}, "merges": []}}
    written = json.loads(Tokenizer.from_str(json.dumps(small)).to_str())
    parts = {key: written[key] for key in ("normalizer", "pre_tokenizer", "post_processor")}
    kept = {key: plain["model"][key] for key in ("vocab", "merges") if key in plain["model"]}
    return {**parts, "model": {**written["model"], **kept}}


def _adds_nothing(config: Mapping[str, Any], added: Mapping[str, Mapping[str, Any]]) -> bool:
    """Tell whether every token that the config names is one of the file's, with the same flags."""
    named = [value for key, value in config.items() if key.endswith("_token") and not isinstance(value, bool)]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = config.get(key) or []
        if not isinstance(listed, list):
            return False
        named += listed
    if not all(value is None or (isinstance(value, str) and _is_plain(added.get(value))) for value in named):
        return False
    for text_id, token in (config.get("added_tokens_decoder") or {}).items():
        own = added.get(token["content"], {})
        if own.get("id") != int(text_id) or any(own[key] != token.get(key, False) for key in _ADDED_KEYS):
            return False
    return True


def _is_plain(token: Mapping[str, Any] | None) -> bool:
    """Tell whether a token is special and has no other flag, so that naming it as special changes nothing."""
    return token is not None and token["special"] and not any(token[key] for key in _ADDED_KEYS[1:5])


def _around(processor: Mapping[str, Any] | None) -> tuple[int | None, int | None] | None:
    """Return the ids that a post-processor puts before and after a text; None when it does more."""
    steps: Sequence[Mapping[str, Any]] = [processor] if processor else []
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["processors"]
    templates = [step for step in steps if step["type"] != "ByteLevel"]
    if not templates:
        return None, None
    if len(templates) > 1 or templates[0]["type"] != "TemplateProcessing":
        return None
    ids: dict[bool, list[int]] = {False: [], True: []}
    is_after = False
    for piece in templates[0]["single"]:
        if "Sequence" in piece:
            is_after = True
        else:
            ids[is_after] += templates[0]["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    before, after = ids[False], ids[True]
    if not is_after or len(before) > 1 or len(after) > 1:
        return None
    return (before[0] if before else None), (after[0] if after else None)


def _agrees(config: Mapping[str, Any], ids: Mapping[str, int], around: tuple[int | None, int | None]) -> bool:
    """Tell whether the config says the same of BOS and EOS: versions of transformers ask one or the other."""
    for name, found in zip(("bos", "eos"), around, strict=True):
        stated = config.get(f"add_{name}_token")
        if stated is not None and found != (ids.get(name) if stated else None):
            return False
    return True


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the chat templates by name: those in files of their own, else those of the config."""
    files = {"default": folder / "chat_template.jinja"} | {
        path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    if found:
        return found
    stated = config.get("chat_template")
    if isinstance(stated, list):
        return {str(entry["name"]): str(entry["template"]) for entry in stated}
    if stated is None or isinstance(stated, str):
        return {"default": stated} if stated else {}
    return None
