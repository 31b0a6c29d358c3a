"""What a draft model is expected to save.

In each pass the draft guesses ``num_drafted`` tokens (k), the model checks them all at once, keeps those
before the first that it would not have said, and adds one of its own. ``acceptance`` (a) is the probability
that a guess is right when those before it were, and taken to be the same for each. ``cost_ratio`` (c) is the
draft's time for a token over the model's. Checking k + 1 tokens is taken to cost what one costs, which holds
where reading the weights takes most of the time. (Leviathan, Kalman and Matias 2023, arXiv:2211.17192.)
"""

from __future__ import annotations

from collections.abc import Callable

_HALVINGS = 60  # of an interval of length 1: beyond the precision of a float


def tokens_per_pass(acceptance: float, num_drafted: float) -> float:
    """Return the mean number of tokens that one pass gives: (1 - a^(k+1)) / (1 - a), equation 1."""
    if acceptance == 1:
        return num_drafted + 1
    return float((1 - acceptance ** (num_drafted + 1)) / (1 - acceptance))


def speed_up(acceptance: float, num_drafted: float, cost_ratio: float) -> float:
    """Return the time without the draft over that with it, theorem 3.8.

    (1 - a^(k+1)) / ((1 - a)(k c + 1)).
    """
    return tokens_per_pass(acceptance, num_drafted) / (num_drafted * cost_ratio + 1)


def accepted_share(acceptance: float, num_drafted: float) -> float:
    """Return the share of all guesses that are kept.

    Smaller than ``acceptance``, since right guesses after a wrong one are lost.
    """
    return (tokens_per_pass(acceptance, num_drafted) - 1) / num_drafted


def acceptance_of(share: float, num_drafted: float) -> float:
    """Return the acceptance at which ``share`` of all guesses is kept, from 0 to 1."""
    return _smallest(lambda acceptance: accepted_share(acceptance, num_drafted) >= share)


def break_even(num_drafted: float, cost_ratio: float) -> float | None:
    """Return the acceptance from which on the draft saves time; None when it never does."""
    if cost_ratio >= 1:
        return None
    return _smallest(lambda acceptance: speed_up(acceptance, num_drafted, cost_ratio) >= 1)


def num_passes(num_tokens: int, num_answers: int, num_kept: int) -> int:
    """Return the passes of the model that made ``num_tokens`` of all answers, kept guesses among them.

    Reading a prompt gives an answer's first token; every pass after it, one besides the guesses it keeps.
    """
    return num_tokens - num_answers - num_kept


def _smallest(holds: Callable[[float], bool]) -> float:
    """Return the smallest number from 0 to 1 at which a condition holds that goes on holding above it."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
