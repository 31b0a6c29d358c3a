"""EXPERT.yaml: read strictly, all faults at once, each with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cusprun.codec import from_plain, to_plain
from cusprun.corpus.expert import load_expert
from cusprun.corpus.yaml_tree import read_yaml
from cusprun.errors import ConfigError
from cusprun.records import Augment, Expert, Source


def write(folder: Path, text: str) -> Path:
    path = folder / "EXPERT.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(path: Path) -> list[str]:
    """The faults of a file, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_expert(path)
    assert str(path) in str(caught.value)
    return [fault.removeprefix(str(path.parent) + "/") for fault in caught.value.faults]


GOOD = """\
language:
  sources:
    - pack:lang/en
    - {pack: lang/de, limit: 3}
domain:
  sources:
    - path: data/maths.jsonl
      template: "Question: {question}\\nAnswer: {answer}"
      limit: 200
task:
  sources:
    - dataset: openai/gsm8k
      config: main
      split: train
      template:
        - {role: user, content: "{question}"}
        - role: assistant
          content: "{answer} {{done}}"
general: {sources: [{path: /abs/general.txt}]}
held_out: 0.25
max_tokens: 128
seed: 7
"""


def test_everything_is_read(tmp_path: Path) -> None:
    expert = load_expert(write(tmp_path, GOOD))
    assert (expert.name, expert.held_out, expert.max_tokens, expert.seed) == ("EXPERT", 0.25, 128, 7)
    assert list(expert.dimensions) == ["language", "domain", "task"]
    assert expert.dimensions["language"] == (Source(pack="lang/en"), Source(pack="lang/de", limit=3))
    assert expert.dimensions["domain"][0].path == str(tmp_path / "data/maths.jsonl")
    assert expert.dimensions["task"][0].template[1] == {"role": "assistant", "content": "{answer} {{done}}"}
    assert expert.general == (Source(path="/abs/general.txt"),)
    assert from_plain(Expert, to_plain(expert)) == expert


def test_one_dimension_and_defaults_are_enough(tmp_path: Path) -> None:
    expert = load_expert(write(tmp_path, "name: Küche\ntask: {sources: [pack:task/summarise-de]}\n"))
    assert expert == Expert("Küche", {"task": (Source(pack="task/summarise-de"),)})


def test_augmenting_needs_only_a_number(tmp_path: Path) -> None:
    few = "task: {sources: [pack:task/summarise-de]}\naugment: {documents: 30}\n"
    expert = load_expert(write(tmp_path, few))
    assert expert.augment == Augment(30, temperature=0.8, max_new_tokens=256, prompt_tokens=32)
    all_keys = few.replace("30", "30, temperature: 0, max_new_tokens: 9, prompt_tokens: 5")
    expert = load_expert(write(tmp_path, all_keys))
    assert expert.augment == Augment(30, 0.0, 9, 5)
    for text in ("1e-9", "1E-9", "1.e-9", ".1e-8", "+1e-9"):
        expert = load_expert(write(tmp_path, few.replace("30", f"30, temperature: {text}")))
        assert expert.augment == Augment(30, 1e-9)
    named = load_expert(write(tmp_path, "name: 1e-9\n" + few))
    assert named.name == "1e-9"
    assert from_plain(Expert, to_plain(expert)) == expert


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{}", "'documents' is missing in 'augment'"),
        ("30", "'augment' must be a mapping"),
        ("{documents: 0}", "'documents' must be at least 1 and at most 100,000, not 0"),
        ("{documents: 1.5}", "'documents' must be a whole number"),
        ("{document: 3}", "unknown key 'document'; did you mean 'documents'?"),
        ("{documents: 3, temprature: 1}", "unknown key 'temprature'; did you mean 'temperature'?"),
        ("{documents: 3, temperature: -1}", "'temperature' must be at least 0 and at most 2, not -1"),
        ("{documents: 3, temperature: 1e1}", "'temperature' must be at least 0 and at most 2, not 10"),
        ("{documents: 3, temperature: '1e-9'}", "'temperature' must be a number, not '1e-9'"),
        (f"{{documents: 3, temperature: 1{'0' * 400}}}", "'temperature' must be a number, not 100"),
        ("{documents: 1e3}", "'documents' must be a whole number"),
        ("{documents: 3, temperature: .nan}", "'temperature' must be at least 0"),
        ("{documents: 3, max_new_tokens: 0}", "'max_new_tokens' must be at least 1, not 0"),
        ("{documents: 3, prompt_tokens: 0}", "'prompt_tokens' must be at least 1, not 0"),
    ],
)
def test_faults_of_augmenting(tmp_path: Path, text: str, part: str) -> None:
    (fault,) = faults(write(tmp_path, f"task: {{sources: [pack:lang/en]}}\naugment: {text}\n"))
    assert fault.startswith("EXPERT.yaml:2: ")
    assert part in fault


def test_all_faults_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
nmae: x
language:
  sorces: [pack:lang/en]
domain:
  sources:
    - {path: a.txt, pack: lang/en}
    - {path: a.txt, template: "{a.b}"}
    - {path: a.txt, split: train}
    - {dataset: x, limit: 0}
    - pack:lang/eng
    - a.txt
    - {pth: a.txt}
    - {pack: lang/en, template: "{text}"}
    - {limit: 3}
