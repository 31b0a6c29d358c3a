"""What original and expert answer to a few of the expert's own held-out prompts, to be read side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from cusprun.errors import ModelError
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Document, Expert, Message

DEFAULT_SAMPLES, MAX_SAMPLES = 2, 3
"""Prompts of a run: two models answer three of them in seconds, also where a token takes 100 ms."""

MAX_NEW_TOKENS = 64
_MAX_PROMPT_TOKENS = 512
_MAX_BEGINNING_TOKENS = 48
"""Tokens of a plain text that are gone on with; of a shorter text, its first half."""

_DIMENSION_ORDER = ("task", "domain", "language")
"""The task's documents come first: their prompts are those that users will write."""


@dataclass(frozen=True)
class SampleAnswer:
    """One prompt and the greedy answers of both models, cut at ``max_new_tokens`` tokens.

    ``reference`` is what the corpus itself goes on with, cut too where it is a plain text. ``prompt`` holds
    the turns of a chat as paragraphs ``role: content`` when there are several.
    """

    prompt: str
    before: str
    after: str
    reference: str
    max_new_tokens: int = MAX_NEW_TOKENS
    dimension: str = ""


@dataclass(frozen=True)
class SampleReport:
    """``samples.json``: the answers, and the library that ran both models."""

    runtime: str
    answers: tuple[SampleAnswer, ...]
    schema_version: int = 1


@dataclass(frozen=True)
class _Prompt:
    """What both models are asked: a chat's ``messages``, or the ``ids`` that a plain text begins with."""

    shown: str
    reference: str
    dimension: str
    ids: tuple[int, ...]


def sample_answers(
    models: Mapping[str, tuple[Path, str]],
    tokenizer_folder: Path,
    expert: Expert,
    corpora: Corpora,
    count: int = DEFAULT_SAMPLES,
    progress: Progress = SILENT,
) -> SampleReport:
    """Let two models answer ``count`` held-out documents of an expert, greedily.

    ``models`` are ``before`` and ``after``, each a path and its format, a key of
    ``cusprun.pipeline.proof.RUNTIMES``, or ``torch`` for a Hugging Face folder. They run one after the other.
    The tokenizer in ``tokenizer_folder``, which both share, turns what they answer into text.

    Raises:
        ModelError: a model or the tokenizer is missing or damaged.
        MissingDependencyError: a runtime is not installed.
        CorpusError: a source of the expert cannot be read any more.
    """
    from cusprun.corpus.tokens import load_tokenizer

    documents = list(_in_turns(_held_out(expert, corpora, progress)))
    tokenizer = load_tokenizer(tokenizer_folder)
    prompts: list[_Prompt] = []
    answers: dict[str, list[str]] = {}
    name = ""
    for side, (path, kind) in models.items():
        with progress.stage(f"answering samples, {side}", count, "prompt") as advance:
            runtime = _opened(path, kind)
            try:
                name = runtime.name
                # Chosen once, by the first model: both are asked the same token ids.
                prompts = prompts or _prompts(documents, runtime, tokenizer, count)
                answers[side] = []
                for prompt in prompts:
                    ids = list(runtime.generate(prompt.ids, MAX_NEW_TOKENS))
                    answers[side].append(_text(tokenizer, ids))
                    advance(1)
            finally:
                runtime.close()
    pairs = zip(prompts, *answers.values(), strict=True)
    return SampleReport(
        runtime=name,
        answers=tuple(
            SampleAnswer(prompt.shown, before, after, prompt.reference, MAX_NEW_TOKENS, prompt.dimension)
            for prompt, before, after in pairs
        ),
    )


def _opened(path: Path, kind: str) -> Any:
    from cusprun.pipeline.proof import RUNTIMES

    if kind in RUNTIMES:
        return RUNTIMES[kind].open(path)
    from serve.runtimes.torch_runtime import TorchRuntime

    return TorchRuntime(path)


def _held_out(expert: Expert, corpora: Corpora, progress: Progress) -> list[Document]:
    """Return the documents, as they were written, that no model was calibrated on."""
    from cusprun.corpus.build import read_documents
    from cusprun.corpus.split import split, text_hash

    apart = {document.text_hash for document in corpora.held_out}
    documents, _ = read_documents(expert, progress)
    _, held_out = split(documents, expert.held_out, expert.seed)
    return [document for document in held_out if text_hash(document) in apart]


def _in_turns(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents of each dimension in turn, chats first among a dimension's."""
    groups: dict[str, list[Document]] = {name: [] for name in _DIMENSION_ORDER}
    for document in sorted(documents, key=lambda one: not one.messages):
        groups.setdefault(document.dimension, []).append(document)
    for turn in zip_longest(*groups.values()):
        yield from (document for document in turn if document is not None)


def _prompts(documents: Sequence[Document], runtime: Any, tokenizer: Any, count: int) -> list[_Prompt]:
    """Return the first prompts that are neither too long nor refused by the model's chat template."""
    found: list[_Prompt] = []
    for document in documents:
        if len(found) == count:
            break
        prompt = (_of_chat if document.messages else _of_text)(document, runtime, tokenizer)
        if prompt is not None and 0 < len(prompt.ids) <= _MAX_PROMPT_TOKENS:
            found.append(prompt)
    return found


def _of_chat(document: Document, runtime: Any, _tokenizer: Any) -> _Prompt | None:
    """Return the turns up to the last one of the assistant; without a chat template, as paragraphs."""
    turns = list(document.messages)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if len(turns) < 2:
        return None
    asked, answer = turns[:-1], turns[-1].content
    try:
        ids = runtime.chat_token_ids(asked)
    except ModelError:
        return None
    if not ids:
        ids = runtime.tokenize(f"{_paragraphs(asked)}\n\nassistant:", add_special=True)
    shown = asked[0].content if len(asked) == 1 else _paragraphs(asked)
    return _Prompt(shown, answer, document.dimension, tuple(ids))


def _paragraphs(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


def _of_text(document: Document, runtime: Any, tokenizer: Any) -> _Prompt | None:
    ids = runtime.tokenize(document.text, add_special=True)
    length = min(_MAX_BEGINNING_TOKENS, len(ids) // 2)
    reference = ids[length : length + MAX_NEW_TOKENS]
    return _Prompt(
        _text(tokenizer, ids[:length]), _text(tokenizer, reference), document.dimension, tuple(ids[:length])
    )


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
