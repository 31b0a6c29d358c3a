"""Tokenizer files that onnxruntime-genai and Hugging Face tokenizers read alike.

onnxruntime-genai knows splitting by its own regular expressions only, and ignores other steps of a
pre-tokenizer; it fails on texts that are not ASCII where a regular expression is not among them. Most steps
can be written as those expressions without changing what Hugging Face tokenizers do with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.checkpoint.files import read_generation_config, stop_ids, tokenizer_hash
from cusprun.errors import ExportError, reason_of

_SPACE_MARK = "▁"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the step ByteLevel splits by when it is not told otherwise: the pattern of GPT-2."""

_CLASS = "PreTrainedTokenizerFast"
"""A name that transformers and onnxruntime-genai both know and attach no special behaviour to."""

_CLASS_SYNTAX = frozenset("\\^-[]&")  # what would make more of a class than its letters
_KNOWN_STEPS = frozenset({"ByteLevel", "Digits", "Split"})


@dataclass(frozen=True)
class OnnxTokenizer:
    """What is written: the two files, the chat template, the ids, and what onnxruntime-genai will get
    wrong."""

    tokenizer: Mapping[str, Any]
    config: Mapping[str, Any]
    chat_template: str | None
    bos_id: int | None
    stop_ids: tuple[int, ...]
    pad_id: int
    losses: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write the files into ``folder``."""
        for name, value in (("tokenizer.json", self.tokenizer), ("tokenizer_config.json", self.config)):
            text = json.dumps(value, ensure_ascii=False, indent=2 if name.endswith("config.json") else None)
            (folder / name).write_text(text, encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def onnx_tokenizer(
    folder: Path, config: Mapping[str, Any], vocab_size: int, context_length: int
) -> OnnxTokenizer:
    """Read the tokenizer of a folder as transformers runs it, and put it into words that both sides read.

    Raises:
        ExportError: the tokenizer is missing or damaged, of a kind that onnxruntime-genai has not, has no
            token that ends a text, or puts more than BOS before and EOS after it.
    """
    loaded = _load(folder)
    plain = json.loads(loaded.backend_tokenizer.to_str())
    kind = plain["model"]["type"]
    if kind != "BPE":
        raise ExportError(
            f"{folder}: onnxruntime-genai reads no {kind} tokenizer here, only BPE; export to GGUF"
        )
    adds_bos, adds_eos = _added(folder, loaded)
    stops = stop_ids(config, read_generation_config(folder), vocab_size, loaded.eos_token_id)
    if not stops:
        raise ExportError(f"{folder} names no eos_token_id, without which generation never ends; add it")
    if any(step.get("add_prefix_space") for step in _steps(plain["pre_tokenizer"])):
        raise ExportError(
            f"{folder}: onnxruntime-genai cannot put a space before every text (add_prefix_space); "
            "export to GGUF"
        )
    losses = tuple(_losses(plain))
    plain["pre_tokenizer"], plain["decoder"] = _pre_tokenizer(plain), _decoder(plain)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return OnnxTokenizer(
        tokenizer=plain,
        config={
            "tokenizer_class": _CLASS,
            **{name: getattr(loaded, name) for name in names if getattr(loaded, name)},
            "add_bos_token": adds_bos,
            "add_eos_token": adds_eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
        },
        chat_template=_template(loaded),
        bos_id=loaded.bos_token_id,
        stop_ids=tuple(stops),
        pad_id=_pad_id(loaded, stops),
        losses=losses,
    )


def _pad_id(loaded: Any, stops: list[int]) -> int:
    """Return the padding token, or another special one where it also ends a text.

    onnxruntime-genai goes on from the last token of a prompt that is not padding, so a prompt that ends with
    the end of a turn would be continued from before it.
    """
    own = [] if loaded.pad_token_id is None else [loaded.pad_token_id]
    taken = {*stops, loaded.bos_token_id}
    return next(
        (token for token in (*own, *sorted(loaded.added_tokens_decoder)) if token not in taken), stops[0]
    )


def _load(folder: Path) -> Any:
    """Load the tokenizer as transformers runs it: version 5 rebuilds some instead of reading their file."""
    from transformers import AutoTokenizer

    if not tokenizer_hash(folder):
        raise ExportError(
            f"{folder} holds no tokenizer; copy tokenizer.json and tokenizer_config.json of the model into it"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded.backend_tokenizer.to_str()
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = reason_of(error)
        raise ExportError(f"{folder}: the tokenizer cannot be loaded ({reason}); restore its files") from None
    return loaded


def _added(folder: Path, loaded: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer puts BOS before a text and EOS after it, found by trying it."""
    bare = list(loaded("a", add_special_tokens=False)["input_ids"])
    full = list(loaded("a")["input_ids"])
    for before in ([], [loaded.bos_token_id]):
        for after in ([], [loaded.eos_token_id]):
            if full == [*before, *bare, *after]:
                return bool(before), bool(after)
    raise ExportError(
        f"{folder}: the tokenizer turns a text of {len(bare)} tokens into {full}; onnxruntime-genai adds no "
        "more than BOS and EOS"
    )


