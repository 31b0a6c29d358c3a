"""The part of parity that runs the model: distributions over the next token, and greedy text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cusprun.errors import GateError
from cusprun.progress import SILENT, Progress
from exporters.parity_records import LOG_PROBS, LOGITS, Limits, LogitParity
from exporters.parity_text import TextRuntime

_ROWS = 64
_GREEDY_DOCUMENTS = 4
_GREEDY_PROMPT_TOKENS = 32
_GREEDY_NEW_TOKENS = 24
_TINY = 1e-12
"""Least share of probability outside the ids that a server names: float32 log-probs sum to one within 1e-6,
so what is smaller is rounding."""


class TopLogProbs(Protocol):
    """The likeliest tokens after each token: ``ids`` int64 and ``log_probs`` float32 ``[tokens, k]``.

    ``next_log_probs``, float32 ``[tokens - 1]``, are those of the tokens that really come next.
    """

    @property
    def ids(self) -> NDArray[np.int64]: ...
    @property
    def log_probs(self) -> NDArray[np.float32]: ...
    @property
    def next_log_probs(self) -> NDArray[np.float32]: ...


class GeneratingRuntime(TextRuntime, Protocol):
    """A runtime that goes on with a prompt, greedily."""

    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]: ...


class LogitRuntime(GeneratingRuntime, Protocol):
    """A runtime that gives logits, float32 ``[tokens, vocab_size]``."""

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]: ...


class LogProbRuntime(GeneratingRuntime, Protocol):
    """A runtime that gives no more than the likeliest tokens, as servers do."""

    def top_log_probs(self, token_ids: Sequence[int]) -> TopLogProbs: ...


@dataclass
class _Sums:
    """Running totals over tokens, so that no more than one document's logits are held."""

    tokens: int = 0
    kl: float = 0.0
    max_kl: float = 0.0
    agreeing: int = 0
    max_difference: float = 0.0
    predicted: int = 0
    nll_reference: float = 0.0
    nll_candidate: float = 0.0

    def add(
        self,
        kl: NDArray[np.float64],
        difference: float,
        agreeing: int,
        nll: tuple[float, float],
        predicted: int,
    ) -> None:
        """Add some tokens: their KL, largest difference, agreements and negative log-likelihoods."""
        self.tokens += len(kl)
        self.kl += float(kl.sum())
        self.max_kl = _larger(self.max_kl, float(kl.max()))
        self.max_difference = _larger(self.max_difference, difference)
        self.agreeing += agreeing
        self.nll_reference += nll[0]
        self.nll_candidate += nll[1]
        self.predicted += predicted


def compare_logits(
    reference: LogitRuntime,
    candidate: LogitRuntime | LogProbRuntime,
    documents: Sequence[list[int]],
    longest: int,
    progress: Progress = SILENT,
) -> LogitParity:
    """Compare the distributions after every token of ``documents``, and the greedy text after their starts.

    No text is longer than ``longest`` tokens, those of the continuation included.

    A candidate without logits is compared on the tokens it names: the KL is then that between the
    distributions over these tokens and the rest as one, which is a lower bound of the whole KL (it can only
    shrink when outcomes are merged), and the largest difference is one of log-probabilities.

    Raises:
        GateError: the candidate's vocabulary has another size.
    """
    sums = _Sums()
    shares: list[float] = []
    whole = hasattr(candidate, "logits")
    with progress.stage("verifying", len(documents), "document") as advance:
        for number, document in enumerate(documents):
            wanted = reference.logits(document)
            if whole:
                _add_document(sums, wanted, candidate.logits(document), document)  # type: ignore[union-attr]
            else:
                _add_top(sums, wanted, candidate.top_log_probs(document), document)  # type: ignore[union-attr]
            if number < _GREEDY_DOCUMENTS:
                shares.append(_greedy_share(reference, candidate, document, longest))
            advance(1)
    return LogitParity(
        documents=len(documents),
        tokens=sums.tokens,
        mean_kl=_finite(sums.kl / sums.tokens),
        max_kl=_finite(sums.max_kl),
        top1_agreement=sums.agreeing / sums.tokens,
        max_abs_logit_difference=_finite(sums.max_difference),
        perplexity_reference=_finite(_perplexity(sums.nll_reference, sums.predicted)),
        perplexity_candidate=_finite(_perplexity(sums.nll_candidate, sums.predicted)),
        greedy_agreement=float(np.mean(shares)),
        compared=LOGITS if whole else LOG_PROBS,
    )


