"""Tiny models with a tokenizer, and a cache of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, 64 wide; the embedding has 16 rows more than the tokenizer has tokens."""
    from tiny_exports import TinyConfig, make_folder

    folder = tmp_path_factory.mktemp("models") / "llama"
    return make_folder(folder, TinyConfig("llama", {"tie_word_embeddings": True}, padded_vocab=16))


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks, one of them with sliding attention over 8 tokens."""
    from tiny_exports import TinyConfig, make_folder

    settings = {
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    folder = tmp_path_factory.mktemp("models") / "gemma"
    return make_folder(folder, TinyConfig("gemma3_text", settings))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
