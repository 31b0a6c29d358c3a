"""The expected speed-up of a draft, against drafting simulated guess by guess."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speculation import (
    acceptance_of,
    accepted_share,
    break_even,
    num_passes,
    speed_up,
    tokens_per_pass,
)

PASSES = 40_000
DRAFTED = st.integers(1, 12)


def simulated(acceptance: float, num_drafted: int, cost_ratio: float) -> tuple[float, float, float]:
    """Return tokens per pass, the speed-up, and the share of guesses that were kept."""
    generator = random.Random(20_251)
    kept = 0
    for _ in range(PASSES):
        for _ in range(num_drafted):
            if generator.random() >= acceptance:
                break
            kept += 1
    num_tokens = kept + PASSES
    seconds = PASSES * (1 + num_drafted * cost_ratio)  # a token of the model takes one second
    return num_tokens / PASSES, num_tokens / seconds, kept / (PASSES * num_drafted)


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.6, 0.95, 1.0])
@pytest.mark.parametrize(("num_drafted", "cost_ratio"), [(1, 0.3), (4, 0.5), (8, 0.05)])
def test_formulas_agree_with_a_simulation(acceptance: float, num_drafted: int, cost_ratio: float) -> None:
    tokens, faster, share = simulated(acceptance, num_drafted, cost_ratio)
    # 40,000 passes of at most 9 tokens: a standard error of at most 0.02 tokens
    assert tokens_per_pass(acceptance, num_drafted) == pytest.approx(tokens, abs=0.08)
    assert speed_up(acceptance, num_drafted, cost_ratio) == pytest.approx(faster, abs=0.08)
    assert accepted_share(acceptance, num_drafted) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("acceptance", "num_drafted"), [(0.3, 2), (0.7, 4), (0.9, 8)])
def test_acceptance_is_found_from_what_a_server_counts(acceptance: float, num_drafted: int) -> None:
    generator = random.Random(20_252)
    num_answers, passes, tokens, guesses, kept = 50, 0, 0, 0, 0
    for _ in range(num_answers):
        tokens += 1  # from reading the prompt
        for _ in range(generator.randint(300, 500)):
            right = 0
            while right < num_drafted and generator.random() < acceptance:
                right += 1
            passes, guesses, kept = passes + 1, guesses + num_drafted, kept + right
            tokens += right + 1
    assert num_passes(tokens, num_answers, kept) == passes
    assert acceptance_of(kept / guesses, guesses / passes) == pytest.approx(acceptance, abs=0.01)


@given(st.floats(0.0, 0.999), DRAFTED)
def test_acceptance_is_found_again_from_the_share(acceptance: float, num_drafted: int) -> None:
    share = accepted_share(acceptance, num_drafted)
    found = acceptance_of(share, num_drafted)
    assert accepted_share(found, num_drafted) == pytest.approx(share, abs=1e-9)
    assert share <= acceptance + 1e-9


@given(st.floats(0.0, 0.99))
def test_one_guess_breaks_even_where_it_is_right_as_often_as_it_costs(cost_ratio: float) -> None:
    # (1 + a) / (c + 1) = 1 exactly where a = c
    found = break_even(1, cost_ratio)
    assert found == pytest.approx(cost_ratio, abs=1e-9)


@given(DRAFTED, st.floats(0.01, 0.99))
def test_break_even_parts_loss_from_gain(num_drafted: int, cost_ratio: float) -> None:
    found = break_even(num_drafted, cost_ratio)
    assert found is not None
    assert speed_up(min(found + 1e-6, 1.0), num_drafted, cost_ratio) >= 1
    assert speed_up(found - 1e-6, num_drafted, cost_ratio) < 1


def test_a_draft_as_slow_as_the_model_never_pays() -> None:
    assert break_even(4, 1.0) is None
