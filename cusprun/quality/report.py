"""How good models are on an expert's documents, with intervals: records and their mathematics. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cusprun.quality.likelihood import DocumentLikelihood

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value over all documents, and the interval that it varies in when other documents are drawn."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CorpusQuality:
    """One model on one set of documents.

    ``perplexity`` is per predicted token (all but a document's first). Against the reference model:
    ``perplexity_ratio`` is this model's over the reference's, ``mean_kl_divergence`` is KL(reference ||
    model) in nats per token, ``top1_agreement`` the share of tokens at which both find the same token most
    likely.
    These are None for the reference itself.
    """

    documents: int
    predicted_tokens: int
    perplexity: Estimate
    perplexity_ratio: Estimate | None = None
    mean_kl_divergence: Estimate | None = None
    top1_agreement: Estimate | None = None


@dataclass(frozen=True)
class TaskQuality:
    """One model on one task: ``score`` is the mean of ``metric`` over its documents, from 0 to 1.

    ``difference`` is this model's score minus the reference's on the same documents; None for the reference.
    """

    name: str
    metric: str
    documents: int
    score: Estimate
    difference: Estimate | None = None


@dataclass(frozen=True)
class ModelQuality:
    """One model on every set of documents, ``held_out`` (the expert's own) and ``general``, and on tasks."""

    model: str
    model_hash: str
    num_parameters: int
    corpora: Mapping[str, CorpusQuality]
    tasks: tuple[TaskQuality, ...] = ()


@dataclass(frozen=True)
class EvalReport:
    """Models side by side; the first is the reference. Intervals are bootstrap intervals over documents."""

    created: str
    cusprun_version: str
    expert: str
    models: tuple[ModelQuality, ...]
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES
    seed: int = 0
    schema_version: int = 1

    def corpus_names(self) -> tuple[str, ...]:
        """Return the sets of documents that were measured."""
        return tuple(self.models[0].corpora)


def corpus_quality(
    likelihoods: Sequence[DocumentLikelihood],
    reference: Sequence[DocumentLikelihood] | None = None,
    seed: int = 0,
) -> CorpusQuality:
    """Reduce a model's documents to one row; ``reference`` holds the same documents under the first model.

    The intervals are percentile bootstrap intervals: documents are drawn with replacement, and each draw
    gives sums over its tokens; model and reference see the same draws, so the ratio is paired.
    """
    tokens = _column(likelihoods, "num_predicted_tokens")
    draws = resampled(len(likelihoods), seed)
    nll = _column(likelihoods, "negative_log_likelihood")
    perplexity = np.exp(mean_per_token(nll, tokens, draws))
    row = CorpusQuality(len(likelihoods), int(tokens.sum()), _estimate(perplexity))
    if reference is None:
        return row
    other = np.exp(mean_per_token(_column(reference, "negative_log_likelihood"), tokens, draws))
    return CorpusQuality(
        documents=row.documents,
        predicted_tokens=row.predicted_tokens,
        perplexity=row.perplexity,
        perplexity_ratio=_estimate(perplexity / other),
        mean_kl_divergence=_estimate(mean_per_token(_column(likelihoods, "kl_divergence"), tokens, draws)),
        top1_agreement=_estimate(mean_per_token(_column(likelihoods, "top1_agreements"), tokens, draws)),
    )


def task_quality(
    name: str, metric: str, scores: Sequence[float], reference: Sequence[float] | None = None, seed: int = 0
) -> TaskQuality:
    """Reduce a model's scores on the documents of a task; ``reference`` holds those of the first model.

    The intervals are as those of :func:`corpus_quality`; the difference is paired.
    """
    draws = resampled(len(scores), seed)
    own = np.array(scores, dtype=np.float64)
    row = TaskQuality(name, metric, len(scores), _estimate(own[draws].mean(axis=1)))
    if reference is None:
        return row
    apart = own - np.array(reference, dtype=np.float64)
    return replace(row, difference=_estimate(apart[draws].mean(axis=1)))


def resampled(count: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """Return positions [1 + resamples, count]: first each document once, then draws with replacement."""
    draws = np.random.default_rng(seed).integers(0, count, size=(resamples, count))
    return np.concatenate([np.arange(count)[np.newaxis], draws])


def mean_per_token(
    sums: NDArray[np.float64], tokens: NDArray[np.float64], draws: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return, for each row of ``draws``, the documents' sums over the documents' tokens."""
    means: NDArray[np.float64] = sums[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    return means


def _column(likelihoods: Sequence[DocumentLikelihood], name: str) -> NDArray[np.float64]:
    return np.array([getattr(likelihood, name) for likelihood in likelihoods], dtype=np.float64)


def _estimate(values: NDArray[np.float64]) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[1:], (tail, 1 - tail))
    return Estimate(float(values[0]), float(low), float(high))
