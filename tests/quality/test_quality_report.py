"""The intervals of the quality report against independent arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cusprun.codec import from_plain, to_plain
from cusprun.quality.likelihood import DocumentLikelihood
from cusprun.quality.report import CorpusQuality, corpus_quality, resampled


def documents(seed: int, shift: float = 0.0) -> list[DocumentLikelihood]:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(20, 200, size=60)
    losses = 2.0 + 0.3 * generator.standard_normal(60) + shift
    return [
        DocumentLikelihood(int(n), float(n * loss), float(n * 0.1), int(n // 2))
        for n, loss in zip(tokens, losses, strict=True)
    ]


def test_values_are_sums_over_tokens() -> None:
    base, other = documents(0), documents(0, 0.1)
    row = corpus_quality(other, base)
    tokens = sum(d.num_predicted_tokens for d in base)
    assert row.predicted_tokens == tokens
    assert row.perplexity.value == pytest.approx(
        math.exp(sum(d.negative_log_likelihood for d in other) / tokens)
    )
    assert row.mean_kl_divergence is not None
    assert row.mean_kl_divergence.value == pytest.approx(0.1)
    assert row.top1_agreement is not None
    assert row.top1_agreement.value == pytest.approx(sum(d.num_predicted_tokens // 2 for d in base) / tokens)


def test_a_constant_shift_has_no_spread_because_the_ratio_is_paired() -> None:
    row = corpus_quality(documents(0, 0.1), documents(0))
    assert row.perplexity_ratio is not None
    for value in (row.perplexity_ratio.low, row.perplexity_ratio.value, row.perplexity_ratio.high):
        assert value == pytest.approx(math.exp(0.1))
    assert row.perplexity.high - row.perplexity.low > 0.1


def test_the_interval_agrees_with_the_normal_approximation() -> None:
    """Delta method for a ratio of sums; 60 documents are enough for 10 %."""
    found = documents(3)
    tokens = np.array([d.num_predicted_tokens for d in found])
    nll = np.array([d.negative_log_likelihood for d in found])
    mean = nll.sum() / tokens.sum()
    error = math.sqrt(((nll - mean * tokens) ** 2).sum()) / tokens.sum()
    row = corpus_quality(found)
    assert math.log(row.perplexity.low) == pytest.approx(mean - 1.96 * error, abs=0.1 * 1.96 * error)
    assert math.log(row.perplexity.high) == pytest.approx(mean + 1.96 * error, abs=0.1 * 1.96 * error)


def test_the_reference_has_no_comparison() -> None:
    row = corpus_quality(documents(0))
    assert (row.perplexity_ratio, row.mean_kl_divergence, row.top1_agreement) == (None, None, None)
    assert from_plain(CorpusQuality, to_plain(row)) == row


def test_draws_are_the_same_for_the_same_seed_and_begin_with_all() -> None:
    draws = resampled(7, 1)
    assert draws[0].tolist() == list(range(7))
    assert (draws == resampled(7, 1)).all()
    assert not (draws == resampled(7, 2)).all()
    assert draws.min() == 0
    assert draws.max() == 6


def test_one_document_has_an_interval_of_no_width() -> None:
    row = corpus_quality(documents(0)[:1])
    assert row.perplexity.low == row.perplexity.value == row.perplexity.high
