"""From an expert to its corpora: read, split, tokenise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cusprun.corpus.sources import read_source, source_name
from cusprun.corpus.split import split, text_hash
from cusprun.corpus.tokens import load_tokenizer, tokenize
from cusprun.errors import CorpusError
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Document, Expert, TokenizedDocument

_GENERAL = "general"


def build_corpora(expert: Expert, model_dir: Path, progress: Progress = SILENT) -> Corpora:
    """Read, split and tokenise the documents of an expert for the model in ``model_dir``.

    Raises:
        CorpusError: a source cannot be read, or a dimension is left without calibration documents or has
            several that are all one text.
        MissingDependencyError: a source needs a library that is not installed.
        ModelError: the model's tokenizer cannot be loaded.
    """
    documents, general = read_documents(expert, progress)
    calibration, held_out = split(documents, expert.held_out, expert.seed)
    calibration_texts = {text_hash(document) for document in calibration}
    general = [document for document in general if text_hash(document) not in calibration_texts]
    tokenizer = load_tokenizer(model_dir)
    tokens = tokenize([*calibration, *held_out, *general], tokenizer, expert.max_tokens, progress)
    _require_calibration(expert, documents, calibration, tokens)
    _require_different(expert, documents, tokens)
    apart = {text_hash(document) for document in held_out}
    seen = [item for item in tokens if item.dimension != _GENERAL and item.text_hash not in apart]
    # Two texts that differ only beyond max_tokens are one to the model, and must not be on both sides.
    seen_ids = {item.token_ids for item in seen}
    unseen = [item for item in tokens if item.token_ids not in seen_ids]
    corpora = Corpora(
        calibration=tuple(seen),
        held_out=tuple(item for item in unseen if item.dimension != _GENERAL),
        general=tuple(item for item in unseen if item.dimension == _GENERAL),
    )
    if expert.general and not corpora.general:
        raise CorpusError(
            f"the general corpus of {expert.name!r} has no document of two tokens or more that "
            "is not among the calibration documents; give it other sources"
        )
    return corpora


def read_documents(expert: Expert, progress: Progress = SILENT) -> tuple[list[Document], list[Document]]:
    """Read every source; returns (documents of the dimensions, general documents without doubles).

    Raises:
        CorpusError: a source cannot be read.
        MissingDependencyError: a source needs a library that is not installed.
    """
    named = [(name, source) for name, sources in expert.dimensions.items() for source in sources]
    named += [(_GENERAL, source) for source in expert.general]
    documents: list[Document] = []
    with progress.stage("reading corpora", len(named), "source") as advance:
        for name, source in named:
            documents += read_source(source, name)
            advance(1)
    general = {text_hash(document): document for document in documents if document.dimension == _GENERAL}
    return [document for document in documents if document.dimension != _GENERAL], list(general.values())


def _require_calibration(
    expert: Expert,
    documents: Sequence[Document],
    calibration: Sequence[Document],
    tokens: Sequence[TokenizedDocument],
) -> None:
    """Raise ``CorpusError`` when a dimension has no calibration document that the model can use."""
    usable = {(item.dimension, item.text_hash) for item in tokens}
    for dimension, sources in expert.dimensions.items():
        chosen = [document for document in calibration if document.dimension == dimension]
        if any((dimension, text_hash(document)) in usable for document in chosen):
            continue
        number = sum(document.dimension == dimension for document in documents)
        names = ", ".join(map(source_name, sources)) or "no sources"
        raise CorpusError(
            f"the {dimension} corpus of {expert.name!r} ({names}) has {number} documents, "
            f"{len(chosen)} of them for calibration and 0 of these of two tokens or more; "
            "add documents"
        )


def _require_different(
    expert: Expert, documents: Sequence[Document], tokens: Sequence[TokenizedDocument]
) -> None:
    """Raise ``CorpusError`` when a dimension has several documents that are all one text to the model."""
    usable = {(item.dimension, item.text_hash) for item in tokens}
    for dimension in expert.dimensions:
        number = sum(
            (dimension, text_hash(document)) in usable
            for document in documents
            if document.dimension == dimension
        )
        distinct = {item.token_ids for item in tokens if item.dimension == dimension}
        if number > 1 and len(distinct) == 1:
            raise CorpusError(
                f"all {number} documents of the {dimension} corpus of {expert.name!r} are the same text in "
                f"their first {expert.max_tokens} tokens, which says nothing about what the expert needs; "
                "add other documents"
            )


def corpus_hash(corpora: Corpora) -> str:
    """Return the SHA-256, in hex, of the calibration documents: dimension, text and tokens, in any order."""
    lines = sorted(
        f"{item.dimension} {item.text_hash} {','.join(map(str, item.token_ids))}"
        for item in corpora.calibration
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
