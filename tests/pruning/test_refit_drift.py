"""The refit's closed form for a target of its own, against an independent least-squares solver."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ridges import bottoms

from cusprun.pruning.gram import Gram
from cusprun.pruning.inputs import Inputs, TokenCounts
from cusprun.pruning.refit import RIDGES, refit
from cusprun.pruning.surgeon import choose_channels

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def problem(seed: int, tokens: int, n: int, features: int) -> Problem:
    """Return channels [tokens, n], a projection [features, n] and targets [tokens, features], float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels, weight = normal(tokens, n) @ normal(n, n), normal(features, n)
    return channels, weight, channels @ weight.T + 3 * normal(tokens, features)


def gram_of(channels: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Gram:
    gram = Gram(channels.shape[1], len(weight))
    gram.add(channels, target - channels @ weight.T)
    return gram


def least_squares(
    channels: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, keep: list[int], ridge: float
) -> torch.Tensor:
    """Solve for the columns ``keep`` on rows appended for the penalty ``ridge``."""
    root = ridge**0.5
    rows = torch.cat([channels[:, keep], root * torch.eye(len(keep), dtype=torch.float64)])
    wanted = torch.cat([target, root * weight[:, keep].T])
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T


def missing(channels: torch.Tensor, columns: torch.Tensor, target: torch.Tensor, keep: list[int]) -> float:
    return float(((target - channels[:, keep] @ columns.T) ** 2).sum())


def mean_square(channels: torch.Tensor) -> float:
    return float((channels**2).sum(0).mean())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(2, 60),
    n=st.integers(2, 14),
    features=st.integers(1, 8),
    ridge=st.sampled_from((1e-3, 1e-2, 1.0, 30.0)),
    data=st.data(),
)
def test_any_target_is_solved_for_as_by_augmented_least_squares(
    seed: int, tokens: int, n: int, features: int, ridge: float, data: st.DataObject
) -> None:
    channels, weight, target = problem(seed, tokens, n, features)
    keep = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n)))
    expected = least_squares(channels, weight, target, keep, ridge * mean_square(channels))
    gram = gram_of(channels, weight, target)
    fitted = refit(weight, gram, keep, ridges=(ridge,), unit=mean_square(channels))
    torch.testing.assert_close(fitted.weight, expected, rtol=1e-5, atol=1e-6)
    total = float((target**2).sum())
    before = missing(channels, weight[:, keep], target, keep) / total
    after = missing(channels, expected, target, keep) / total
    assert fitted.relative_error_before == pytest.approx(before, rel=1e-5, abs=1e-9)
    assert fitted.relative_error_after == pytest.approx(after, rel=1e-4, abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(3, 40), kept=st.integers(1, 8))
def test_a_ridge_has_no_better_neighbour_on_documents_set_apart_and_is_never_worse_than_nothing(
    seed: int, tokens: int, kept: int
) -> None:
    channels, weight, target = problem(seed, 2 * tokens, 8, 5)
    fit, apart = slice(0, tokens), slice(tokens, None)
    keep, unit = list(range(kept)), mean_square(channels[fit])
    fitted = refit(
        weight,
        gram_of(channels[fit], weight, target[fit]),
        keep,
        apart=gram_of(channels[apart], weight, target[apart]),
        unit=unit,
    )
    tried = {
        ridge: missing(
            channels[apart],
            least_squares(channels[fit], weight, target[fit], keep, ridge * unit),
            target[apart],
            keep,
        )
        for ridge in RIDGES
    }
    nothing = missing(channels[apart], weight[:, keep], target[apart], keep)
    total, ends = float((target[apart] ** 2).sum()), bottoms(tried)
    assert fitted.relative_error_before == pytest.approx(nothing / total, rel=1e-6)
    if fitted.ridge is None:
        assert torch.equal(fitted.weight, weight[:, keep])
        return
    assert tried[fitted.ridge] <= nothing * (1 + 1e-9)
    assert fitted.ridge in ends
    expected = least_squares(channels, weight, target, keep, fitted.ridge * unit)
    torch.testing.assert_close(fitted.weight, expected, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_a_drift_of_zero_gives_the_columns_of_the_output_itself(seed: int) -> None:
    channels, weight, _ = problem(seed, 30, 9, 4)
    without, zero = Gram(9), Gram(9, 4)
    without.add(channels)
    zero.add(channels, torch.zeros(30, 4))
    plain, drifted = (
        refit(weight, gram, [0, 2, 3, 7], unit=mean_square(channels)) for gram in (without, zero)
    )
    assert torch.equal(plain.weight, drifted.weight)
    assert plain.relative_error_after == drifted.relative_error_after


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_the_surgeon_removes_what_costs_least_of_a_target_of_its_own(seed: int, count: int) -> None:
    channels, weight, target = problem(seed, 30, 7, 3)
    ridge = 1e-3 * mean_square(channels)

    def cost(kept: list[int]) -> float:
        columns = least_squares(channels, weight, target, kept, ridge)
        change = weight.clone()
        change[:, kept] -= columns
        return missing(channels, columns, target, kept) + ridge * float((change**2).sum())

    kept = list(range(7))
    while len(kept) > count:
        kept.remove(min(kept, key=lambda channel: cost([k for k in kept if k != channel])))
    metric = gram_of(channels, weight, target).metric(ridge)
    assert choose_channels(weight, metric, count, rounds=7 - count) == kept


def test_what_batches_of_drift_add_up_to_with_their_weights_and_their_outliers() -> None:
    generator = torch.Generator().manual_seed(9)
    rows, drift = torch.randn(60, 7, generator=generator), torch.randn(60, 4, generator=generator)
    weights = torch.rand(60, generator=generator) + 0.1
    rows[3] *= 1000  # an outlier by its channels,
    drift[11] *= 1000  # and one by its drift alone
    inputs = Inputs(7, TokenCounts((60,), (0,)), 4)
    for part in (slice(0, 40), slice(40, 60)):
        inputs.add(rows[part], weights[part], torch.zeros(60, dtype=torch.bool)[part], drift[part])
    gram, usual = inputs._fit, torch.ones(60, dtype=torch.bool)
    assert isinstance(gram, Gram)
    assert gram.cross is not None
    a, d, w = rows.double(), drift.double(), weights.double()
    torch.testing.assert_close(gram.cross, d.T @ (w.unsqueeze(1) * a), rtol=1e-5, atol=1e-4)
    wanted = a.T @ (w.unsqueeze(1) * a)
    torch.testing.assert_close(gram.matrix.triu(), wanted.triu(), rtol=1e-5, atol=1e-4)
    assert gram.drift_energy == pytest.approx(float((w * (d**2).sum(1)).sum()), rel=1e-5)
    usual[[3, 11]] = False
    assert inputs.unit() == pytest.approx(float((w.unsqueeze(1) * a**2)[usual].sum()) / 7, rel=1e-5)


def test_rows_without_a_drift_are_no_outliers_because_most_have_none() -> None:
    rows, drift = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(9, 2)
    drift[4] = 1.0
    units = []
    for features in (0, 2):
        inputs = Inputs(3, TokenCounts((9,), (0,)), features)
        inputs.add(rows, torch.ones(9), torch.zeros(9, dtype=torch.bool), drift if features else None)
        units.append(inputs.unit())
    assert units[0] == units[1] == pytest.approx(float((rows**2).sum()) / 3, rel=1e-6)
