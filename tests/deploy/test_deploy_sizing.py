"""What fits is found, what does not is refused with the least that would do: against brute force."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cusprun.errors import UserError
from deploy.facts import Sizing
from deploy.sizing import MIN_CONTEXT_TOKENS, TooLittleMemoryError, plan

MIB = 2**20


def granted(sizing: Sizing) -> int:
    return sizing.memory_limit_bytes


def test_the_parts_add_up_and_the_grant_is_above_them() -> None:
    sizing = plan(100 * MIB, 20_000, 120 * MIB, 8192, context_tokens=1000, parallel=3)
    assert sizing.cache_bytes == 60_000_000
    assert sizing.memory_bytes == 220 * MIB + 60_000_000
    assert sizing.memory_bytes < sizing.memory_limit_bytes < 1.2 * sizing.memory_bytes
    assert sizing.memory_limit_bytes == sizing.memory_limit_mib * MIB


def test_a_buffer_is_counted_once_whatever_the_number_of_requests() -> None:
    one, four = (
        plan(0, 0, 0, 8192, context_tokens=1000, parallel=count, buffer_bytes_per_token=50)
        for count in (1, 4)
    )
    assert one.memory_bytes == four.memory_bytes == four.overhead_bytes == 50_000


@pytest.mark.parametrize(("limit", "wanted"), [(131_072, 4096), (4096, 4096), (256, 256)])
def test_without_a_budget_the_context_is_usual_or_the_models(limit: int, wanted: int) -> None:
    sizing = plan(1, 1, 1, limit)
    assert (sizing.context_tokens, sizing.parallel) == (wanted, 4)


def check_least(error: TooLittleMemoryError, planned: Callable[[int], Sizing], budget_bytes: int) -> None:
    """What is said to do does, and a MiB less than the least does not."""
    assert error.least_bytes > budget_bytes
    found = re.search(r"--memory (\d+)MB", str(error))
    assert found is not None
    stated = int(found[1]) * 10**6
    assert granted(planned(stated)) <= stated
    with pytest.raises(TooLittleMemoryError):
        planned(error.least_bytes - MIB)


@given(
    weights=st.integers(0, 2000),
    per_token=st.integers(0, 300_000),
    buffer=st.integers(0, 4000),
    limit=st.integers(1, 20_000),
    budget=st.integers(1, 4000),
    parallel=st.none() | st.integers(1, 6),
    context=st.none() | st.integers(1, 20_000),
)
def test_a_budget_is_kept_or_the_least_that_would_do_is_true(
    weights: int,
    per_token: int,
    buffer: int,
    limit: int,
    budget: int,
    parallel: int | None,
    context: int | None,
) -> None:
    context = None if context is None else min(context, limit)

    def planned(budget_bytes: int) -> Sizing:
        return plan(
            weights * MIB,
            per_token,
            100 * MIB,
            limit,
            budget_bytes=budget_bytes,
            context_tokens=context,
            parallel=parallel,
            buffer_bytes_per_token=buffer,
        )

    try:
        sizing = planned(budget * MIB)
    except TooLittleMemoryError as error:
        check_least(error, planned, budget * MIB)
        return
    assert granted(sizing) <= budget * MIB
    assert sizing.context_tokens <= limit
    assert context in (None, sizing.context_tokens)
    assert parallel in (None, sizing.parallel)
    if context is None:
        assert sizing.context_tokens >= min(MIN_CONTEXT_TOKENS, limit)
        if sizing.context_tokens < limit:  # a step more would not fit
            more = plan(
                weights * MIB,
                per_token,
                100 * MIB,
                limit,
                context_tokens=min(limit, sizing.context_tokens + 256),
                parallel=sizing.parallel,
                buffer_bytes_per_token=buffer,
            )
            assert granted(more) > budget * MIB


def test_requests_go_before_the_context_does() -> None:
    per_token = 1024
    room = int(1.1 * (4096 * per_token * 2 + 100 * MIB)) + MIB
    sizing = plan(100 * MIB, per_token, 0, 131_072, budget_bytes=room)
    assert sizing.parallel == 2
    assert 4096 <= sizing.context_tokens < 2 * 4096


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_tokens": 0}, "context must be at least 1"),
        ({"parallel": -1}, "parallel must be at least 1"),
        ({"budget_bytes": 0}, "memory must be at least 1"),
        ({"context_tokens": 9000}, "over the model's 8,192"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(1, 1, 1, 8192, **changes)  # type: ignore[arg-type]
