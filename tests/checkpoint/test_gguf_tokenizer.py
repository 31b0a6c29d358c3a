"""The imported tokenizer gives the token ids that llama.cpp gives on the source file."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_tiny import TEXT, byte_level_parts, sentencepiece_parts, strings, tiny_model, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cusprun.checkpoint.gguf_import import import_gguf
from cusprun.checkpoint.gguf_tokenizer import pre_tokenizers

llama_cpp = pytest.importorskip("llama_cpp")


def differences(
    path: Path, folder: Path, texts: list[str]
) -> Iterator[tuple[str, bool, list[int], list[int]]]:
    """Yield each text whose ids differ, with and without special tokens taken from the text."""
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ours = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        for special in (True, False):
            wanted = theirs.tokenize(text.encode(), add_bos=True, special=special)
            found = ours(text, split_special_tokens=not special)["input_ids"]
            if found != wanted:
                yield text, special, found, wanted


def build(tmp_path: Path, parts: dict[str, Any], family: str = "llama", **options: Any) -> tuple[Path, Path]:
    model = tiny_model(family, True, len(parts["tokens"]))
    path = write_gguf(tmp_path / "m.gguf", model, parts, **options)
    return path, import_gguf(path, tmp_path / "out")


def one_name_per_entry() -> list[str]:
    return sorted({entry.names[0] for entry in pre_tokenizers().values()})


@pytest.mark.parametrize("name", one_name_per_entry())
def test_byte_level(tmp_path: Path, name: str) -> None:
    path, folder = build(tmp_path, byte_level_parts(600), pre_name=name)
    assert list(differences(path, folder, strings(600))) == []


def test_names_of_an_entry_are_alike_for_llama_cpp(tmp_path: Path) -> None:
    """Names of one entry are one kind for llama.cpp too: they give the same ids."""
    parts = byte_level_parts(600)
    texts = [text.encode() for text in strings(60)]
    for entry in {id(entry): entry for entry in pre_tokenizers().values()}.values():
        found = set()
        for name in entry.names:
            model = tiny_model("llama", True, len(parts["tokens"]))
            path = write_gguf(tmp_path / f"{name}.gguf", model, parts, pre_name=name)
            theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
            found.add(tuple(tuple(theirs.tokenize(text, add_bos=True, special=True)) for text in texts))
        assert len(found) == 1, entry.names


@pytest.mark.parametrize("add_eos", [True, False])
@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_and_eos(tmp_path: Path, add_bos: bool, add_eos: bool) -> None:
    path, folder = build(tmp_path, byte_level_parts(), add_bos=add_bos, add_eos=add_eos)
    ours = AutoTokenizer.from_pretrained(folder)
    ids = ours("hello")["input_ids"]
    assert (ids[0] == ours.bos_token_id) is add_bos
    assert (ids[-1] == ours.eos_token_id) is add_eos
    assert list(differences(path, folder, TEXT)) == []


def test_user_defined_tokens(tmp_path: Path) -> None:
    """Tokens added by a user are found in text in both modes; a control-looking one is made control."""
    parts = byte_level_parts()
    parts["tokens"] += ["<tool>", "  wide  ", "<|fim_prefix|>", "<|endoftext|>"]
    parts["types"] += [4, 4, 1, 1]
    path, folder = build(tmp_path, parts, pre_name="smollm")
    texts = [f"a{a}b {a}{b} c" for a in parts["tokens"][-4:] for b in parts["tokens"][-4:]]
    assert list(differences(path, folder, texts)) == []


def test_bytes_without_a_token(tmp_path: Path) -> None:
    """A byte that the vocabulary lacks keeps its neighbours apart."""
    parts = byte_level_parts(600)
    for letter in ("ĝ", "Ā", "Ļ"):  # the bytes 0x1d, 0x00 and 0x99
        parts["tokens"][parts["tokens"].index(letter)] = f"[lost {letter}]"
    gone = [merge for merge in parts["merges"] if "Ļ" in merge or "ĝ" in merge or "Ā" in merge]
    parts["merges"] = [merge for merge in parts["merges"] if merge not in gone]
    path, folder = build(tmp_path, parts, pre_name="smollm")
    texts = ["a\x1db", "th\x1de fox t\x00he", "’s “quick”", "ab\x1d\x1d\x00", *strings(400, seed=3)]
    assert list(differences(path, folder, texts)) == []


def test_qwen2_on_composed_text(tmp_path: Path) -> None:
    """Stock transformers composes the text of every qwen2 model first (NFC), which llama.cpp does not."""
    path, folder = build(tmp_path, byte_level_parts(600), family="qwen2", pre_name="qwen2")
    texts = [unicodedata.normalize("NFC", text).replace("ſ", "s") for text in strings(600)]
    assert list(differences(path, folder, texts)) == []


@pytest.mark.parametrize("options", [{}, {"add_space_prefix": False}, {"add_bos": False, "add_eos": True}])
def test_sentencepiece(tmp_path: Path, options: dict[str, bool]) -> None:
    path, folder = build(tmp_path, sentencepiece_parts(), pre_name="default", **options)
    assert list(differences(path, folder, strings(600))) == []


def test_sentencepiece_with_user_defined_tokens(tmp_path: Path) -> None:
    parts = sentencepiece_parts()
    parts["tokens"] += ["<tool>", "▁▁▁▁▁▁▁▁"]
    parts["types"] += [4, 4]
    parts["scores"] += [-1000.0, -1000.0]
    path, folder = build(tmp_path, parts, pre_name="default")
    texts = ["a<tool>b", "<tool> x <tool><tool>", "a        b", "▁▁▁▁▁▁▁▁", *strings(200, seed=1)]
    assert list(differences(path, folder, texts)) == []


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path, folder = build(tmp_path_factory.mktemp("pair"), byte_level_parts(600), pre_name="llama-bpe")
    return (
        llama_cpp.Llama(str(path), vocab_only=True, verbose=False),
        AutoTokenizer.from_pretrained(folder),
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), min_size=1, max_size=40))
def test_any_assigned_text(pair: tuple[Any, Any], text: str) -> None:
    """Code points that Unicode gave a meaning after llama.cpp's tables were made are outside the promise."""
    if any(unicodedata.category(character) == "Cn" for character in text):
        return
    theirs, ours = pair
    assert ours(text)["input_ids"] == theirs.tokenize(text.encode(), add_bos=True, special=True)


@pytest.mark.parametrize(
    ("family", "parts", "options"),
    [
        ("qwen3", byte_level_parts(600), {"pre_name": "qwen2"}),
        ("phi3", sentencepiece_parts(), {"pre_name": "default"}),
        ("gemma3_text", sentencepiece_parts(), {"pre_name": "default", "add_space_prefix": False}),
    ],
)
def test_stock_code_uses_the_tokenizer_of_the_folder_in_every_family(
    tmp_path: Path, family: str, parts: dict[str, Any], options: dict[str, Any]
) -> None:
    path, folder = build(tmp_path, parts, family=family, **options)
    assert list(differences(path, folder, strings(300))) == []
