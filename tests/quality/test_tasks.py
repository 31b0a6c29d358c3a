"""Tasks files: read strictly, with lines; documents with prompts, examples and answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cusprun.errors import ConfigError, CorpusError, MissingDependencyError, UserError
from cusprun.quality import task_run
from cusprun.quality.report import task_quality
from cusprun.quality.tasks import Task, TaskDocument, TaskSpec, load_tasks


def write_rows(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def sums(folder: Path, name: str, start: int, count: int) -> None:
    write_rows(
        folder / name,
        *({"q": f"{n} + {n}?", "a": f"It is\n#### {2 * n}"} for n in range(start, start + count)),
    )


def write(folder: Path, text: str) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(text, encoding="utf-8")
    return path


GOOD = """\
tasks:
  - name: sums
    path: test.jsonl
    prompt: "Question: {q}\\nAnswer:"
    answer: a
    metric: exact_match
    limit: 3
    shots: 2
    shots_path: train.jsonl
    stop: ["\\n\\n", "Question:"]
    max_new_tokens: 40
    seed: 5
  - {name: words, path: words.jsonl, prompt: "{text} ", answer: "{word} it is", metric: f1, language: de}
"""


def test_everything_is_read(tmp_path: Path) -> None:
    sums(tmp_path, "test.jsonl", 0, 5)
    sums(tmp_path, "train.jsonl", 2, 8)
    write_rows(tmp_path / "words.jsonl", {"text": "Say", "word": "so"})
    first, second = load_tasks(write(tmp_path, GOOD))
    assert first.spec == TaskSpec(
        name="sums",
        path=str(tmp_path / "test.jsonl"),
        prompt="Question: {q}\nAnswer:",
        answer="a",
        metric="exact_match",
        max_new_tokens=40,
        stop=("\n\n", "Question:"),
        limit=3,
        shots=2,
        shots_path=str(tmp_path / "train.jsonl"),
        seed=5,
    )
    assert (second.spec.max_new_tokens, second.spec.stop, second.spec.language) == (32, ("\n",), "de")
    assert second.documents == (TaskDocument("Say ", ("so it is",)),)
    assert [document.answers for document in first.documents] == [(f"It is\n#### {2 * n}",) for n in range(3)]


def shots_of(task: Task) -> list[str]:
    (shots,) = {document.prompt.rpartition("Question: ")[0] for document in task.documents}
    return shots.split("\n\n")[:-1]


def test_examples_are_seeded_solved_and_none_is_asked_for(tmp_path: Path) -> None:
    sums(tmp_path, "test.jsonl", 0, 5)
    sums(tmp_path, "train.jsonl", 2, 8)
    write_rows(tmp_path / "words.jsonl", {"text": "Say", "word": "so"})
    known = {f"Question: {n} + {n}?\nAnswer: It is\n#### {2 * n}" for n in range(3, 10)}
    drawn = set()
    for seed in range(8):
        path = write(tmp_path, GOOD.replace("seed: 5", f"seed: {seed}"))
        shots = shots_of(load_tasks(path)[0])
        assert shots == shots_of(load_tasks(path)[0])
        assert len(set(shots)) == 2
        assert set(shots) <= known  # the limit is 3, so 2 + 2 is asked for, and 3 + 3 is not
        drawn.update(shots)
    assert len(drawn) > 4
    with pytest.raises(CorpusError, match=r"has 7 examples besides the questions of 'sums'.*'shots' is 8"):
        load_tasks(write(tmp_path, GOOD.replace("shots: 2", "shots: 8")))


def test_lists_of_answers(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "words.jsonl",
        {"text": "1", "word": ["so", "thus", 3]},
        {"text": "2", "word": {"text": ["so"], "answer_start": [0]}},
        {"text": "3", "word": 7},
    )
    text = "tasks: [{name: w, path: words.jsonl, prompt: '{text}', answer: word, metric: em}]\n"
    (task,) = load_tasks(write(tmp_path, text))
    assert [document.answers for document in task.documents] == [("so", "thus", "3"), ("so",), ("7",)]


def test_a_jsonl_file_is_a_task_of_its_own(tmp_path: Path) -> None:
    numbers = write_rows(tmp_path / "n.jsonl", {"prompt": "1+1", "answer": "2"})
    words = write_rows(
        tmp_path / "w.jsonl", {"prompt": "1+1", "answer": "two"}, {"prompt": "b", "answer": "3"}
    )
    ((first,), (second,)) = (load_tasks(numbers), load_tasks(words))
    assert (first.spec.name, first.spec.metric, first.spec.max_new_tokens) == ("n", "exact_match", 256)
    assert (second.spec.name, second.spec.metric, second.spec.stop) == ("w", "f1", ("\n",))
    assert first.documents == (TaskDocument("1+1", ("2",)),)


def test_all_faults_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
task: []
tasks:
  - {name: a, path: a.jsonl, prompt: "{q}", answer: a, metrics: f1}
  - {name: a, path: a.jsonl, prompt: "{q}", answer: a, metric: exact}
  - {name: b, path: " ", prompt: "no field", answer: a, metric: em}
  - {name: c, path: a.jsonl, prompt: "{q.x}", answer: "{a", metric: em, limit: 0}
  - {name: d, path: a.jsonl, prompt: "{q}", answer: a.b, metric: em, shots: 2}
  - {name: e, path: a.jsonl, prompt: "{q}", answer: a, metric: em, stop: x}
  - {name: f, path: a.jsonl, prompt: "{q}", answer: a, metric: em, stop: [""], max_new_tokens: 0}
  - {name: g, path: a.jsonl, prompt: "{q}", answer: a, metric: exact_match, language: de}
  - {name: h, path: a.jsonl, prompt: "{q}", answer: a, metric: em, language: fr}
  - text
"""
    with pytest.raises(ConfigError) as caught:
        load_tasks(write(tmp_path, text))
    found = [fault.removeprefix(f"{tmp_path}/tasks.yaml:") for fault in caught.value.faults]
    expected = [
        (1, "unknown key 'task'"),
        (3, "unknown key 'metrics'; did you mean 'metric'?"),
        (4, "'metric' must be one of exact_match, f1, em, not 'exact'; did you mean 'exact_match'?"),
        (4, "the name 'a' is another task's already"),
        (5, "'path' must not be blank"),
        (5, "the template shows no field"),
        (6, "'limit' must be at least 1, not 0"),
        (6, "a single brace stands alone"),
        (6, "the placeholder '{q.x}' is not a plain field name"),
        (7, "'shots' needs 'shots_path'"),
        (7, "the placeholder '{a.b}' is not a plain field name"),
        (8, "'stop' must be a list"),
        (9, "'max_new_tokens' must be at least 1, not 0"),
        (9, "'stop[0]' must not be empty"),
        (10, "'language' belongs to the metrics f1 and em"),
        (11, "'language' must be one of en, de, zh, none, not 'fr'"),
        (12, "'tasks[9]' must be a mapping"),
    ]
    assert len(found) == len(expected), found
    for fault, (line, part) in zip(found, expected, strict=True):
        assert fault.startswith(f"{line}: "), fault
        assert part in fault


