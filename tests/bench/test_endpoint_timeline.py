"""Moments to records: every latency against arithmetic by hand, in a clock that only the test moves."""

from __future__ import annotations

import re

import pytest
from fake_endpoint import (
    DONE,
    EMPTY,
    END,
    ROLE,
    FakeTransport,
    Step,
    VirtualLoop,
    answer,
    client_of,
    data,
    delta,
    in_virtual_time,
    usage,
)
from hypothesis import given
from hypothesis import strategies as st

from serve.bench.endpoint.records import RequestRecord
from serve.bench.endpoint.timeline import judge
from serve.bench.endpoint.transport import TransportError

TOLERANCE_MS = 0.01

gaps = st.lists(st.floats(0.0, 30.0), min_size=1, max_size=12)


def record_of(
    steps: list[Step],
    *,
    max_tokens: int = 64,
    connect_s: float = 0.0,
    status: int = 200,
    broken: TransportError | None = None,
    by_words: bool = False,
) -> RequestRecord:
    """Send one request to an endpoint that takes these steps."""

    async def work(loop: VirtualLoop) -> RequestRecord:
        transport = FakeTransport(lambda *_: steps, connect_s=connect_s, status=status, broken=broken)
        loop.block(5.0)
        seen = await client_of(transport, loop).ask("Why?", max_tokens)
        return judge(seen, max_tokens, 5.0, (lambda text: len(text.split())) if by_words else None)

    return in_virtual_time(work)


@given(gaps, st.floats(0.0, 5.0), st.floats(0.0, 5.0), st.floats(0.0, 5.0))
def test_every_latency_is_what_the_endpoint_was_set_to(
    gaps_s: list[float], connect_s: float, role_s: float, tail_s: float
) -> None:
    steps = [
        (role_s, ROLE),
        (0.5, EMPTY),
        *((gap_s, delta(content=" word")) for gap_s in gaps_s),
        (tail_s, END),
        (2.0, usage(len(gaps_s)) + DONE),
    ]
    record = record_of(steps, connect_s=connect_s, max_tokens=len(gaps_s))
    first_s = connect_s + role_s + 0.5 + gaps_s[0]
    assert record.status == "ok"
    assert record.time_to_first_token_ms == pytest.approx(1000 * first_s, abs=TOLERANCE_MS)
    assert record.inter_token_latencies_ms == pytest.approx([1000 * g for g in gaps_s[1:]], abs=TOLERANCE_MS)
    whole_s = first_s + sum(gaps_s[1:]) + tail_s
    assert record.end_to_end_latency_ms == pytest.approx(1000 * whole_s, abs=TOLERANCE_MS)
    if len(gaps_s) == 1:
        assert record.time_per_output_token_ms is None
    else:
        per_token_ms = 1000 * sum(gaps_s[1:]) / (len(gaps_s) - 1)
        assert record.time_per_output_token_ms == pytest.approx(per_token_ms, abs=TOLERANCE_MS)


