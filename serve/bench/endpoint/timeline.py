"""From the moments of one request to its record. Pure: every time comes from outside, nothing waits.

Moments are seconds of one clock. The definitions, in milliseconds:

- *time to first token*: from sending the request, its connection included, to the first event with text to
  read. An event that only names a role, or whose text is empty, is none; text of the model's thinking
  (``reasoning_content`` or ``reasoning``) is.
- *inter-token latency*: between two events with text that follow each other. Where **every** such event
  carries a running ``usage`` that grows, an event that brought n tokens gives n latencies of an n-th of its
  gap each.
  Otherwise an event gives one latency, however many tokens it may hold: a guess would invent numbers.
  Tokens that came in one event with the first have no gap and give none.
- *time per output token*: from the first to the last event with text, over the output tokens less one.
- *end-to-end latency*: from sending to the event with the ``finish_reason``; without one, to the end of the
  stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from serve.bench.endpoint.events import Event
from serve.bench.endpoint.records import (
    DROPPED,
    MALFORMED,
    NO_TOKENS,
    OK,
    REFUSED,
    WRONG_USAGE,
    RequestRecord,
)

CountTokens = Callable[[str], int]
"""Returns the number of tokens of a text, special tokens not added."""

Moment = tuple[float, Event]

FROM_USAGE = "usage"
FROM_TOKENIZER = "tokenizer"
_MS_DIGITS = 3  # whole microseconds, below what any clock over a network can tell


@dataclass(frozen=True)
class Timeline:
    """One request as it was seen: when it was due, when it was sent, and every event with its time.

    ``end_s`` is when the stream ended or was given up. ``failure`` is the status that the transport alone
    decided (``refused``, ``dropped``, ``stalled``, ``timeout``, ``malformed``), with ``reason``; None when
    the stream came to an end, whatever it held. ``http_status`` is None where no answer began.
    """

    due_s: float
    sent_s: float
    events: tuple[Moment, ...]
    end_s: float
    failure: str | None = None
    reason: str | None = None
    http_status: int | None = None


def judge(
    timeline: Timeline, max_tokens: int, start_s: float, count: CountTokens | None = None
) -> RequestRecord:
    """Return the record of a request that asked for at most ``max_tokens`` tokens.

    ``start_s`` is when the run of its level began; ``count`` counts tokens where the endpoint does not.
    """
    contents = [(moment, event) for moment, event in timeline.events if event.content]
    prompt_tokens, stated = _stated_usage(timeline.events)
    status, reason = _status(timeline, contents, stated, max_tokens)
    tokens, tokens_from = stated, FROM_USAGE if stated is not None else None
    if tokens is None and count is not None and status == OK:
        tokens, tokens_from = count("".join(event.content for _, event in contents)), FROM_TOKENIZER
    times = [moment for moment, _ in contents]
    ended_s = _ended_s(timeline) if status in (OK, WRONG_USAGE, NO_TOKENS) else None
    return RequestRecord(
        status=status,
        reason=reason,
        sent_s=round(timeline.sent_s - start_s, 6),
        lateness_ms=_ms(max(0.0, timeline.sent_s - timeline.due_s)),
        time_to_first_token_ms=_ms(times[0] - timeline.sent_s) if times else None,
        inter_token_latencies_ms=tuple(_ms(gap) for gap in _gaps(contents)),
        time_per_output_token_ms=_per_token_ms(times, tokens) if status == OK else None,
        end_to_end_latency_ms=None if ended_s is None else _ms(ended_s - timeline.sent_s),
        prompt_tokens=prompt_tokens,
        output_tokens=tokens,
        tokens_from=tokens_from,
        content_chunks=len(contents),
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, _MS_DIGITS)


def _stated_usage(events: Sequence[Moment]) -> tuple[int | None, int | None]:
    """Return the prompt and completion tokens of the last ``usage``."""
    for _, event in reversed(events):
        if event.usage is not None:
            return event.usage.prompt_tokens, event.usage.completion_tokens
    return None, None


def _status(
    timeline: Timeline, contents: Sequence[Moment], stated: int | None, max_tokens: int
) -> tuple[str, str | None]:
    """Return the status and the reason of what is not ``ok``, the earliest cause first."""
    for _, event in timeline.events:
        if event.error is not None:
            return REFUSED, f"the stream ended in an error: {event.error}"
        if event.fault is not None:
            return MALFORMED, event.fault
    is_whole = any(event.finish_reason for _, event in timeline.events)
    # A connection that breaks after the answer's end has lost nothing but, perhaps, the usage.
    if timeline.failure is not None and not (is_whole and timeline.failure == DROPPED):
        return timeline.failure, timeline.reason
    if not is_whole and not any(event.is_done for _, event in timeline.events):
        return DROPPED, f"the stream ended after {_chunks(contents)}, without a finish_reason or [DONE]"
    if not contents:
        told = "" if stated is None else f" (usage: {stated} tokens)"
        return NO_TOKENS, f"the answer ended without any text{told}"
    fault = usage_fault(contents, stated, max_tokens)
    return (OK, None) if fault is None else (WRONG_USAGE, fault)


def _chunks(contents: Sequence[Moment]) -> str:
    return f"{len(contents)} events with text"


def usage_fault(contents: Sequence[Moment], stated: int | None, max_tokens: int) -> str | None:
    """Say how the stated output tokens contradict what was received, None where they do not.

    An event with text holds at least one token, but one token may end the thinking and begin the answer, and
    so be two events.
    """
    if stated is None:
        return None
    if stated <= 0:
        return f"usage says {stated} tokens, and text came"
    if stated > max_tokens:
        return f"usage says {stated} tokens, and at most {max_tokens} were asked for"
    turns = sum(bool(one.text) != bool(other.text) for (_, one), (_, other) in pairwise(contents))
    if stated < len(contents) - turns:
        return f"usage says {stated} tokens, and text came in {len(contents)} events"
    return None


def _ended_s(timeline: Timeline) -> float:
    return next(
        (moment for moment, event in timeline.events if event.finish_reason or event.is_done), timeline.end_s
    )


def _per_token_ms(times: Sequence[float], tokens: int | None) -> float | None:
    if tokens is None or tokens < 2 or not times:
        return None
    return _ms((times[-1] - times[0]) / (tokens - 1))


def _gaps(contents: Sequence[Moment]) -> list[float]:
    """Return the inter-token latencies in seconds."""
    times = [moment for moment, _ in contents]
    whole = [later - earlier for earlier, later in pairwise(times)]
    running = [event.usage.completion_tokens if event.usage else None for _, event in contents]
    counts = [count for count in running if count is not None]
    if len(counts) < len(contents) or any(later <= earlier for earlier, later in pairwise(counts)):
        return whole
    brought = [later - earlier for earlier, later in pairwise(counts)]
    return [gap / num for gap, num in zip(whole, brought, strict=True) for _ in range(num)]
