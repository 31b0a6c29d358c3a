"""A tokenizer as transformers really runs it, opened up.

The serialised form of the loaded tokenizer is read, not the file in the folder: transformers 5 rebuilds
some tokenizers (LlamaTokenizer among them) with another normalizer than their tokenizer.json states. Where it
takes tokenizer.json as it stands, so does ``gguf_tokenizer_file``.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from cusprun.checkpoint.files import TOKENIZER_FILES, read_generation_config, stop_ids
from cusprun.checkpoint.gguf_tokenizer import pre_tokenizers
from cusprun.errors import ExportError, reason_of
from exporters.gguf_tokenizer_file import SPECIAL_NAMES, StatedTokenizer, read_stated

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LOADABLE = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})


def _flatten(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for child in step[children] for inner in _flatten(child, children)]
    return [step]


@dataclass(frozen=True)
class LoadedTokenizer:
    """The parts of a tokenizer as its library serialises them, and what stands in the files beside it.

    ``added_around`` are the ids that it puts before and after a text, ``special_ids`` the named tokens
    (``bos``, ``eos``, ``unk``, ``pad``), ``templates`` the chat templates by name, a lone one ``default``.
    """

    folder: Path
    model: Mapping[str, Any]
    added: tuple[Mapping[str, Any], ...]
    normalizers: tuple[Mapping[str, Any], ...]
    pre_tokenizers: tuple[Mapping[str, Any], ...]
    added_around: tuple[int | None, int | None]
    special_ids: Mapping[str, int]
    templates: Mapping[str, str]
    generation_config: Mapping[str, Any]

    @cached_property
    def hf(self) -> Any:
        """The tokenizer object of transformers, loaded when it is asked for."""
        return _load(self.folder)

    def special_id(self, name: str) -> int | None:
        """Return the id of the special token ``name`` (``bos``, ``eos``, ``unk``, ``pad``)."""
        return self.special_ids.get(name)

    def chat_templates(self) -> dict[str, str]:
        """Return the chat templates by name; a lone one is called ``default``."""
        return dict(self.templates)

    def token_texts(self) -> dict[int, str]:
        """Return id to text, added tokens included."""
        vocab = self.model["vocab"]
        texts = (
            {token_id: text for text, token_id in vocab.items()}
            if isinstance(vocab, dict)
            else {token_id: text for token_id, (text, _) in enumerate(vocab)}
        )
        texts.update((token["id"], token["content"]) for token in self.added)
        return texts

    def absent_bytes(self) -> frozenset[str]:
        """Return the letters of byte-level BPE (one for each byte) that have no token."""
        return frozenset(str(letter) for letter in ByteLevel.alphabet() if letter not in self.model["vocab"])

    def drops_absent_bytes(self) -> bool:
        """Return whether bytes without a token are cut out before merging."""
        return any(_drops(step, self.absent_bytes()) for step in self.pre_tokenizers)

    def merges(self) -> list[tuple[str, str]]:
        """Return the merges in order of rank; both spellings of tokenizer.json are read."""
        pairs = (
            merge.split(" ", 1) if isinstance(merge, str) else merge for merge in self.model.get("merges", ())
        )
        return [(left, right) for left, right in pairs]

    def unknown_id(self) -> int | None:
        """Return the id of the unknown token, of the tokenizer or of its model."""
        found = self.special_id("unk")
        return self.model.get("unk_id") if found is None else found

    def stop_ids(self, config: Mapping[str, Any], vocab_size: int) -> list[int]:
        """Return the ids that end generation: the tokenizer's own, then those of both configs."""
        return stop_ids(config, self.generation_config, vocab_size, self.special_id("eos"))

    def is_space_replacement(self, step: Mapping[str, Any]) -> bool:
        """Return whether a normalizer only turns spaces into the space mark or joins runs of them."""
        if step["type"] != "Replace":
            return False
        return bool(step["pattern"] == {"String": " "} and step["content"] == "▁") or _joins_spaces(step)

    def collapses_spaces(self) -> bool:
        """Return whether runs of spaces become one."""
        return any(_joins_spaces(step) for step in self.normalizers)

    def precompiled_charsmap(self) -> bytes:
        """Return SentencePiece's compiled normalisation table, or nothing."""
        maps = [step["precompiled_charsmap"] for step in self.normalizers if step["type"] == "Precompiled"]
        return base64.b64decode(maps[0]) if maps and maps[0] else b""


