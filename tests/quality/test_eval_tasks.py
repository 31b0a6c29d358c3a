"""Tasks through lm-eval on two tiny models, against stock generation of one prompt at a time."""

from __future__ import annotations

import json
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cusprun.codec import load_json
from cusprun.quality.answers import answer_number
from cusprun.quality.report import EvalReport

pytestmark = pytest.mark.slow

TASKS = """\
tasks:
  - {name: words, path: rows.jsonl, prompt: "Q: {q}\\nA:", answer: words, metric: em, max_new_tokens: 12}
  - {name: overlap, path: rows.jsonl, prompt: "Q: {q}\\nA:", answer: words, metric: f1, max_new_tokens: 12}
  - name: numbers
    path: rows.jsonl
    prompt: "Q: {q}\\nA:"
    answer: number
    metric: exact_match
    max_new_tokens: 24
    stop: ["the", "\\n"]
    limit: 9
"""


@cache
def stock_model(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


def stock_answer(folder: Path, prompt: str, max_new_tokens: int, stop: tuple[str, ...]) -> str:
    """Greedy, one prompt, cut afterwards."""
    tokenizer, model = stock_model(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    for mark in stop:
        text = text.split(mark, 1)[0]
    return text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from tiny_exports import TinyConfig, make_folder

    root = tmp_path_factory.mktemp("two models")
    return (
        make_folder(root / "llama", TinyConfig("llama", {"tie_word_embeddings": True})),
        make_folder(root / "qwen2", TinyConfig("qwen2")),
    )


@pytest.fixture
def files(tmp_path: Path, own_cache: Path, models: tuple[Path, Path]) -> Path:
    """An expert, tasks, and rows whose answers are what the first model says, in every second row."""
    rows = []
    for number in range(14):
        prompt = f"Q: {number} clips?\nA:"
        said = stock_answer(models[0], prompt, 12, ("\n",))
        counted = answer_number(stock_answer(models[0], prompt, 24, ("the", "\n")))
        rows.append(
            {
                "q": f"{number} clips?",
                "words": f"The {said}!" if number % 2 else ["zzz", "yyy"],
                "number": "77777" if counted is None else str(counted),
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "tasks.yaml").write_text(TASKS, encoding="utf-8")
    texts = "".join(json.dumps({"text": f"{n} quick brown foxes {n * 7} dogs"}) + "\n" for n in range(12))
    (tmp_path / "text.jsonl").write_text(texts, encoding="utf-8")
    (tmp_path / "expert.yaml").write_text("task: {sources: [{path: text.jsonl}]}\n", encoding="utf-8")
    return tmp_path


def refuse(*arguments: Any, **options: Any) -> None:
    raise AssertionError("the network was asked")


def words(text: str) -> list[str]:
    kept = "".join(sign if sign.isalnum() or sign.isspace() else "" for sign in text.lower())
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def test_scores_are_those_of_stock_generation(
    files: Path,
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from cusprun.cli.app import run

    rows = [json.loads(line) for line in (files / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    for folder in models:
        stock_model(folder)  # says how far it is, which is not what is looked at below
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", str(files / "home"))
    environment = dict(os.environ)
    capfd.readouterr()
    arguments = ["eval", *map(str, models), "--expert", str(files / "expert.yaml"), "--batch-size", "5"]
    arguments += ["--tasks", str(files / "tasks.yaml"), "--json", str(files / "report.json")]
    assert run(arguments) == 0
    out, err = capfd.readouterr()
    assert {name: os.environ.get(name) for name in environment if "OFFLINE" in name} == {
        name: value for name, value in environment.items() if "OFFLINE" in name
    }
    assert "HF_HUB_OFFLINE" not in os.environ or "HF_HUB_OFFLINE" in environment
    assert not (files / "home").exists()
    assert "words: em, 14 documents" in out
    lines = [line for line in err.splitlines() if not line.startswith(("running tasks", "measuring"))]
    assert not lines, lines

    first, second = load_json(EvalReport, files / "report.json").models
    em, f1, numbers = first.tasks
    assert [task.documents for task in first.tasks] == [14, 14, 9]
    assert (em.score.value, f1.score.value) == (0.5, 0.5)
    assert em.score.low < 0.5 < em.score.high
    assert all(task.difference is None for task in first.tasks)
    counted = sum(row["number"] != "77777" for row in rows[:9])
    assert counted, "the first model says no number, so the test shows nothing"
    assert numbers.score.value == pytest.approx(counted / 9)

    hits = 0
    for row in rows:
        said = words(stock_answer(models[1], f"Q: {row['q']}\nA:", 12, ("\n",)))
        wanted = row["words"] if isinstance(row["words"], list) else [row["words"]]
        hits += any(said == words(answer) for answer in wanted)
    found = second.tasks[0]
    assert found.score.value == pytest.approx(hits / 14)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(hits / 14 - 0.5)
    assert found.difference.low <= found.difference.value <= found.difference.high
