"""Tiny models with a tokenizer, an expert of plain files, and the command line in this process."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))

WORDS = ("river", "stone", "apple", "seven", "cloud", "paper", "green", "under", "train", "music")
EXPERT = """\
name: tiny
domain: {sources: [{path: domain.jsonl}]}
task: {sources: [{path: task.jsonl}]}
general: {sources: [{path: general.jsonl}]}
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Cusprun = Callable[..., Outcome]


def sentences(start: int, count: int, words: int = 12) -> list[dict[str, str]]:
    """Different texts of a few words, written without chance."""

    def text(number: int) -> str:
        chosen = (WORDS[(number * (step + 3) + step) % len(WORDS)] for step in range(words))
        return f"{' '.join(chosen)} {number}"

    return [{"text": text(number)} for number in range(start, start + count)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``llama`` and ``qwen2``: two blocks, 64 wide, with a byte-level tokenizer."""
    from tiny_exports import TinyConfig, make_folder

    root = tmp_path_factory.mktemp("models")
    make_folder(root / "llama", TinyConfig("llama", {"tie_word_embeddings": True}))
    make_folder(root / "qwen2", TinyConfig("qwen2"))
    return root


@pytest.fixture
def work(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with ``model``, ``expert.yaml`` and its corpora, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUSPRUN_DEBUG", raising=False)
    shutil.copytree(tiny_models / "llama", tmp_path / "model")
    (tmp_path / "expert.yaml").write_text(EXPERT, encoding="utf-8")
    for start, name in enumerate(("domain", "task", "general")):
        write_rows(tmp_path / f"{name}.jsonl", sentences(start * 100, 20))
    return tmp_path


@pytest.fixture
def cusprun(capsys: pytest.CaptureFixture[str]) -> Cusprun:
    """Run a command in this process."""
    from cusprun.cli.app import run

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
