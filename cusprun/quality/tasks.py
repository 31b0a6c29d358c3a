"""Tasks that models are scored on: what a tasks file says, and its documents with prompts and answers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cusprun.corpus.readers import Row, read_file
from cusprun.corpus.templates import Parts, field_names, parse_template, render, require_fields
from cusprun.corpus.yaml_tree import Check, Section, Value, read_yaml
from cusprun.errors import CorpusError, nearest
from cusprun.paths import expand_home
from cusprun.quality.answers import ARTICLES, METRICS, answer_number

_SHOT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class TaskSpec:
    """One task: rows of ``path`` through the template ``prompt``, answers judged by ``metric``.

    ``answer`` is the name of a field, which may hold a list of right answers, or a template. Generation is
    greedy and ends after ``max_new_tokens`` tokens or before one of the texts of ``stop``. ``shots`` solved
    examples, drawn by ``seed`` from ``shots_path``, stand before each prompt. ``language`` says which
    articles do not count in F1 and EM.
    """

    name: str
    path: str
    prompt: str
    answer: str
    metric: str
    max_new_tokens: int
    stop: tuple[str, ...]
    limit: int | None = None
    shots: int = 0
    shots_path: str | None = None
    language: str = "en"
    seed: int = 0


@dataclass(frozen=True)
class TaskDocument:
    """What the model is given, shots and all, and the right answers."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task and its documents."""

    spec: TaskSpec
    documents: tuple[TaskDocument, ...]


_DEFAULT_TOKENS = {"exact_match": 256, "f1": 32, "em": 32}
_DEFAULT_STOP = {"exact_match": ("\n\n",), "f1": ("\n",), "em": ("\n",)}


