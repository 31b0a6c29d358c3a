"""The quality of one point of a curve: likelihoods of documents reduced to a row for each set of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cusprun.pipeline.evaluation import by_set
from cusprun.quality.report import CorpusQuality, Estimate, corpus_quality
from cusprun.records import TokenizedDocument

if TYPE_CHECKING:
    from cusprun.quality.likelihood import DocumentLikelihood


@dataclass(frozen=True)
class CurveQuality:
    """One model on one set of documents; ``perplexity_ratio`` is to the original's, None for itself."""

    documents: int
    predicted_tokens: int
    perplexity: Estimate
    perplexity_ratio: Estimate | None = None

    @classmethod
    def of(cls, quality: CorpusQuality) -> CurveQuality:
        """Take from a row what can be known without running both models side by side."""
        return cls(quality.documents, quality.predicted_tokens, quality.perplexity, quality.perplexity_ratio)


def qualities(
    sets: Mapping[str, tuple[TokenizedDocument, ...]],
    own: Sequence[DocumentLikelihood],
    original: Sequence[DocumentLikelihood] | None = None,
) -> dict[str, CurveQuality]:
    """Return a row for each of ``sets``; the likelihoods are of their documents, set after set."""
    base = {} if original is None else by_set(sets, original)
    return {
        name: CurveQuality.of(corpus_quality(found, base.get(name)))
        for name, found in by_set(sets, own).items()
    }
