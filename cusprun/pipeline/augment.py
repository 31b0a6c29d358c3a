"""More calibration documents, made by the model itself, for people who have twenty and not two thousand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import cache_folder, cached
from cusprun.codec import json_bytes, key_of, load_json, to_plain
from cusprun.errors import CorpusError, StoreError
from cusprun.pipeline.workspaces import require_whole_model
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Document, Expert, TokenizedDocument
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.corpus.augment import Prompt
    from cusprun.pipeline.opening import OpenModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """What is kept of a generation: for each prompt the token ids after it, as text like ``17 4 301``."""

    token_ids: tuple[str, ...]
    schema_version: int = 1


def augmented(opened: OpenModel, expert: Expert, corpora: Corpora, progress: Progress = SILENT) -> Corpora:
    """Return corpora with the calibration documents that ``expert.augment`` asks for; as they are without it.

    The model goes on with the beginnings of calibration documents, never of held-out ones, and what it makes
    joins their dimension, after the given documents, unless it repeats a text that is there or held out. The
    model is held in memory as a whole, in the type of its weights. What was generated is kept in the cache,
    so that every stage and every run sees the same documents.

    Raises:
        CorpusError: a document could get longer than the model's context.
        ModelError: transformers cannot load the model or its tokenizer, or its logits are not finite.
        OutputError: the cache cannot be written.
    """
    if expert.augment is None:
        return corpora
    from cusprun.corpus.augment import choose_prompts, keep_new
    from cusprun.corpus.split import text_hash
    from cusprun.corpus.tokens import load_tokenizer

    prompts = choose_prompts(corpora, expert.augment, expert.seed, expert.max_tokens)
    if not prompts:
        return corpora
    _require_room(opened, expert, prompts)
    require_whole_model(opened, "generating documents")
    rows = _generated(opened, expert, corpora, prompts, progress)
    tokenizer = load_tokenizer(opened.index.folder)

    def hash_of(ids: tuple[int, ...]) -> str:
        return text_hash(Document("", tokenizer.decode(list(ids), skip_special_tokens=True)))

    made = []
    for prompt, row in zip(prompts, rows, strict=True):
        ids = (*prompt.token_ids, *row)
        made.append(TokenizedDocument(prompt.dimension, hash_of(ids), ids))
    new = keep_new(corpora, made, hash_of)
    log.info(
        "%d documents that the model made join the %d given ones%s",
        len(new),
        len(corpora.calibration),
        "" if len(new) == len(made) else f"; {len(made) - len(new)} more repeat others and were dropped",
    )
    return replace(corpora, calibration=(*corpora.calibration, *new))


def _require_room(opened: OpenModel, expert: Expert, prompts: Sequence[Prompt]) -> None:
    """Raise ``CorpusError`` when a document could get longer than the model's context."""
    from cusprun.pipeline.evaluation import context_length

    context = context_length(opened)
    longest = max(len(prompt.token_ids) + prompt.max_new_tokens for prompt in prompts)
    if context is not None and longest > context:
        raise CorpusError(
            f"'augment' of {expert.name!r} makes documents of up to {longest} tokens, and {opened.source} "
            f"reads at most {context}; lower 'max_new_tokens' or 'prompt_tokens' of 'augment', or "
            f"'max_tokens' to {context}"
        )


def _generated(
    opened: OpenModel,
    expert: Expert,
    corpora: Corpora,
    prompts: tuple[Prompt, ...],
    progress: Progress,
) -> list[tuple[int, ...]]:
    from cusprun.corpus import corpus_hash

    assert expert.augment is not None
    name = key_of(
        "augment",
        opened.model_hash,
        corpus_hash(corpora),
        to_plain(expert.augment),
        [expert.seed, expert.max_tokens],
        [prompt.seed for prompt in prompts],
        __version__,
        *opened.device.in_float32.key,
    )

    def make(path: Path) -> None:
        _generate(opened, prompts, expert, path, progress)

    vocab_size = opened.index.shape.vocab_size
    path, found = cached("augmented", f"{name}.json", make)
    try:
        rows = _read(path, len(prompts), vocab_size)
    except StoreError:
        log.info("the generated documents in %s are damaged; generating again", cache_folder())
        path.unlink(missing_ok=True)
        path, found = cached("augmented", f"{name}.json", make)
        rows = _read(path, len(prompts), vocab_size)
    if found:
        log.info("found documents generated before from the same ones; not generating again")
    return rows


def _generate(
    opened: OpenModel, prompts: tuple[Prompt, ...], expert: Expert, path: Path, progress: Progress
) -> None:
    from cusprun.checkpoint.output import atomic_file
    from cusprun.corpus.tokens import load_tokenizer
    from cusprun.quality.continuation import continuations
    from cusprun.quality.stock import load_stock_model

    assert expert.augment is not None
    rows = continuations(
        load_stock_model(opened.index.folder, opened.device),
        load_tokenizer(opened.index.folder),
        prompts,
        expert.augment.temperature,
        progress,
        device=opened.device,
    )
    with atomic_file(path) as partial:
        partial.write_bytes(json_bytes(Generated(tuple(" ".join(map(str, row)) for row in rows))))


def _read(path: Path, count: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Return the rows of a cached generation; raises ``StoreError`` when it is damaged."""
    kept = load_json(Generated, path, StoreError)
    try:
        rows = [tuple(int(token) for token in row.split()) for row in kept.token_ids]
    except ValueError:
        rows = []
    if len(rows) != count or not all(0 <= token < vocab_size for row in rows for token in row):
        raise StoreError(f"{path} does not hold {count} rows of token ids below {vocab_size}; remove it")
    return rows