def logit_failures(parity: LogitParity, limits: Limits) -> Iterator[str]:
    """Yield one sentence for each way in which the distributions fail the gate."""
    ratio = None
    if parity.perplexity_candidate is not None and parity.perplexity_reference is not None:
        ratio = parity.perplexity_candidate / parity.perplexity_reference
    for what, value, limit in (
        (
            f"the largest {parity.compared} difference",
            parity.max_abs_logit_difference,
            limits.max_abs_logit_difference,
        ),
        ("the mean KL in nats per token", parity.mean_kl, limits.mean_kl_max),
        ("the perplexity ratio", ratio, limits.perplexity_ratio_max),
    ):
        if value is None:
            yield f"{what} is not finite"
        elif limit is not None and value > limit:
            yield f"{what} is {value:.3g}, over the limit of {limit:g}"
    least = limits.top1_agreement_min
    if least is not None and parity.top1_agreement < least:
        yield (
            f"the most likely token agrees on {parity.top1_agreement:.2%} of tokens, "
            f"under the limit of {least:.2%}"
        )


def _add_document(
    sums: _Sums, wanted: NDArray[np.float32], found: NDArray[np.float32], document: Sequence[int]
) -> None:
    """Add one document, in float64: in float32 the KL of near equal distributions drowns in rounding."""
    if wanted.shape != found.shape:
        raise GateError(
            f"the artifact gives logits of shape {found.shape} where the checkpoint gives {wanted.shape}; "
            "export it again"
        )
    next_ids = np.asarray(document[1:])
    for start in range(0, len(document), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, log_q = _log_softmax(wanted[rows]), _log_softmax(found[rows])
        ids = next_ids[rows]
        positions = np.arange(len(ids))
        sums.add(
            np.sum(np.exp(log_p) * (log_p - log_q), axis=1),
            float(np.abs(wanted[rows] - found[rows]).max()),
            int(np.sum(wanted[rows].argmax(axis=1) == found[rows].argmax(axis=1))),
            (-float(log_p[positions, ids].sum()), -float(log_q[positions, ids].sum())),
            len(ids),
        )


def _add_top(sums: _Sums, wanted: NDArray[np.float32], found: TopLogProbs, document: Sequence[int]) -> None:
    """Add one document of which the candidate names the likeliest tokens only."""
    if len(found.ids) != len(wanted) or int(found.ids.max()) >= wanted.shape[1]:
        raise GateError(
            f"the artifact names the token {int(found.ids.max())} and gives {len(found.ids)} distributions "
            f"where the checkpoint gives {wanted.shape}; export it again"
        )
    next_ids = np.asarray(document[1:])
    for start in range(0, len(document), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, ids = _log_softmax(wanted[rows]), found.ids[rows]
        log_q = found.log_probs[rows].astype(np.float64)
        named = np.take_along_axis(log_p, ids, axis=1)
        coming = next_ids[rows]
        sums.add(
            _merged_kl(named, log_q),
            float(np.abs(named - log_q).max()),
            int(np.sum(log_p.argmax(axis=1) == ids[np.arange(len(ids)), log_q.argmax(axis=1)])),
            (
                -float(log_p[np.arange(len(coming)), coming].sum()),
                -float(found.next_log_probs[rows].astype(np.float64).sum()),
            ),
            len(coming),
        )


def _merged_kl(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return KL(p || q) per row over the named tokens and all others as one outcome."""
    p_rest = np.maximum(1.0 - np.exp(log_p).sum(axis=1), _TINY)
    q_rest = np.maximum(1.0 - np.exp(log_q).sum(axis=1), _TINY)
    rest = p_rest * np.log(p_rest / q_rest)
    result: NDArray[np.float64] = np.sum(np.exp(log_p) * (log_p - log_q), axis=1) + rest
    return result


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _larger(first: float, second: float) -> float:
    """Maximum in which NaN wins, so that a broken logit cannot hide behind a sound one."""
    return math.nan if math.isnan(first) or math.isnan(second) else max(first, second)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(nll: float, predicted: int) -> float:
    mean = nll / predicted
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) overflows a float64


def _greedy_share(
    reference: GeneratingRuntime, candidate: GeneratingRuntime, document: list[int], longest: int
) -> float:
    prompt = document[: min(_GREEDY_PROMPT_TOKENS, longest // 2)]
    count = min(_GREEDY_NEW_TOKENS, longest - len(prompt))
    wanted, found = (list(runtime.generate(prompt, count)) for runtime in (reference, candidate))
    if wanted == found:
        return 1.0
    common = 0
    while common < min(len(wanted), len(found)) and wanted[common] == found[common]:
        common += 1
    return common / max(len(wanted), len(found))
