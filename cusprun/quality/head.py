"""The output projection of models over their last hidden states, a few thousand entries of the vocabulary
at a time.

With l(v) a model's logit of entry v and Z = log sum_v exp l(v), a text's negative log-likelihood is Z - l of
the tokens that follow. Beside a reference with logits r(v), weights w(v) = exp(r(v) - Z_r) and its own Z_r,

    KL(reference || model) = sum_v w(v) (r(v) - l(v)) - Z_r + Z.

Each is a sum over v that can be gathered in pieces, so that neither all logits nor a head in float32 need
to be in memory: of an 8B model with 128,256 entries they would take 0.5 MB a token and 2.1 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cusprun.checkpoint.reader import read_tensor
from cusprun.walk.budget import HEAD_PIECE_BYTES, HEAD_PIECE_ENTRIES
from cusprun.walk.shell import DecoderShell


class Head:
    """The final norm and output projection of one model; the weights stay in the type they are stored in."""

    def __init__(self, shell: DecoderShell) -> None:
        self._norm = shell.load_norm()
        self._weight = shell.device.put(read_tensor(shell.index, shell.index.head_name))

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self._weight.shape[0]

    @property
    def piece(self) -> int:
        """Entries of the vocabulary whose weights are in float32 at one time."""
        return max(1, min(HEAD_PIECE_ENTRIES, HEAD_PIECE_BYTES // (4 * self._weight.shape[1])))

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return last hidden states [tokens, hidden_size] as the projection takes them."""
        normed: torch.Tensor = self._norm(hidden)
        return normed

    def logits(self, normed: torch.Tensor, entries: slice) -> torch.Tensor:
        """Return the logits of some entries of the vocabulary: float32 [tokens, entries]."""
        return nn.functional.linear(normed, self._weight[entries].float())


class Predicted:
    """What tokens' predictions are, gathered over the vocabulary; :meth:`add` takes a piece at a time."""

    def __init__(self, following: torch.Tensor) -> None:
        """``following`` [tokens] int64 are the tokens that do follow."""
        self._following = following
        self._chosen = torch.zeros(len(following), device=following.device)
        self._highest = torch.full_like(self._chosen, -torch.inf)
        self._sum = torch.zeros_like(self._chosen, dtype=torch.float64)
        self._cross = torch.zeros_like(self._sum)
        self.top = torch.zeros_like(following)

    def add(self, logits: torch.Tensor, start: int, other: torch.Tensor | None = None) -> None:
        """Add the logits [tokens, entries] from entry ``start`` on, which are overwritten.

        With the logits of another model for the same entries, what its divergence takes is added too.
        """
        highest, at = logits.max(dim=1)
        self.top = torch.where(highest > self._highest, at + start, self.top)
        raised = torch.maximum(highest, self._highest)
        kept = (self._highest - raised).double().exp()
        self._highest = raised
        inside = (self._following >= start) & (self._following < start + logits.shape[1])
        at = (self._following - start).clamp(0, logits.shape[1] - 1).unsqueeze(1)
        self._chosen = torch.where(inside, logits.gather(1, at).squeeze(1), self._chosen)
        difference = None if other is None else logits - other
        weights = logits.sub_(raised.unsqueeze(1)).exp_()
        self._sum = self._sum * kept + weights.sum(dim=1).double()
        if difference is not None:
            self._cross = self._cross * kept + weights.mul_(difference).sum(dim=1).double()

    def log_normaliser(self) -> torch.Tensor:
        """Return Z of each token: float64 [tokens]."""
        return self._highest.double() + self._sum.log()

    def negative_log_likelihood(self) -> torch.Tensor:
        """Return that of each following token, in nats: float64 [tokens]."""
        return self.log_normaliser() - self._chosen.double()

    def divergence(self, model: Predicted) -> torch.Tensor:
        """Return KL(this || model) of each token, in nats: float64 [tokens]; ``model`` is the other one."""
        return self._cross / self._sum - self.log_normaliser() + model.log_normaliser()


def predictions(
    heads: Sequence[Head], hidden: Sequence[torch.Tensor], following: torch.Tensor
) -> tuple[Predicted, ...]:
    """Return what each of one or two models predicts; the second is the reference of the first.

    Args:
        heads: of models with one vocabulary, on one device.
        hidden: for each its last hidden states, float32 [tokens, hidden_size].
        following: the tokens that follow, int64 [tokens].
    """
    normed = [head.norm(states) for head, states in zip(heads, hidden, strict=True)]
    found = tuple(Predicted(following) for _ in heads)
    step = min(head.piece for head in heads)
    for start in range(0, heads[0].vocab_size, step):
        entries = slice(start, start + step)
        own, *others = (head.logits(states, entries) for head, states in zip(heads, normed, strict=True))
        for predicted, logits in zip(found[1:], others, strict=True):
            predicted.add(logits, start, own)
        found[0].add(own, start)
    return found
