"""The documents of the refit: which are only judged on, what their tokens weigh, and the anchors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.pruning.refit import RefitSettings
from cusprun.records import TokenizedDocument
from cusprun.walk.batches import Batch

ANCHOR = "anchor"
"""The dimension of the documents of :func:`anchor_documents`."""


@dataclass(frozen=True)
class TokenWeights:
    """Weights of every batch's tokens, [documents, tokens], zero at padding: fitted, and judged on."""

    fit: tuple[torch.Tensor, ...]
    apart: tuple[torch.Tensor, ...]


def token_weights(
    batches: Sequence[Batch], documents: Sequence[TokenizedDocument], settings: RefitSettings
) -> TokenWeights:
    """Return what the tokens weigh: of the documents of :func:`judged_documents`, and of the others."""
    weights = document_weights(documents, settings.weights)
    judged = judged_documents(documents, settings)
    fit, apart = [], []
    for batch in batches:
        rows = torch.tensor([weights[document] for document in batch.documents]).unsqueeze(-1) * batch.mask
        is_apart = torch.tensor([document in judged for document in batch.documents]).unsqueeze(-1)
        fit.append(torch.where(is_apart, 0.0, rows))
        apart.append(torch.where(is_apart, rows, 0.0))
    return TokenWeights(tuple(fit), tuple(apart))


def judged_documents(documents: Sequence[TokenizedDocument], settings: RefitSettings) -> set[int]:
    """Return the positions of those that are kept apart; the last one that weighs when none of them does."""
    weights = document_weights(documents, settings.weights)
    judged = set(apart_documents(documents, settings.held_out))
    fitted = [
        position
        for position, document in enumerate(documents)
        if weights[position] > 0 and document.dimension != ANCHOR
    ]
    if settings.mode == "refit" and settings.held_out and len(fitted) > 1 and judged.isdisjoint(fitted):
        judged.add(fitted[-1])  # a refit that is judged on what it was fitted on always looks good
    return judged


def document_weights(documents: Sequence[TokenizedDocument], weights: Mapping[str, float]) -> list[float]:
    """Return what the tokens of each document weigh: the heaviest dimension 1, and anchors 1 too.

    Only the proportions of ``weights`` count, so that none leaves the range of float32.
    """
    own = {document.dimension: weights.get(document.dimension, 1.0) for document in documents}
    own.pop(ANCHOR, None)
    largest = max(own.values(), default=0.0) or 1.0
    scaled = {ANCHOR: 1.0, **{dimension: weight / largest for dimension, weight in own.items()}}
    return [scaled[document.dimension] for document in documents]


def apart_documents(documents: Sequence[TokenizedDocument], share: float) -> list[int]:
    """Return the positions of the documents that the ridge is judged on: of each dimension every n-th.

    None where a dimension has fewer than n documents; anchors are never among them.
    """
    step = round(1 / share) if share else len(documents) + 1
    chosen, counts = [], dict[str, int]()
    for position, document in enumerate(documents):
        if document.dimension == ANCHOR:
            continue
        counts[document.dimension] = counts.get(document.dimension, 0) + 1
        if counts[document.dimension] % step == 0:
            chosen.append(position)
    return chosen


def anchor_documents(
    documents: Sequence[TokenizedDocument], index: CheckpointIndex, count: int
) -> tuple[TokenizedDocument, ...]:
    """Return one-token documents, a seeded sample of the vocabulary.

    The first token of a text sees no other, so its activations depend on that token alone; it is also where
    models put their attention sink, and the documents show only the few tokens that they begin with. On
    documents set apart (SmolLM2-135M, ratio 0.25) 3,000 anchors took general text from 3.08 to 2.96 times the
    original's perplexity and the expert's from 1.091 to 1.089. A model that reads every text after a BOS
    token has one first token, and needs none.
    """
    bos = index.config.get("bos_token_id")
    if not count or all(document.token_ids[0] == bos for document in documents):
        return ()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(index.shape.vocab_size, generator=generator)[:count].tolist()
    return tuple(TokenizedDocument(ANCHOR, f"{ANCHOR}-{token}", (token,)) for token in chosen)