def _template(loaded: Any) -> str | None:
    """Return the chat template; of several the one called ``default``."""
    template = loaded.chat_template
    if isinstance(template, dict):
        return template.get("default") or next(iter(template.values()), None)
    return template or None


def _pre_tokenizer(plain: Mapping[str, Any]) -> Mapping[str, Any] | None:
    step: Mapping[str, Any] | None = plain["pre_tokenizer"]
    if step is not None:
        return {"type": "Sequence", "pretokenizers": list(_steps(step))}
    if _prepends(plain):
        return None
    # A split that never comes about, since the normalizer leaves no space: onnxruntime-genai takes it as the
    # sign that a text is one piece, and otherwise splits Indic and Thai words
    return _split({"String": " "}, "MergedWithPrevious")


def _decoder(plain: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the decoder, with the step that takes off again the space that the normalizer put before a text:
    from that step onnxruntime-genai concludes that there is one to put."""
    decoder: Mapping[str, Any] | None = plain["decoder"]
    if decoder is None or not _prepends(plain):
        return decoder
    steps = list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]
    if not any(step["type"] == "Strip" for step in steps):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _prepends(plain: Mapping[str, Any]) -> bool:
    return any(normalizer["type"] == "Prepend" for normalizer in _normalizers(plain))


def _normalizers(plain: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    step = plain["normalizer"]
    if step is None:
        return []
    return list(step["normalizers"]) if step["type"] == "Sequence" else [step]


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps in words of ``Split``, without sequences in sequences."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _steps(inner)
    elif step["type"] == "Digits" and step["individual_digits"]:
        yield _split({"Regex": r"\p{N}"}, "Isolated")
    elif step["type"] == "ByteLevel" and step["use_regex"]:
        yield _split({"Regex": _WORDS}, "Isolated")
        yield {**step, "use_regex": False}
    elif letters := _removed_letters(step):
        # a regular expression here would be tried on the text itself; literals end its reading of the steps
        yield from (_split({"String": letter}, "Removed") for letter in letters)
    else:
        yield step


def _removed_letters(step: Mapping[str, Any]) -> str:
    """Return the letters that a step removes, when it says so by a class of single letters."""
    if step["type"] != "Split" or step["behavior"] != "Removed" or step.get("invert"):
        return ""
    pattern = str(step["pattern"].get("Regex", ""))
    letters = pattern[1:-1]
    is_class = pattern.startswith("[") and pattern.endswith("]") and not set(letters) & _CLASS_SYNTAX
    return letters if is_class else ""


def _split(pattern: Mapping[str, str], behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": dict(pattern), "behavior": behavior, "invert": False}


def _losses(plain: Mapping[str, Any]) -> Iterator[str]:
    """Say what onnxruntime-genai does otherwise; ``plain`` is the tokenizer as it was."""
    from tokenizers.pre_tokenizers import ByteLevel

    if _prepends(plain) and plain["pre_tokenizer"] is None:
        yield (
            "onnxruntime-genai parts letters, digits and punctuation before it merges: a token across them, "
            "where the vocabulary has one, is not made"
        )
    for normalizer in _normalizers(plain):
        if _SPACE_MARK not in (normalizer.get("content"), normalizer.get("prepend")):
            yield (
                f"onnxruntime-genai does not normalise texts ({normalizer['type']}): give it texts that are, "
                "or use the tokenizers library"
            )
    absent = [letter for letter in ByteLevel.alphabet() if letter not in plain["model"]["vocab"]]
    if absent and not plain["model"].get("byte_fallback"):
        yield (
            f"{len(absent)} byte values have no token: onnxruntime-genai gives -1 for them, where the "
            "checkpoint drops them"
        )
    for step in _steps(plain["pre_tokenizer"]):
        if step["type"] not in _KNOWN_STEPS:
            yield (
                f"onnxruntime-genai ignores the pre-tokenizer step {step['type']}: some texts get other "
                "token ids"
            )
