"""Documents packed into right-padded batches of similar length.

Padding stands on the right and attention is causal, so no real token ever sees a padded one: no attention
mask is needed, and the fused causal kernel serves every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cusprun.records import TokenizedDocument

DEFAULT_BATCH_TOKENS = 2048
"""Padded tokens per batch: large enough for matrix products at full rate, small enough for a laptop."""


@dataclass(frozen=True)
class Batch:
    """``token_ids`` is [documents, tokens] int64; ``mask`` of the same shape is true at real tokens.

    ``documents`` are positions in the sequence that was batched.
    """

    token_ids: torch.Tensor
    mask: torch.Tensor
    documents: tuple[int, ...]

    @property
    def num_padded_tokens(self) -> int:
        """Rows of hidden states that the batch takes, padding included."""
        return self.token_ids.numel()

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return int(self.mask.sum())


def make_batches(
    documents: Sequence[TokenizedDocument], batch_tokens: int = DEFAULT_BATCH_TOKENS
) -> tuple[Batch, ...]:
    """Batch documents by length, longest first, with at most ``batch_tokens`` padded tokens each.

    A longer document makes a batch of its own. Longest first shows at once whether memory suffices.
    """
    order = sorted(range(len(documents)), key=lambda i: (-len(documents[i].token_ids), i))
    batches: list[Batch] = []
    start = 0
    while start < len(order):
        longest = len(documents[order[start]].token_ids)
        stop = start + max(1, batch_tokens // longest)
        batches.append(_pad(documents, tuple(order[start:stop]), longest))
        start = stop
    return tuple(batches)


def _pad(documents: Sequence[TokenizedDocument], chosen: tuple[int, ...], width: int) -> Batch:
    token_ids = torch.zeros(len(chosen), width, dtype=torch.int64)
    mask = torch.zeros(len(chosen), width, dtype=torch.bool)
    for row, document in enumerate(chosen):
        ids = documents[document].token_ids
        token_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return Batch(token_ids, mask, chosen)