def load_tasks(path: Path) -> tuple[Task, ...]:
    """Read a tasks file and the documents of its tasks.

    A YAML file holds ``tasks``, a list; see :class:`TaskSpec` for the keys. ``path`` and ``shots_path`` are
    relative to its folder. Unless said otherwise, ``exact_match`` generates 256 tokens up to a blank line,
    ``f1`` and ``em`` 32 up to the end of the line. A ``.jsonl`` file is one task with the fields ``prompt``
    and ``answer``: ``exact_match`` when every answer has a number, else ``f1``.

    Raises:
        ConfigError: the tasks file has faults; all of them, each with its line.
        CorpusError: the documents of a task are missing, empty, or have rows that cannot be used.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return (_from_rows(path),)
    root = read_yaml(path)
    root.require_one(("tasks",))
    listed = root.value("tasks")
    items = [] if listed is None else listed.items()
    if listed is not None and listed.is_list and not items:
        listed.fault("'tasks' must name at least one task")
    specs: dict[str, TaskSpec] = {}
    for item in items:
        section = item.section()
        spec = _spec(section, path.absolute().parent)
        if spec.name in specs:
            section.fault("name", f"the name {spec.name!r} is another task's already")
        specs[spec.name] = spec
    root.finish()
    return tuple(Task(spec, _documents(spec)) for spec in specs.values())


def _from_rows(path: Path) -> Task:
    spec = _defaults(
        name=path.stem, path=str(path.absolute()), prompt="{prompt}", answer="answer", metric="f1"
    )
    documents = _documents(spec)
    if all(answer_number(answer) is not None for document in documents for answer in document.answers):
        spec = _defaults(spec.name, spec.path, spec.prompt, spec.answer, "exact_match")
    return Task(spec, documents)


def _defaults(name: str, path: str, prompt: str, answer: str, metric: str) -> TaskSpec:
    return TaskSpec(name, path, prompt, answer, metric, _DEFAULT_TOKENS[metric], _DEFAULT_STOP[metric])


def _spec(section: Section, folder: Path) -> TaskSpec:
    metric = section.require("metric", str, "f1", _one_of(METRICS))
    shots = section.take("shots", int, 0, _at_least(0))
    shots_path = section.take("shots_path", str, None, _not_blank)
    if shots and not section.has("shots_path"):
        section.fault("shots", "'shots' needs 'shots_path', the file that the examples are drawn from")
    language = section.take("language", str, "en", _one_of(ARTICLES))
    if section.has("language") and metric == "exact_match":
        section.fault("language", "'language' belongs to the metrics f1 and em, not to exact_match")
    return TaskSpec(
        name=section.require("name", str, "", _not_blank),
        path=str(folder / expand_home(section.require("path", str, "", _not_blank))),
        prompt=_prompt(section),
        answer=_answer(section),
        metric=metric,
        max_new_tokens=section.take("max_new_tokens", int, _DEFAULT_TOKENS[metric], _at_least(1)),
        stop=_stop(section.value("stop"), _DEFAULT_STOP[metric]),
        limit=section.take("limit", int, None, _at_least(1)),
        shots=shots,
        shots_path=None if shots_path is None else str(folder / expand_home(shots_path)),
        language=language,
        seed=section.take("seed", int, 0, _at_least(0)),
    )


def _not_blank(value: str) -> str:
    return "" if value.strip() else "must not be blank"


def _at_least(least: int) -> Check:
    return lambda value: "" if value >= least else f"must be at least {least}, not {value}"


def _one_of(known: Iterable[str]) -> Check:
    names = list(known)
    return lambda value: (
        ""
        if value in names
        else f"must be one of {', '.join(names)}, not {value!r}{nearest(str(value), names)}"
    )


def _prompt(section: Section) -> str:
    text = section.require("prompt", str, "", _not_blank)
    try:
        if text:
            require_fields([parse_template(text)])
    except ValueError as error:
        section.fault("prompt", str(error))
    return text


def _answer(section: Section) -> str:
    text = section.require("answer", str, "", _not_blank)
    try:
        if text:
            require_fields([_answer_parts(text)])
    except ValueError as error:
        section.fault("answer", str(error))
    return text


def _answer_parts(answer: str) -> Parts:
    """Parse an answer, which is the name of a field unless it has braces."""
    return parse_template(answer if "{" in answer or "}" in answer else f"{{{answer}}}")


def _stop(value: Value | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return default
    texts = [item.scalar(str, "", lambda text: "" if text else "must not be empty") for item in value.items()]
    return tuple(texts)


def _documents(spec: TaskSpec) -> tuple[TaskDocument, ...]:
    documents = _read(spec, spec.path, spec.limit)
    if spec.metric == "exact_match":
        for place, document in documents:
            _require_numbers(place, document.answers)
    shots = _shots(spec, {document.prompt for _, document in documents})
    return tuple(TaskDocument(shots + document.prompt, document.answers) for _, document in documents)


def _read(spec: TaskSpec, path: str, limit: int | None = None) -> list[tuple[str, TaskDocument]]:
    """Return (place, document without shots) of the rows of a file."""
    prompt = parse_template(spec.prompt)
    answer = _answer_parts(spec.answer)
    found = [
        (row.place, TaskDocument(_filled(prompt, row), _answers(spec, answer, row)))
        for row in islice(read_file(Path(path)), None if limit is None else min(limit, sys.maxsize))
    ]
    for place, document in found:
        if not document.prompt.strip():
            raise CorpusError(f"{place} has an empty prompt; mend the row or remove it")
    if not found:
        raise CorpusError(f"{path} has no rows for the task {spec.name!r}; give it some")
    return found


def _filled(parts: Parts, row: Row) -> str:
    try:
        text = render(parts, row.fields)
    except KeyError:
        missing = next(name for name in field_names(parts) if name not in row.fields)
        raise CorpusError(
            f"{row.place} has no field {missing!r}{nearest(missing, row.fields)} "
            f"(fields: {', '.join(row.fields) or 'none'}); mend the row or the task"
        ) from None
    except TypeError as error:
        raise CorpusError(
            f"{row.place}: the field {error.args[0]!r} is not text or a number; name another field"
        ) from None
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise CorpusError(f"{row.place} has half a character (a lone surrogate); mend or remove it") from None
    return text


def _answers(spec: TaskSpec, template: Parts, row: Row) -> tuple[str, ...]:
    value = row.fields.get(spec.answer)
    # SQuAD itself holds its answers as {"text": [...], "answer_start": [...]}.
    listed = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(listed, list):
        answers = [_filled(template, row)]
    else:
        answers = [str(item) for item in listed if isinstance(item, str | int | float)]
        if len(answers) < len(listed):
            raise CorpusError(f"{row.place}: the answers in {spec.answer!r} are not all texts; mend the row")
    if not any(answer.strip() for answer in answers):
        raise CorpusError(f"{row.place} has no answer in {spec.answer!r}; mend the row or remove it")
    return tuple(answers)


def _require_numbers(place: str, answers: Iterable[str]) -> None:
    for answer in answers:
        if answer_number(answer) is None:
            raise CorpusError(
                f"{place}: the answer {answer[-40:]!r} ends in no whole or decimal number, which exact_match "
                "compares; write it as a number like 1234.5, or use the metric em"
            )


def _shots(spec: TaskSpec, prompts: set[str]) -> str:
    """Return the solved examples that stand before every prompt; none of them is asked about itself."""
    if not spec.shots or spec.shots_path is None:
        return ""
    pool = {
        document.prompt: document
        for _, document in _read(spec, spec.shots_path)
        if document.prompt not in prompts
    }
    if len(pool) < spec.shots:
        raise CorpusError(
            f"{spec.shots_path} has {len(pool)} examples besides the questions of {spec.name!r} themselves, "
            f"and 'shots' is {spec.shots}; give it more or ask for fewer"
        )
    drawn = random.Random(spec.seed).sample(sorted(pool), spec.shots)
    return "".join(_solved(pool[prompt]) + _SHOT_SEPARATOR for prompt in drawn)


def _solved(document: TaskDocument) -> str:
    space = "" if document.prompt[-1:].isspace() else " "
    return f"{document.prompt}{space}{document.answers[0].strip()}"