task: [pack:lang/en]
held_out: 0.7
held_out: 0.2
max_tokens: many
seed: -1
"""
    found = faults(write(tmp_path, text))
    expected = [
        (1, "unknown key 'nmae'; did you mean 'name'?"),
        (3, "unknown key 'sorces'; did you mean 'sources'?"),
        (6, "only one of 'path', 'dataset' and 'pack' may be given, not 'path' and 'pack'"),
        (7, "the placeholder '{a.b}' is not a plain field name"),
        (8, "'split' belongs to a dataset, not to a path"),
        (9, "'limit' must be at least 1, not 0"),
        (10, "unknown pack 'lang/eng'; did you mean 'lang/en'?"),
        (11, "'a.txt' is not a source; write {path: a.txt}"),
        (12, "unknown key 'pth'; did you mean 'path'?"),
        (13, "'template' belongs to a path or dataset, not to a pack"),
        (14, "one of 'path', 'dataset' and 'pack' is missing"),
        (15, "'task' must be a mapping of keys to values, not a list"),
        (16, "'held_out' must be above 0 and at most 0.5, not 0.7"),
        (17, "the key 'held_out' stands twice, first in line 16"),
        (18, "'max_tokens' must be a whole number, not 'many'"),
        (19, "'seed' must be at least 0, not -1"),
    ]
    assert len(found) == len(expected), found
    for fault, (line, part) in zip(found, expected, strict=True):
        assert fault.startswith(f"EXPERT.yaml:{line}: "), fault
        assert part in fault


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("", 1, "empty"),
        ("# nothing\n", 1, "empty"),
        ("- a\n- b\n", 1, "must be a mapping"),
        ("name: x\nlanguage: {sources: [\n", 3, ""),
        ("name: x\n", 1, "at least one of language, domain, task"),
        ("task:\n", 1, "'task' must be a mapping of keys to values, not nothing"),
        ("task:\n  sources:\n", 2, "'sources' must be a list, not nothing"),
        ("task:\n  sources: []\n", 2, "at least one source"),
        ("task: {}\n", 1, "'sources' is missing in 'task'"),
        ("name: 12\ntask: {sources: [pack:lang/en]}\n", 1, "must be text, not 12; put it in quotes"),
        ("name: ' '\ntask: {sources: [pack:lang/en]}\n", 1, "must not be blank"),
        ("seed: true\ntask: {sources: [pack:lang/en]}\n", 1, "must be a whole number, not True"),
        ("seed: !!python/name:os.system x\ntask: {sources: [pack:lang/en]}\n", 1, "cannot be read"),
        ("name: 2024-13-45\ntask: {sources: [pack:lang/en]}\n", 1, "put it in quotes"),
        ("task: &a {sources: [*a]}\n", 1, "alias"),
        ("? [a, b]\n: 1\ntask: {sources: [pack:lang/en]}\n", 1, "a key must be plain text"),
        ("held_out: .nan\ntask: {sources: [pack:lang/en]}\n", 1, "at most 0.5"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("task:\n\tsources: []\n", 2, "cannot start any token"),
        ("[" * 5000, 1, "nested too deeply"),
    ],
)
def test_each_fault(tmp_path: Path, text: str, line: int, part: str) -> None:
    (fault,) = faults(write(tmp_path, text))
    assert fault.startswith(f"EXPERT.yaml:{line}: ")
    assert part in fault


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ('"{a.b}"', "'{a.b}' is not a plain field name"),
        ('"{a[0]}"', "'{a[0]}' is not a plain field name"),
        ('"{a!r}"', "'{a!r}' is not a plain field name"),
        ('"{a:>99}"', "'{a:>99}' is not a plain field name"),
        ('"{}"', "empty"),
        ('"{a"', "single brace"),
        ('"a}"', "single brace"),
        ('"{{a}}"', "shows no field"),
        ("{a}", "in quotes"),
        ("3", "in quotes"),
        ("[]", "shows no field"),
        ("[{role: user, content: hello}]", "shows no field"),
        ("[{role: robot, content: '{a}'}]", "'role' must be one of system, user, assistant, not 'robot'"),
        ("[{role: user}]", "'content' is missing in 'template[0]'"),
        ("[{role: user, contents: '{a}'}]", "unknown key 'contents'; did you mean 'content'?"),
        ("[{role: user, content: 3}]", "'content' must be text, not 3"),
    ],
)
def test_each_template_fault(tmp_path: Path, template: str, part: str) -> None:
    (fault,) = faults(write(tmp_path, f"task:\n  sources:\n    - path: a.csv\n      template: {template}\n"))
    assert fault.startswith("EXPERT.yaml:4: ")
    assert part in fault


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_expert(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: x\n# Küche\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8"):
        load_expert(tmp_path / "latin.yaml")


def test_yaml_tree_serves_other_files(tmp_path: Path) -> None:
    path = tmp_path / "RECIPE.yaml"
    path.write_text("model: here\ntargets: [a, 3]\nprune: {ratio: 0.25}\n", encoding="utf-8")
    root = read_yaml(path)
    assert root.require("model", str, "") == "here"
    assert [item.scalar(str, "") for item in root.items("targets")] == ["a", ""]
    prune = root.section("prune")
    assert prune is not None
    assert prune.take("ratio", float, 0.0) == 0.25
    assert root.items("absent") == []
    with pytest.raises(ConfigError) as caught:
        root.finish()
    assert caught.value.faults == (f"{path}:2: 'targets[1]' must be text, not 3; put it in quotes",)
