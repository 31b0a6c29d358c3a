"""The refit against an independent least-squares solver, and its promises on hard inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cusprun.pruning.refit import add_to_gram, mirror, refit


def _problem(seed: int, tokens: int, n: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    channels = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mixing
    return channels, torch.randn(features, n, generator=generator, dtype=torch.float64)


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
    ridge = 1e-3 * float((survivors**2).sum(0).mean())
    # Ridge towards the original weights is least squares with sqrt(ridge) rows appended.
    a = torch.cat([survivors, ridge**0.5 * torch.eye(len(keep), dtype=torch.float64)])
    b = torch.cat([channels @ weight.T, ridge**0.5 * weight[:, keep].T])
    expected = torch.linalg.lstsq(a, b, driver="gelsd").solution.T
    fitted = refit(weight, channels.T @ channels, keep)
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
    add_to_gram(gram, rows[:tokens])
    add_to_gram(gram, rows[tokens:])
    torch.testing.assert_close(mirror(gram), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_duplicate_of_a_removed_channel_takes_over_its_weight() -> None:
    channels, weight = _problem(1, 400, 4, 3)
    channels[:, 3] = channels[:, 0]
    fitted = refit(weight, channels.T @ channels, [0, 1, 2])
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
    fitted = refit(weight, channels.T @ channels, [0, 1, 2, 3])
    assert torch.isfinite(fitted.weight).all()
    assert fitted.relative_error_after <= fitted.relative_error_before
    if case == "dead survivor":
        torch.testing.assert_close(fitted.weight[:, 0], weight[:, 0])


def test_keeps_the_type_of_the_weight() -> None:
    channels, weight = _problem(3, 30, 6, 4)
    assert refit(weight.bfloat16(), channels.T @ channels, [0, 2, 4]).weight.dtype == torch.bfloat16
