"""Tokenizers in GGUF: llama.cpp's own tokenisation of the probe strings against transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_exports import (
    TinyConfig,
    byte_level_tokenizer,
    make_folder,
    sentencepiece_tokenizer,
    split_then_bytes,
    unigram_tokenizer,
)
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ExportError
from exporters.gguf import check, export
from exporters.gguf_tokenizer import load_tokenizer, pretokenizer_of, pretokenizer_table
from exporters.gguf_tokenizer_file import StatedTokenizer, read_stated
from exporters.parity_text import probe_texts
from exporters.probe_strings import random_texts
from serve.runtimes.llamacpp import LlamaCppRuntime

pytest.importorskip("llama_cpp")
TINY = TinyConfig("llama", {"num_hidden_layers": 1})


STEPS = {
    "words": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "digits": pre_tokenizers.Digits(individual_digits=True),
}


def split(step: str) -> pre_tokenizers.PreTokenizer:
    """Build the step "split:PATTERN"."""
    return pre_tokenizers.Split(Regex(step.removeprefix("split:")), behavior="isolated")


def differing(folder: Path, out: Path, texts: tuple[str, ...]) -> list[str]:
    """Export and return the texts that llama.cpp tokenises otherwise than transformers."""
    export(folder, out, quant="f16")
    runtime, tokenizer = LlamaCppRuntime(out, n_threads=1), AutoTokenizer.from_pretrained(folder)
    found = [text for text in texts if runtime.tokenize(text, True) != tokenizer(text)["input_ids"]]
    runtime.close()
    return found


@pytest.mark.parametrize("entry", pretokenizer_table(), ids=lambda entry: f"{entry[0]}-{len(entry[2][0])}")
def test_each_known_pretokenizer_splits_as_llama_cpp_does(
    entry: tuple[str, bool, tuple[str, ...]], tmp_path: Path
) -> None:
    name, ignore_merges, steps = entry
    pre = pre_tokenizers.Sequence([STEPS.get(step) or split(step) for step in steps])
    tokenizer = byte_level_tokenizer(pre=pre, ignore_merges=ignore_merges)
    folder = make_folder(tmp_path / "m", TINY, tokenizer)
    assert pretokenizer_of(load_tokenizer(folder)) == (name, True)
    assert differing(folder, tmp_path / "m.gguf", probe_texts()) == []


@pytest.mark.parametrize("cut_out", [True, False])
def test_bytes_without_a_token_are_dropped(tmp_path: Path, cut_out: bool) -> None:
    tokenizer = byte_level_tokenizer()
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    absent = ["ñ", "ò", "ó"]  # the letters of bytes that UTF-8 uses for rare planes only
    for letter in absent:
        token_id = plain["model"]["vocab"].pop(letter)
        plain["model"]["vocab"][f"spare{token_id}"] = token_id
    if cut_out:
        plain["pre_tokenizer"]["pretokenizers"].append(
            {"type": "Split", "pattern": {"Regex": "[ñòó]"}, "behavior": "Removed", "invert": False}
        )
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), bos_token="<|begin|>", eos_token="<|im_end|>"
    )
    folder = make_folder(tmp_path / "m", TINY, changed)
    losses = check(open_checkpoint(folder), "f16")
    assert any("3 byte values" in loss for loss in losses) is not cut_out
    texts = ("a\U00040000b", "x \U000f0000 y", "plain")
    assert differing(folder, tmp_path / "m.gguf", texts) == []


def test_sentencepiece_bpe_with_byte_fallback(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", TINY, sentencepiece_tokenizer())
    assert differing(folder, tmp_path / "m.gguf", probe_texts()) == []


def test_sentencepiece_bpe_without_a_space_in_front(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", TINY, sentencepiece_tokenizer(prepend=False))
    assert differing(folder, tmp_path / "m.gguf", probe_texts()) == []


def test_unigram_on_its_own_alphabet(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", TINY, unigram_tokenizer())
    texts = ("The quick brown fox", "How many in all?", "lazy dog, and it", "Question Answer")
    assert differing(folder, tmp_path / "m.gguf", texts) == []


@pytest.mark.parametrize("bos", [True, False])
def test_bos_follows_what_the_tokenizer_does_not_what_its_config_says(tmp_path: Path, bos: bool) -> None:
    folder = make_folder(tmp_path / "m", TINY, byte_level_tokenizer(bos=bos))
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    assert "add_bos_token" not in config
    runtime = LlamaCppRuntime(export(folder, tmp_path / "m.gguf", quant="f16"), n_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (runtime.tokenize("x", True)[0] == tokenizer.bos_token_id) is bos
    runtime.close()


def _saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return make_folder(tmp_path / "m", TINY, tokenizer)


def test_unknown_pretokenizer_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path, byte_level_tokenizer(pre=split_then_bytes(r"\p{L}+|\p{N}{1,7}|.")))
    with pytest.raises(ExportError, match="no name for"):
        check(open_checkpoint(folder), "f16")


def test_space_before_every_text_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path, byte_level_tokenizer(pre=pre_tokenizers.ByteLevel(add_prefix_space=True)))
    with pytest.raises(ExportError, match="add_prefix_space"):
        check(open_checkpoint(folder), "f16")


def test_foreign_normalizer_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ExportError, match="Lowercase"):
        check(open_checkpoint(_saved(tmp_path, tokenizer)), "f16")


def test_ignore_merges_that_differs_is_reported(tmp_path: Path) -> None:
    folder = _saved(tmp_path, byte_level_tokenizer(ignore_merges=True))
    assert any("ignore_merges" in loss for loss in check(open_checkpoint(folder), "f16"))


def test_damaged_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    folder = _saved(tmp_path, byte_level_tokenizer())
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ExportError, match="cannot be loaded"):
        check(open_checkpoint(folder), "f16")


BUILDERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_level_tokenizer,
    "bytes, no BOS, NFC": lambda: byte_level_tokenizer(bos=False, nfc=True),
    "bytes, ignore_merges": lambda: byte_level_tokenizer(ignore_merges=True),
    "sentencepiece": sentencepiece_tokenizer,
    "sentencepiece, no prefix": lambda: sentencepiece_tokenizer(prepend=False),
}
CLASSES = ("", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast")


def tokenizer_folder(
    folder: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, **changes: object
) -> Path:
    """Save a tokenizer beside the config of a model; ``changes`` are made to its own config."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def opened(folder: Path) -> tuple[object, ...]:
    """What transformers makes of a folder, in the order of ``parts``."""
    hf = AutoTokenizer.from_pretrained(folder)
    plain = json.loads(hf.backend_tokenizer.to_str())
    bare, full = hf("a", add_special_tokens=False)["input_ids"], hf("a")["input_ids"]
    before = full[: full.index(bare[0])]
    after = full[len(before) + len(bare) :]
    ids = {name: getattr(hf, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return (
        {**plain["model"], "merges": [tuple(merge) for merge in plain["model"]["merges"]]},
        plain["added_tokens"],
        plain["normalizer"],
        plain["pre_tokenizer"],
        (before[0] if before else None, after[0] if after else None),
        {name: found for name, found in ids.items() if found is not None},
        {"default": hf.chat_template} if hf.chat_template else {},
    )


def parts(stated: StatedTokenizer) -> tuple[object, ...]:
    plain = stated.plain
    return (
        {**plain["model"], "merges": [tuple(merge) for merge in plain["model"]["merges"]]},
        sorted(plain["added_tokens"], key=lambda token: int(token["id"])),
        plain["normalizer"],
        plain["pre_tokenizer"],
        stated.added_around,
        stated.special_ids,
        stated.chat_templates,
    )


@pytest.mark.parametrize("tokenizer_class", CLASSES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("builder", BUILDERS)
def test_what_is_read_from_files_is_what_transformers_makes_of_them(
    builder: str, model_type: str, tokenizer_class: str, tmp_path: Path
) -> None:
    changes = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    folder = tokenizer_folder(tmp_path / "t", BUILDERS[builder](), model_type, **changes)
    stated = read_stated(folder, model_type)
    if stated is None:  # transformers is asked: nothing was assumed
        assert "sentencepiece" in builder
        assert model_type == "qwen2" or "Qwen2" in tokenizer_class
    else:
        assert parts(stated) == opened(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"mask_token": "<|none|>"},
        {"mask_token": {"__type": "AddedToken", "content": "<|im_start|>"}},
        {"extra_special_tokens": ["<|none|>"]},
        {"extra_special_tokens": {"image_token": "<|none|>"}},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"split_special_tokens": True},
        {"something_else": 1},
        {"added_tokens_decoder": {"1": {"content": "<|begin|>", "special": True, "lstrip": True}}},
    ],
)
def test_transformers_is_asked_where_the_config_may_change_tokens(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = tokenizer_folder(tmp_path / "t", byte_level_tokenizer(), "llama", **changes)
    assert read_stated(folder, "llama") is None


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_transformers_is_asked_about_files_of_older_versions(tmp_path: Path, name: str) -> None:
    folder = tokenizer_folder(tmp_path / "t", byte_level_tokenizer(), "llama")
    (folder / name).write_text("{}", encoding="utf-8")
    assert read_stated(folder, "llama") is None
    assert load_tokenizer(folder).added_around == (1, None)


def test_tokens_of_gemma3_on_random_texts(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(prepend=False)
    folder = make_folder(tmp_path / "m", TinyConfig("gemma3_text", {"num_hidden_layers": 1}), tokenizer)
    specials = list(tokenizer.added_tokens_encoder)
    assert differing(folder, tmp_path / "m.gguf", tuple(random_texts(2000, 5, specials))) == []


def test_tokens_that_no_merge_makes_are_reported(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    made = {"".join(merge) for merge in plain["model"]["merges"]}
    plain["model"]["merges"] = [merge for merge in plain["model"]["merges"] if "".join(merge) != max(made)]
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), bos_token="<s>", eos_token="</s>"
    )
    losses = check(open_checkpoint(_saved(tmp_path, changed)), "f16")
    assert any(repr(max(made)) in loss and "no merge" in loss for loss in losses)