@given(gaps, st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_how_the_bytes_are_cut_into_packets_of_one_moment_changes_nothing(
    gaps_s: list[float], sizes: list[int]
) -> None:
    whole = answer(gaps_s)
    cut: list[Step] = []
    for delay_s, raw in whole:
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        parts = [raw[start:end] for start, end in zip([0, *ends], [*ends, len(raw)], strict=True)]
        cut += [(delay_s, parts[0]), *((0.0, part) for part in parts[1:])]
    assert record_of(cut) == record_of(whole)


def test_reasoning_is_something_to_read_and_a_role_is_not() -> None:
    steps = [
        (1.0, ROLE),
        (1.0, delta(reasoning_content="Hm")),
        (1.0, delta(reasoning=" so")),
        (1.0, delta(content="Yes")),
        (0.0, END + usage(3) + DONE),
    ]
    record = record_of(steps)
    assert (record.status, record.content_chunks) == ("ok", 3)
    assert record.time_to_first_token_ms == 2000
    assert record.inter_token_latencies_ms == (1000, 1000)


class TestTokensOfAnEvent:
    @staticmethod
    def part(text: str, tokens: int | None) -> bytes:
        choice = {"choices": [{"delta": {"content": text}}]}
        return data(choice if tokens is None else {**choice, "usage": {"completion_tokens": tokens}})

    def test_a_running_usage_spreads_the_gap(self) -> None:
        steps = [
            (1.0, self.part("a b", 2)),
            (0.9, self.part("c d e", 5)),
            (0.2, self.part("f", 6)),
            (0.0, END + usage(6) + DONE),
        ]
        record = record_of(steps)
        assert record.inter_token_latencies_ms == pytest.approx((300, 300, 300, 200))
        assert record.time_per_output_token_ms == pytest.approx(1100 / 5)

    @pytest.mark.parametrize("counts", [(None, None, None), (2, None, 6), (2, 2, 6)])
    def test_without_one_a_gap_is_one_latency(self, counts: tuple[int | None, ...]) -> None:
        steps = [
            (delay_s, self.part("a b", tokens))
            for delay_s, tokens in zip((1.0, 0.9, 0.2), counts, strict=True)
        ]
        record = record_of([*steps, (0.0, END + usage(6) + DONE)])
        assert record.inter_token_latencies_ms == pytest.approx((900, 200))
        assert record.time_per_output_token_ms == pytest.approx(1100 / 5)


class TestCounts:
    STEPS = (*((1.0, delta(content=f" w{number}")) for number in range(4)), (0.0, END))

    def test_usage_is_taken_before_the_tokenizer(self) -> None:
        record = record_of([*self.STEPS, (0.0, usage(6, 11) + DONE)], by_words=True)
        assert (record.output_tokens, record.tokens_from, record.prompt_tokens) == (6, "usage", 11)
        assert record.time_per_output_token_ms == pytest.approx(3000 / 5)

    def test_the_tokenizer_counts_where_usage_is_absent(self) -> None:
        record = record_of([*self.STEPS, (0.0, DONE)], by_words=True)
        assert (record.output_tokens, record.tokens_from, record.prompt_tokens) == (4, "tokenizer", None)
        assert record.time_per_output_token_ms == 1000

    def test_events_are_never_taken_for_tokens(self) -> None:
        record = record_of([*self.STEPS, (0.0, DONE)])
        assert (record.status, record.output_tokens, record.tokens_from) == ("ok", None, None)
        assert record.time_per_output_token_ms is None
        assert record.content_chunks == 4
        assert record.inter_token_latencies_ms == (1000, 1000, 1000)


WORDS: list[Step] = [(0.1, delta(content="a")), (0.1, delta(content="b")), (0.1, delta(content="c"))]


@pytest.mark.parametrize(
    ("tokens", "status", "reason"),
    [
        (3, "ok", None),
        (8, "ok", None),
        (0, "wrong_usage", "usage says 0 tokens, and text came"),
        (-1, "wrong_usage", "usage says -1 tokens, and text came"),
        (9, "wrong_usage", "usage says 9 tokens, and at most 8 were asked for"),
        (2, "wrong_usage", "usage says 2 tokens, and text came in 3 events"),
        ("three", "ok", None),
    ],
)
def test_usage_is_held_against_what_came(tokens: object, status: str, reason: str | None) -> None:
    record = record_of([*WORDS, (0.0, END + usage(tokens) + DONE)], max_tokens=8)
    assert (record.status, record.reason) == (status, reason)
    assert record.time_to_first_token_ms == 100


def test_one_token_may_end_the_thinking_and_begin_the_answer() -> None:
    steps = [(0.1, delta(reasoning="a")), (0.1, delta(content="b")), (0.0, END + usage(1) + DONE)]
    assert record_of(steps).status == "ok"


@pytest.mark.parametrize(
    ("steps", "status", "reason"),
    [
        ([*WORDS, (0.0, DONE)], "ok", ""),
        ([*WORDS, (0.0, END)], "ok", ""),
        ([*WORDS, (0.0, b"data: [DONE]")], "ok", ""),
        (WORDS, "dropped", "ended after 3 events with text"),
        ([*WORDS, (0.0, b'data: {"choi')], "dropped", "ended after 3"),
        ([(0.0, b"")], "dropped", "ended after 0"),
        ([*WORDS, (0.0, data("{not json"))], "malformed", "not JSON: {not json"),
        ([(0.0, b"<html>\n")], "malformed", "no stream of events: <html>"),
        ([*WORDS, (0.0, data({"error": {"message": "out of memory"}}))], "refused", "out of memory"),
        ([(0.0, ROLE + END + usage(0) + DONE)], "no_tokens", r"without any text \(usage: 0 tokens\)"),
        ([(0.0, ROLE + END + DONE)], "no_tokens", "without any text$"),
        ([*WORDS, (61.0, DONE)], "stalled", "no event for 60 s, after 3 events"),
        ([*WORDS, *[(30.0, b": ping\n\n")] * 4, (0.0, DONE)], "stalled", "no event for 60 s"),
        ([*WORDS, *[(59.0, EMPTY)] * 12, (0.0, DONE)], "timeout", "no end within 600 s"),
        ([*WORDS, (0.0, END), (61.0, DONE)], "stalled", "after 4 events"),
    ],
)
def test_how_a_request_can_end(steps: list[Step], status: str, reason: str) -> None:
    record = record_of(steps)
    assert record.status == status
    assert re.search(reason, record.reason or ""), record.reason
    assert (record.end_to_end_latency_ms is not None) == (status in ("ok", "no_tokens"))


def test_a_broken_connection_loses_an_answer_only_before_its_end() -> None:
    broken = TransportError("dropped", "the connection broke")
    lost = record_of(WORDS, broken=broken)
    kept = record_of([*WORDS, (0.0, END)], broken=broken)
    assert (lost.status, lost.reason, kept.status) == ("dropped", "the connection broke", "ok")


def test_a_refusal_has_the_endpoint_s_own_words() -> None:
    body = b'{"error": {"message": "too many requests", "code": 429}}'
    record = record_of([(0.0, body)], status=429)
    assert (record.status, record.reason) == ("refused", "HTTP 429: too many requests")
    assert record_of([(0.0, b"<h1>Bad\ngateway</h1>")], status=502).reason == "HTTP 502: <h1>Bad gateway</h1>"
    assert record_of([(0.0, b'{"detail": "no"}')], status=422).reason == "HTTP 422: no"
    assert record_of([(0.0, b"")], status=503).reason == "HTTP 503"
