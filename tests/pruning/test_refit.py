"""The refit against an independent least-squares solver, and its promises on hard inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ridges import bottoms

from cusprun.pruning.gram import Gram
from cusprun.pruning.inputs import Inputs, TokenCounts
from cusprun.pruning.refit import RIDGES, _lowest, mean_bias, refit
from cusprun.pruning.surgeon import choose_channels
from cusprun.pruning.triangle import add_gram


def _problem(seed: int, tokens: int, n: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    channels = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mixing
    return channels, torch.randn(features, n, generator=generator, dtype=torch.float64)


def _gram(channels: torch.Tensor) -> Gram:
    gram = Gram(channels.shape[1])
    gram.add(channels)
    return gram


def _unit(channels: torch.Tensor) -> float:
    return float((channels**2).sum(0).mean())


def _chosen(
    weight: torch.Tensor, channels: torch.Tensor, count: int, ridge: float = 1e-2, **options: int
) -> list[int]:
    return choose_channels(weight, _gram(channels).metric(ridge * _unit(channels)), count, **options)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(2, 60),
    n=st.integers(2, 14),
    features=st.integers(1, 8),
    data=st.data(),
)
def test_equals_the_augmented_least_squares_solution(
    seed: int, tokens: int, n: int, features: int, data: st.DataObject
) -> None:
    channels, weight = _problem(seed, tokens, n, features)
    keep = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1)))
    survivors = channels[:, keep]
    ridge = 1e-3 * float((channels**2).sum(0).mean())
    # Ridge towards the original weights is least squares with sqrt(ridge) rows appended.
    a = torch.cat([survivors, ridge**0.5 * torch.eye(len(keep), dtype=torch.float64)])
    b = torch.cat([channels @ weight.T, ridge**0.5 * weight[:, keep].T])
    expected = torch.linalg.lstsq(a, b, driver="gelsd").solution.T
    fitted = refit(weight, _gram(channels), keep, ridges=(1e-3,), unit=_unit(channels))
    torch.testing.assert_close(fitted.weight, expected, rtol=1e-5, atol=1e-6)

    output = channels @ weight.T
    total = float((output**2).sum())
    before = float(((output - survivors @ weight[:, keep].T) ** 2).sum()) / total
    after = float(((output - survivors @ fitted.weight.T) ** 2).sum()) / total
    assert fitted.relative_error_before == pytest.approx(before, rel=1e-5, abs=1e-9)
    assert fitted.relative_error_after == pytest.approx(after, rel=1e-4, abs=1e-8)
    assert fitted.relative_error_after <= fitted.relative_error_before + 1e-12


@given(seed=st.integers(0, 1000), n=st.integers(1, 1200), tokens=st.integers(1, 9))
@settings(max_examples=12, deadline=None)
def test_gram_of_batches_is_the_gram_of_all(seed: int, n: int, tokens: int) -> None:
    rows = torch.randn(2 * tokens, n, generator=torch.Generator().manual_seed(seed))
    gram = torch.zeros(n, n)
    add_gram(gram, rows[:tokens])
    add_gram(gram, rows[tokens:])
    torch.testing.assert_close(gram.triu(), (rows.T @ rows).triu(), rtol=1e-4, atol=1e-4)


def test_a_duplicate_of_a_removed_channel_takes_over_its_weight() -> None:
    channels, weight = _problem(1, 400, 4, 3)
    channels[:, 3] = channels[:, 0]
    fitted = refit(weight, _gram(channels), [0, 1, 2], ridges=(1e-3,), unit=_unit(channels))
    wanted = weight[:, :3].clone()
    wanted[:, 0] += weight[:, 3]
    torch.testing.assert_close(fitted.weight, wanted, rtol=2e-2, atol=2e-2)
    assert fitted.relative_error_after < 1e-4 < fitted.relative_error_before


@pytest.mark.parametrize("case", ["zero", "rank one", "dead survivor"])
def test_singular_inputs_give_finite_weights_no_worse_than_before(case: str) -> None:
    channels, weight = _problem(2, 5, 9, 4)
    if case == "zero":
        channels = torch.zeros_like(channels)
    if case == "rank one":
        channels = channels[:, :1] * torch.ones(9, dtype=torch.float64)
    if case == "dead survivor":
        channels[:, 0] = 0
    fitted = refit(weight, _gram(channels), [0, 1, 2, 3], unit=_unit(channels))
    assert torch.isfinite(fitted.weight).all()
    assert fitted.relative_error_after <= fitted.relative_error_before
    if case == "dead survivor":
        torch.testing.assert_close(fitted.weight[:, 0], weight[:, 0])


def test_keeps_the_type_of_the_weight() -> None:
    channels, weight = _problem(3, 30, 6, 4)
    fitted = refit(weight.bfloat16(), _gram(channels), [0, 2, 4], unit=_unit(channels))
    assert fitted.weight.dtype == torch.bfloat16


def _least_squares(
    channels: torch.Tensor, weight: torch.Tensor, keep: list[int], ridge: float
) -> torch.Tensor:
    """The ridge solution by an independent solver, on rows appended for the penalty."""
    survivors = channels[:, keep]
    root = (ridge * float((channels**2).sum(0).mean())) ** 0.5
    identity = torch.eye(len(keep), dtype=torch.float64)
    rows = torch.cat([survivors, root * identity])
    wanted = torch.cat([channels @ weight.T, root * weight[:, keep].T])
    return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(4, 40), kept=st.integers(1, 7))
def test_the_ridge_has_no_better_neighbour_on_the_documents_kept_apart(
    seed: int, tokens: int, kept: int
) -> None:
    channels, weight = _problem(seed, 2 * tokens, 8, 5)
    fit, apart = channels[:tokens], channels[tokens:]
    keep = list(range(kept))
    output = apart @ weight.T
    errors = {
        ridge: float(((output - apart[:, keep] @ _least_squares(fit, weight, keep, ridge).T) ** 2).sum())
        for ridge in RIDGES
    }
    before = float(((output - apart[:, keep] @ weight[:, keep].T) ** 2).sum())
    fitted = refit(weight, _gram(fit), keep, apart=_gram(apart), unit=_unit(fit))
    ends = bottoms(errors)
    total = float((output**2).sum())
    assert fitted.relative_error_before == pytest.approx(before / total, rel=1e-6)
    if fitted.ridge is None:
        torch.testing.assert_close(fitted.weight, weight[:, keep])
        assert max(errors[end] for end in ends) >= before * (1 - 1e-6)
    else:
        assert fitted.ridge in ends
        found = errors[fitted.ridge]
        assert fitted.relative_error_after == pytest.approx(found / total, rel=1e-4, abs=1e-9)
        unit = float((fit**2).sum(0).mean())
        share = fitted.ridge * unit / float((channels**2).sum(0).mean())
        expected = _least_squares(channels, weight, keep, share)
        torch.testing.assert_close(fitted.weight, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bottom", range(4))
def test_one_valley_is_searched_to_its_bottom_from_the_middle(bottom: int) -> None:
    tried: list[float] = []

    def error(ridge: float) -> float:
        tried.append(ridge)
        return 1.0 + abs(RIDGES.index(ridge) - bottom)

    assert _lowest(RIDGES, error) == (1.0, RIDGES[bottom])
    assert len(tried) == len(set(tried)) == 3


def test_of_ridges_that_are_alike_the_lowest_is_taken() -> None:
    assert _lowest(RIDGES, lambda _ridge: 2.0) == (2.0, RIDGES[0])


def test_columns_stay_when_no_refit_helps_on_the_documents_kept_apart() -> None:
    generator = torch.Generator().manual_seed(4)
    fit = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    apart = torch.zeros(6, 12, dtype=torch.float64)
    apart[:, :6] = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    fitted = refit(weight, _gram(fit), list(range(6)), apart=_gram(apart), unit=_unit(fit))
    assert fitted.ridge is None
    assert fitted.relative_error_after == fitted.relative_error_before
    torch.testing.assert_close(fitted.weight, weight[:, :6])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_the_surgeon_removes_what_costs_least_when_all_others_are_solved_again(seed: int, count: int) -> None:
    channels, weight = _problem(seed, 30, 7, 3)
    gram, ridge = channels.T @ channels, 1e-3
    metric = gram + ridge * float(gram.diagonal().mean()) * torch.eye(7, dtype=torch.float64)

    def cost(kept: list[int]) -> float:
        """Smallest |(W - V) | in the metric over all V that are zero outside ``kept``."""
        solution = torch.linalg.solve(metric[kept][:, kept], (weight @ metric)[:, kept].T).T
        change = weight.clone()
        change[:, kept] -= solution
        return float((change @ metric * change).sum())

    kept = list(range(7))
    while len(kept) > count:
        kept.remove(min(kept, key=lambda channel: cost([k for k in kept if k != channel])))
    assert _chosen(weight, channels, count, ridge, rounds=7 - count) == kept


def test_the_surgeon_drops_doubles_before_small_channels() -> None:
    channels, weight = _problem(5, 200, 6, 3)
    channels[:, 5] = channels[:, 0]
    channels[:, 3] *= 0.3
    kept = _chosen(weight, channels, 5)
    assert {0, 5} & set(kept) != {0, 5}
    assert 3 in kept


@pytest.mark.parametrize("alone", [False, True])
def test_the_gram_of_usual_tokens_survives_tokens_a_thousand_times_their_size(alone: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    usual = torch.randn(400, 24, generator=generator)
    sink = 3000 * torch.randn(1, 24, generator=generator).expand(40, 24)
    inputs = Inputs(24, TokenCounts((440,), (0,)))
    for rows in (usual, sink) if alone else (torch.cat([sink, usual]),):
        inputs.add(rows, torch.ones(len(rows)), torch.zeros(len(rows), dtype=torch.bool))
    gram = inputs._fit
    assert isinstance(gram, Gram)
    exact = usual.double().T @ usual.double()
    rest = gram.matrix - sink.double().T @ sink.double()
    torch.testing.assert_close(rest.triu(), exact.triu(), rtol=1e-4, atol=1e-2)
    assert inputs.unit() == pytest.approx(_unit(usual.double()), rel=1e-5)
    whole = gram.matrix.triu() + gram.matrix.triu(1).T
    torch.linalg.cholesky(whole + 1e-3 * torch.eye(24, dtype=torch.float64))


def test_weighted_rows_count_as_often_as_they_weigh() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(7))
    weights = torch.tensor([1.0, 2.0, 0.5] * 3)
    inputs = Inputs(5, TokenCounts((9,), (0,)))
    inputs.add(rows, weights, torch.zeros(9, dtype=torch.bool))
    gram = inputs._fit
    assert isinstance(gram, Gram)
    wanted = (rows.T @ torch.diag(weights) @ rows).double()
    torch.testing.assert_close(gram.matrix.triu(), wanted.triu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        inputs.means(), ((weights @ rows) / weights.sum()).double(), rtol=1e-5, atol=1e-6
    )
    assert not inputs.is_judged


def test_the_bias_makes_the_mean_output_whole() -> None:
    channels, weight = _problem(8, 50, 6, 4)
    keep = [0, 2, 5]
    bias = mean_bias(weight, channels.mean(0), keep)
    left = channels @ weight.T - (channels[:, keep] @ weight[:, keep].T + bias)
    torch.testing.assert_close(left.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
