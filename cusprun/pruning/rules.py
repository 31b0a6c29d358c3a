"""Rules: how a unit's impacts on many documents become one score; the lowest scores go.

A rule is one function and one line of :data:`RULES`. It takes the impacts [documents, units], the number of
tokens [documents] and, for each dimension, the positions of its documents; it returns scores [units].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

Rule = Callable[[torch.Tensor, torch.Tensor, Mapping[str, Sequence[int]]], torch.Tensor]


def paper(
    impacts: torch.Tensor, _tokens: torch.Tensor, dimensions: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    """Score by the largest impact on any document (arXiv 2506.02561).

    A unit is irrelevant to a dimension when its impact stays at or below the threshold for every document of
    it, and goes when it is irrelevant to all dimensions: that is, when the maximum over all of them stays at
    or below the threshold.
    """
    worst = [impacts[list(rows)].amax(dim=0) for rows in dimensions.values()]
    return torch.stack(worst).amax(dim=0)


def mean(
    impacts: torch.Tensor, tokens: torch.Tensor, _dimensions: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    """Score by the mean over all documents of the impact per square root of a token.

    The impact is a norm over tokens, so it grows with the root of a document's length; dividing by it keeps
    long documents from deciding alone. Every document weighs the same: on held-out calibration documents that
    kept 0.5 % more perplexity than dimensions of equal weight.
    """
    return (impacts / tokens.to(impacts).sqrt().unsqueeze(-1)).mean(dim=0)


RULES: Mapping[str, Rule] = {"paper": paper, "mean": mean}
DEFAULT_RULE = "mean"
