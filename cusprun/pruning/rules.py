"""Rules: how the evidence on a unit becomes one score; the units with the lowest scores go.

A rule is one function and one line of :data:`RULES`. The function takes an :class:`Evidence` and the rule's
argument (None for rules without one) and returns scores [units].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cusprun.errors import CorpusError, PlanError, UserError, require_kind, require_known


@dataclass(frozen=True)
class Evidence:
    """What is known about the units of one kind in one block.

    ``impacts`` is [documents, units], ``tokens`` [documents] the lengths of the documents, ``dimensions`` the
    rows of each dimension. ``fluctuation`` [units] is the variance of a unit's channels over all calibration
    tokens times the squared norm of their output columns (empty where that has no meaning), ``magnitude``
    [units] the Euclidean norm of all weights of a unit. ``seed`` differs between blocks and kinds.
    ``texts`` identifies the text of each document; empty when unknown.
    """

    impacts: torch.Tensor
    tokens: torch.Tensor
    dimensions: Mapping[str, Sequence[int]]
    fluctuation: torch.Tensor
    magnitude: torch.Tensor
    seed: int
    texts: tuple[str, ...] = ()

    @property
    def per_root_token(self) -> torch.Tensor:
        """Impacts divided by the root of the document's tokens, [documents, units].

        An impact is a norm over tokens and grows with the root of their number; without it, long documents
        would decide alone.
        """
        return self.impacts / self.tokens.to(self.impacts).sqrt().unsqueeze(-1)


Score = Callable[[Evidence, "float | None"], torch.Tensor]


@dataclass(frozen=True)
class RuleEntry:
    """One row of :data:`RULES`.

    ``compensation`` is what makes good for the units that go: ``refit`` (least squares) or ``bias`` (their
    mean output). ``min_documents`` is the number of distinct documents that the rule needs; zero says that it
    looks at no document. ``takes_argument``: it is written ``name:number`` with a number from 0 to 1.
    ``revised``: the scores settle the shape, the heads and the blocks, and the refit then chooses the FFN
    channels again by its own error (``pruning.surgeon``); without a refit the scores choose them.
    """

    score: Score
    takes_argument: bool = False
    compensation: str = "refit"
    min_documents: int = 1
    revised: bool = False


def paper(evidence: Evidence, _argument: float | None) -> torch.Tensor:
    """Score by the largest impact on any document (arXiv 2506.02561).

    A unit is irrelevant to a dimension when its impact stays at or below the threshold for every document of
    it, and goes when it is irrelevant to all dimensions (the intersection): that is, when the maximum over
    all of them stays at or below the threshold.
    """
    return _worst(evidence).amax(dim=0)


def union(evidence: Evidence, _argument: float | None) -> torch.Tensor:
    """Score by the smallest, over dimensions, of the largest impact on any document.

    A unit goes when it is irrelevant to at least one dimension: the union of the irrelevant sets.
    """
    return _worst(evidence).amin(dim=0)


def mean(evidence: Evidence, _argument: float | None) -> torch.Tensor:
    """Score by the mean over all documents of the impact per square root of a token.

    Every document weighs the same: on held-out calibration documents that kept 0.5 % more perplexity than
    dimensions of equal weight.
    """
    return evidence.per_root_token.mean(dim=0)


def quantile(evidence: Evidence, argument: float | None) -> torch.Tensor:
    """Score by the largest, over dimensions, quantile over documents of the impact per root of a token.

    1 is the intersection rule with lengths divided out, 0.5 the median: a few odd documents do not count.
    Between two documents the quantile is interpolated linearly.
    """
    assert argument is not None
    values = evidence.per_root_token
    rows = evidence.dimensions.values()
    return torch.stack([_quantile(values[list(chosen)], argument) for chosen in rows]).amax(dim=0)


def variance_bias(evidence: Evidence, _argument: float | None) -> torch.Tensor:
    """Score by the variance of a channel over all tokens times its output column's squared norm.

    The weighted input feature variance of FLAP (arXiv 2312.11983): a constant channel can be folded into a
    bias, and only its fluctuation is lost. A head scores the mean over its channels.
    """
    if not evidence.fluctuation.numel():
        raise PlanError(
            "the rule 'variance+bias' knows no single rows of Q and K; use it with whole units, "
            "or choose another rule"
        )
    if int(evidence.tokens.sum()) < 2:
        raise CorpusError("the rule 'variance+bias' needs at least two calibration tokens; add documents")
    return evidence.fluctuation


def magnitude(evidence: Evidence, _argument: float | None) -> torch.Tensor:
    """Score by the Euclidean norm of all weights of the unit; looks at no document."""
    return evidence.magnitude


def random(evidence: Evidence, _argument: float | None) -> torch.Tensor:
    """Score at random, seeded by block and kind of unit: the floor that every rule must beat."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(evidence.impacts.shape[1], generator=generator)


