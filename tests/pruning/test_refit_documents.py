"""What the refit is fitted and judged on: weights of documents, and those that are kept apart."""

from __future__ import annotations

import pytest
import torch
from tiny import documents

from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.refit_documents import ANCHOR, TokenWeights, token_weights
from cusprun.records import TokenizedDocument
from cusprun.walk.batches import make_batches

ANCHORS = (TokenizedDocument(ANCHOR, f"{ANCHOR}-7", (7,)), TokenizedDocument(ANCHOR, f"{ANCHOR}-8", (8,)))


def weighed(found: tuple[TokenizedDocument, ...], settings: RefitSettings) -> tuple[list[float], list[float]]:
    """The weight of every document's first token: fitted, and judged on."""
    batches = make_batches(found)
    weights: TokenWeights = token_weights(batches, found, settings)
    fit, apart = [0.0] * len(found), [0.0] * len(found)
    for batch, fit_rows, apart_rows in zip(batches, weights.fit, weights.apart, strict=True):
        first = batch.mask.long().argmax(dim=1)
        for row, document in enumerate(batch.documents):
            fit[document] = float(fit_rows[row, first[row]])
            apart[document] = float(apart_rows[row, first[row]])
        assert not torch.any((fit_rows > 0) & (apart_rows > 0))
    return fit, apart


def test_of_each_dimension_every_tenth_document_is_only_judged_on() -> None:
    found = (*documents(21, dimension="task"), *documents(9, dimension="domain"), *ANCHORS)
    fit, apart = weighed(found, RefitSettings())
    assert [position for position, weight in enumerate(apart) if weight] == [9, 19]
    assert all((one > 0) != (other > 0) for one, other in zip(fit, apart, strict=True))


@pytest.mark.parametrize(
    ("weights", "judged"),
    [({}, 6), ({"domain": 0.0}, 2), ({"task": 0.0}, 6), ({"task": 0.001}, 6)],
)
def test_few_documents_leave_the_last_that_weighs_to_be_judged_on(
    weights: dict[str, float], judged: int
) -> None:
    found = (*documents(3, dimension="task"), *documents(4, dimension="domain"), *ANCHORS)
    fit, apart = weighed(found, RefitSettings(weights=weights))
    assert [position for position, weight in enumerate(apart) if weight] == [judged]
    assert fit[judged] == 0
    assert fit[-2:] == [1.0, 1.0]


def test_a_dimension_without_weight_is_nothing_to_be_judged_on() -> None:
    found = (*documents(20, dimension="task"), *documents(4, dimension="domain"))
    _, apart = weighed(found, RefitSettings(weights={"task": 0.0}))
    assert [position for position, weight in enumerate(apart) if weight] == [23]


@pytest.mark.parametrize(
    ("count", "settings"),
    [(1, RefitSettings()), (4, RefitSettings(held_out=0.0)), (4, RefitSettings(mode="bias"))],
)
def test_nothing_is_kept_apart_of_one_document_or_where_nothing_is_judged(
    count: int, settings: RefitSettings
) -> None:
    fit, apart = weighed((*documents(count), *ANCHORS), settings)
    assert not any(apart)
    assert all(fit)


@pytest.mark.parametrize("scale", [1e-60, 1e-3, 1.0, 1e38, 1e300])
def test_only_the_proportions_of_weights_count(scale: float) -> None:
    found = (*documents(2, dimension="task"), *documents(2, dimension="domain"), *ANCHORS)
    fit, apart = weighed(found, RefitSettings(weights={"task": 0.25 * scale, "domain": scale}))
    assert fit == [0.25, 0.25, 1.0, 0.0, 1.0, 1.0]
    assert apart == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
