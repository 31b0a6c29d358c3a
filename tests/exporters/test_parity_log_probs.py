"""Parity with runtimes that name only the likeliest tokens, as servers do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cusprun.errors import GateError
from exporters.parity_logits import compare_logits, logit_failures
from exporters.parity_records import LOG_PROBS, Limits, LogitParity

VOCAB = 24
DOCUMENT = [3, 1, 4, 1, 5, 9, 2, 6]


class Reference:
    """Gives the logits it was made with, whatever the tokens."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self._logits = logits

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return self._logits

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        yield from (1, 2, 3)


class Server:
    """Names the ``k`` likeliest tokens of a softmax over the logits it was made with."""

    def __init__(self, logits: NDArray[np.float32], k: int) -> None:
        table = logits.astype(np.float64)
        self._log_probs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
        self._k = k

    def top_log_probs(self, token_ids: Sequence[int]) -> Any:
        ids = np.argsort(-self._log_probs, axis=1)[:, : self._k]
        coming = np.array(token_ids[1:])
        return SimpleNamespace(
            ids=ids,
            log_probs=np.take_along_axis(self._log_probs, ids, axis=1).astype(np.float32),
            next_log_probs=self._log_probs[np.arange(len(coming)), coming].astype(np.float32),
        )

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        yield from (1, 2, 4)


def tables(seed: int, noise: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    source = np.random.default_rng(seed)
    logits = source.normal(0, 2, (len(DOCUMENT), VOCAB)).astype(np.float32)
    return logits, logits + source.normal(0, noise, logits.shape).astype(np.float32)


def compared(wanted: NDArray[np.float32], candidate: Any) -> LogitParity:
    return compare_logits(Reference(wanted), candidate, [DOCUMENT], 512)  # type: ignore[arg-type]


def test_all_tokens_named_is_the_comparison_of_logits() -> None:
    wanted, found = tables(0, 0.1)
    whole, named = compared(wanted, Reference(found)), compared(wanted, Server(found, VOCAB))
    assert named.mean_kl == pytest.approx(whole.mean_kl, rel=1e-4)
    assert named.top1_agreement == whole.top1_agreement
    assert named.perplexity_candidate == pytest.approx(whole.perplexity_candidate, rel=1e-6)
    assert named.perplexity_reference == pytest.approx(whole.perplexity_reference, rel=1e-6)
    assert named.compared == LOG_PROBS


def test_the_same_model_differs_by_rounding_alone() -> None:
    wanted, _ = tables(1, 0.0)
    found = compared(wanted, Server(wanted, 5))
    assert found.mean_kl is not None
    assert abs(found.mean_kl) < 1e-6
    assert found.max_abs_logit_difference is not None
    assert found.max_abs_logit_difference < 1e-5
    assert found.top1_agreement == 1.0
    limits = Limits(max_abs_logit_difference=1e-5, mean_kl_max=1e-6, top1_agreement_min=1.0)
    assert not list(logit_failures(found, limits))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, VOCAB), st.floats(0.01, 3.0))
def test_the_merged_divergence_is_a_lower_bound_that_grows_with_the_tokens_named(
    seed: int, k: int, noise: float
) -> None:
    wanted, found = tables(seed, noise)
    whole = compared(wanted, Reference(found)).mean_kl
    some = compared(wanted, Server(found, k)).mean_kl
    more = compared(wanted, Server(found, min(k + 4, VOCAB))).mean_kl
    assert whole is not None
    assert some is not None
    assert more is not None
    room = 1e-3 * max(whole, 1.0)  # servers round log-probabilities to float32, and the rest is 1 - their sum
    assert -room <= some <= more + room <= whole + 2 * room


def test_a_swapped_likeliest_token_lowers_the_agreement() -> None:
    wanted, _ = tables(2, 0.0)
    found = wanted.copy()
    first, last = wanted[3].argmax(), wanted[3].argmin()
    found[3, [first, last]] = found[3, [last, first]]
    assert compared(wanted, Server(found, 6)).top1_agreement == 1 - 1 / len(DOCUMENT)


def test_a_model_of_another_vocabulary_is_refused() -> None:
    wanted, found = tables(3, 0.1)
    with pytest.raises(GateError, match="export it again"):
        compared(wanted[:, :10], Server(found, VOCAB))