RULES: Mapping[str, RuleEntry] = {
    "surgeon": RuleEntry(mean, revised=True),
    "paper": RuleEntry(paper),
    "mean": RuleEntry(mean),
    "quantile": RuleEntry(quantile, takes_argument=True, min_documents=2),
    "union": RuleEntry(union),
    "variance+bias": RuleEntry(variance_bias, compensation="bias"),
    "magnitude": RuleEntry(magnitude, min_documents=0),
    "random": RuleEntry(random, min_documents=0),
}
DEFAULT_RULE = "surgeon"
DEFAULT_NEURON_RULE = "paper"


def check_rule(text: str) -> None:
    """Raise ``UserError`` when a rule is unknown, or its argument is missing, superfluous or not a number."""
    _parse(text)


def rule_entry(text: str) -> RuleEntry:
    """Return the row of a rule as a user writes it; raises ``UserError`` like :func:`check_rule`."""
    return RULES[_parse(text)[0]]


def score_units(text: str, evidence: Evidence) -> torch.Tensor:
    """Return the scores [units] by which a rule judges the units; the lowest go.

    Raises:
        UserError: the rule is unknown or its argument is wrong.
        CorpusError: the documents are too few for the rule, or cannot tell one unit from another.
        PlanError: the rule has no meaning for this kind of unit.
    """
    name, argument = _parse(text)
    if RULES[name].min_documents:
        _require_telling(text, RULES[name].min_documents, evidence)
    return RULES[name].score(evidence, argument)


def _parse(text: str) -> tuple[str, float | None]:
    require_kind(text, str, "the rule")
    name, colon, given = text.partition(":")
    require_known(name, RULES, "rule")
    if not RULES[name].takes_argument:
        if colon:
            raise UserError(f"the rule {name!r} takes no argument, and {text!r} gives one; write {name!r}")
        return name, None
    try:
        argument = float(given)
    except ValueError:
        argument = -1.0
    if not 0 <= argument <= 1:
        raise UserError(f"the rule {name!r} wants a number from 0 to 1, as in '{name}:0.9', not {text!r}")
    return name, argument


def _require_telling(text: str, min_documents: int, evidence: Evidence) -> None:
    """Raise ``CorpusError`` when documents are too few, all the same, or leave all units alike."""
    documents, units = evidence.impacts.shape
    distinct = len(set(evidence.texts)) if evidence.texts else len(torch.unique(evidence.impacts, dim=0))
    if distinct < min_documents:
        raise CorpusError(
            f"the rule {text!r} needs at least {min_documents} different calibration documents, and there "
            f"{'is' if distinct == 1 else 'are'} {distinct}; add documents or choose another rule"
        )
    if documents > 1 and distinct == 1:
        raise CorpusError(
            f"all {documents} calibration documents are the same text, which says nothing about what the "
            "expert needs; add other documents"
        )
    lowest, highest = evidence.impacts.aminmax()
    # A sublayer that does nothing at all is no fault of the corpora: any of its units may go.
    if units > 1 and lowest == highest and highest > 0:
        raise CorpusError(
            "every unit of a block has the same impact on every calibration document, so that none can be "
            "told from another; add other documents"
        )


def _worst(evidence: Evidence) -> torch.Tensor:
    """Return the largest impact on any document of each dimension, [dimensions, units]."""
    return torch.stack([evidence.impacts[list(rows)].amax(dim=0) for rows in evidence.dimensions.values()])


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """Return the linear q-quantile over rows; torch's own refuses more than 16 million values."""
    ordered = values.sort(dim=0).values
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return torch.lerp(ordered[low], ordered[high], position - low)