def _joins_spaces(step: Mapping[str, Any]) -> bool:
    return bool(step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"})


def load_tokenizer(folder: Path, model_type: str = "") -> LoadedTokenizer:
    """Load the tokenizer of a folder, offline and without running code from it.

    Transformers itself is asked only where it may do something else than ``tokenizer.json`` says: importing
    it takes seconds and a quarter of a gigabyte.

    Raises:
        ExportError: the folder holds no tokenizer, or one that transformers cannot load as a fast one.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES if name in _LOADABLE):
        raise ExportError(f"{folder} holds no tokenizer (no {', '.join(sorted(_LOADABLE))}); add its files")
    stated = read_stated(folder, model_type) or _run_transformers(folder)
    return LoadedTokenizer(
        folder=folder,
        model=stated.plain["model"],
        added=tuple(stated.plain["added_tokens"]),
        normalizers=tuple(_flatten(stated.plain["normalizer"], "normalizers")),
        pre_tokenizers=tuple(_flatten(stated.plain["pre_tokenizer"], "pretokenizers")),
        added_around=stated.added_around,
        special_ids=stated.special_ids,
        templates=stated.chat_templates,
        generation_config=read_generation_config(folder),
    )


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = reason_of(error)
        raise ExportError(f"{folder}: the tokenizer cannot be loaded ({reason}); restore its files") from None


def _run_transformers(folder: Path) -> StatedTokenizer:
    hf = _load(folder)
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{folder}: the tokenizer cannot be loaded as a fast one ({type(hf).__name__}); restore its files"
        )
    plain = json.loads(backend.to_str())
    ids = {name: getattr(hf, f"{name}_token_id", None) for name in SPECIAL_NAMES}
    template = getattr(hf, "chat_template", None)
    if isinstance(template, dict):
        templates = {str(name): str(text) for name, text in template.items()}
    else:
        templates = {"default": str(template)} if template else {}
    return StatedTokenizer(
        plain=plain,
        added_around=_tried_around(hf, folder),
        special_ids={name: int(found) for name, found in ids.items() if isinstance(found, int)},
        chat_templates=templates,
    )


def _tried_around(hf: Any, folder: Path) -> tuple[int | None, int | None]:
    """Return the ids that a tokenizer of transformers puts before and after a text, found by trying it."""
    bare = list(hf("a", add_special_tokens=False)["input_ids"])
    full = list(hf("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            before, after = full[:start], full[start + len(bare) :]
            if len(before) <= 1 and len(after) <= 1:
                return (before[0] if before else None), (after[0] if after else None)
    raise ExportError(
        f"{folder}: the tokenizer turns a text of {len(bare)} tokens into {full}; GGUF can only say "
        "that one token is added before and one after"
    )


@cache
def pretokenizer_table() -> tuple[tuple[str, bool, tuple[str, ...]], ...]:
    """Return ``(llama.cpp's name, ignore_merges, steps)`` in order of preference.

    Published models write some of llama.cpp's patterns another way, so their spellings stand in a table of
    this package; those that GGUF import writes follow from the table of the import.
    """
    text = resources.files("exporters").joinpath("gguf_pretokenizers.toml").read_text(encoding="utf-8")
    published = [
        (entry["id"], entry.get("ignore_merges", False), tuple(entry["steps"]))
        for entry in tomllib.loads(text)["pretokenizer"]
    ]
    imported = [
        (entry.names[0], entry.ignore_merges, _import_steps(entry.splits))
        for entry in pre_tokenizers().values()
    ]
    return tuple(dict.fromkeys([*published, *imported]))


def _import_steps(splits: tuple[str, ...]) -> tuple[str, ...]:
    """Name the steps of the tokenizer that GGUF import writes for these splits."""
    *others, last = splits
    named = [name if name == "digits" else f"split:{name}" for name in others]
    return (*named, "words") if last == "gpt2" else (*named, f"split:{last}", "bytes")


def pretokenizer_of(tokenizer: LoadedTokenizer) -> tuple[str, bool]:
    """Return llama.cpp's name for the splitting of a byte-level BPE, and whether ``ignore_merges`` agrees.

    Raises:
        ExportError: the splitting is none that llama.cpp knows.
    """
    kept = [step for step in tokenizer.pre_tokenizers if not _drops(step, tokenizer.absent_bytes())]
    steps = tuple(_step_name(tokenizer, step) for step in kept)
    ignore_merges = bool(tokenizer.model.get("ignore_merges"))
    matching = [(name, ignores) for name, ignores, known in pretokenizer_table() if known == steps]
    for name, ignores in matching:
        if ignores == ignore_merges:
            return name, True
    if matching:
        return matching[0][0], False
    raise ExportError(
        f"{tokenizer.folder}: the tokenizer splits text in a way that llama.cpp has no name for "
        f"({' then '.join(steps)}); export to another format"
    )


def _drops(step: Mapping[str, Any], absent: frozenset[str]) -> bool:
    """Return whether a step only removes bytes that have no token, as llama.cpp does by itself."""
    if step["type"] != "Split" or step["behavior"] != "Removed" or step.get("invert"):
        return False
    pattern = str(step["pattern"].get("Regex", ""))
    return pattern[:1] == "[" and pattern[-1:] == "]" and set(pattern[1:-1]) - {"\\"} == absent


def _step_name(tokenizer: LoadedTokenizer, step: Mapping[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            raise ExportError(
                f"{tokenizer.folder}: the tokenizer puts a space before every text (add_prefix_space), "
                "which llama.cpp's byte-level BPE cannot do"
            )
        return "words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        return f"split:{step['pattern'].get('Regex', step['pattern'].get('String'))}"
    return str(kind)