@pytest.mark.parametrize("text", ["tasks: []\n", "tasks: 3\n", "a: 1\n", "", "tasks:\n"])
def test_a_file_without_tasks(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_tasks(write(tmp_path, text))


@pytest.mark.parametrize(
    ("row", "metric", "part"),
    [
        ({"q": "x"}, "f1", r"a.jsonl:1 has no field 'a'"),
        ({"q": "x", "aa": "y"}, "f1", "has no field 'a'; did you mean 'aa'"),
        ({"q": ["x"], "a": "y"}, "f1", "the field 'q' is not text or a number"),
        ({"q": "x", "a": []}, "f1", "has no answer in 'a'"),
        ({"q": "x", "a": ""}, "f1", "has no answer in 'a'"),
        ({"q": "x", "a": [["y"]]}, "f1", "are not all texts"),
        ({"q": " ", "a": "y"}, "f1", "has an empty prompt"),
        ({"q": "x", "a": "3/4"}, "exact_match", "ends in no whole or decimal number"),
        ({"q": "x", "a": ["4", "four"]}, "exact_match", "the answer 'four' ends in no whole"),
        ('{"q": "\\ud800", "a": "y"}', "f1", "half a character"),
        ("{", "f1", "a.jsonl:1 is not JSON"),
        ("", "f1", "has no rows for the task 't'"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: Any, metric: str, part: str) -> None:
    write_rows(tmp_path / "a.jsonl", row)
    text = f"tasks: [{{name: t, path: a.jsonl, prompt: '{{q}}', answer: a, metric: {metric}}}]\n"
    with pytest.raises(CorpusError, match=part):
        load_tasks(write(tmp_path, text))


def test_a_missing_library_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cusprun import evaluate

    monkeypatch.setattr(task_run, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"'lm-eval', which is not.*pip install 'cusprun\[eval\]'"
    ):
        evaluate("nowhere", _expert(tmp_path), "nothing.yaml")


def _expert(folder: Path) -> Path:
    path = folder / "expert.yaml"
    path.write_text("task: {sources: [pack:lang/en]}\n", encoding="utf-8")
    return path


def test_nothing_of_lm_eval_is_imported_for_reading_tasks() -> None:
    source = (
        "import sys, cusprun.pipeline.evaluation, cusprun.quality.tasks, cusprun.quality.task_run\n"
        "assert not {'lm_eval', 'accelerate', 'datasets', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


def test_a_batch_size_of_0_is_refused(tmp_path: Path) -> None:
    from cusprun import evaluate

    with pytest.raises(UserError, match="the batch size must be at least 1, not 0"):
        evaluate("nowhere", _expert(tmp_path), batch_size=0)


def test_prompts_that_do_not_fit_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "long.jsonl", {"prompt": "word " * 200, "answer": "so"})
    tasks = load_tasks(rows)
    task_run.require_room(tiny_llama, 4096, tasks)
    with pytest.raises(
        UserError, match=r"'long' has a prompt of [0-9,]+ tokens and generates 32 more.* takes 100"
    ):
        task_run.require_room(tiny_llama, 100, tasks)


def test_scores_have_paired_intervals() -> None:
    generator = np.random.default_rng(0)
    base = (generator.random(400) < 0.6).astype(float).tolist()
    row = task_quality("t", "em", base)
    error = 1.96 * np.std(base) / 20
    assert row.difference is None
    assert row.documents == 400
    assert row.score.value == pytest.approx(np.mean(base))
    assert row.score.low == pytest.approx(np.mean(base) - error, abs=0.1 * error)
    assert row.score.high == pytest.approx(np.mean(base) + error, abs=0.1 * error)
    worse = task_quality("t", "f1", [value - 0.25 for value in base], base)
    assert worse.difference is not None
    for value in (worse.difference.value, worse.difference.low, worse.difference.high):
        assert value == pytest.approx(-0.25)
