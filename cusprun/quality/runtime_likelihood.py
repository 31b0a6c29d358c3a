"""How likely documents are to a runtime that has loaded an artifact: what people run, not the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from cusprun.errors import CorpusError, MeasurementError
from cusprun.progress import SILENT, Progress
from cusprun.quality.likelihood import DocumentLikelihood
from cusprun.records import TokenizedDocument

_ROWS = 64
"""Tokens whose logits are in float64 at one time: 64 x 262,144 is 0.13 GB."""


class NextLogProbs(Protocol):
    """What a server says of a text: ``next_log_probs``, float32 ``[tokens - 1]``, in nats."""

    @property
    def next_log_probs(self) -> NDArray[np.float32]: ...


class Loaded(Protocol):
    """A runtime with a model in it, that takes texts of ``max_tokens`` at most."""

    @property
    def name(self) -> str: ...
    @property
    def max_tokens(self) -> int | None: ...


class LogitRuntime(Loaded, Protocol):
    """A runtime that gives logits, float32 ``[tokens, vocab_size]``."""

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]: ...


class LogProbRuntime(Loaded, Protocol):
    """A runtime that gives no logits, as servers do, but the log-probabilities of a text's own tokens."""

    def top_log_probs(self, token_ids: Sequence[int]) -> NextLogProbs: ...


def runtime_likelihoods(
    runtime: LogitRuntime | LogProbRuntime,
    documents: Sequence[TokenizedDocument],
    progress: Progress = SILENT,
) -> tuple[DocumentLikelihood, ...]:
    """Return each document's likelihood under a loaded model, in the order given.

    Raises:
        CorpusError: there are no documents.
        MeasurementError: a document is longer than the runtime takes, or its likelihood is not finite.
    """
    if not documents:
        raise CorpusError("there are no documents to measure on; give the expert more held-out documents")
    longest = max(len(document.token_ids) for document in documents)
    if runtime.max_tokens is not None and longest > runtime.max_tokens:
        raise MeasurementError(
            f"a document has {longest} tokens and {runtime.name} takes {runtime.max_tokens} here; give the "
            "expert a smaller max_tokens"
        )
    found = []
    with progress.stage(f"measuring quality in {runtime.name}", len(documents), "document") as advance:
        for document in documents:
            nats = _negative_log_likelihood(runtime, document.token_ids)
            if not math.isfinite(nats):
                raise MeasurementError(f"{runtime.name} gives logits that are not finite; export it again")
            found.append(DocumentLikelihood(len(document.token_ids) - 1, nats))
            advance(1)
    return tuple(found)


def _negative_log_likelihood(runtime: LogitRuntime | LogProbRuntime, token_ids: Sequence[int]) -> float:
    """Return the sum over all tokens but the first, in nats and float64."""
    if not hasattr(runtime, "logits"):
        return -float(runtime.top_log_probs(token_ids).next_log_probs.astype(np.float64).sum())
    logits = torch.from_numpy(runtime.logits(token_ids)[:-1])
    following = torch.tensor(token_ids[1:])
    return sum(
        float(cross_entropy(logits[rows].double(), following[rows], reduction="sum"))
        for rows in (slice(start, start + _ROWS) for start in range(0, len(following), _ROWS))
    )
