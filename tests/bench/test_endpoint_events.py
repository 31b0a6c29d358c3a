"""Bytes to events: however they were cut, and whatever is in them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.bench.endpoint.events import Event, EventReader, Usage, read_event

LINE_ENDS = ("\n", "\r\n", "\r")


def read(wire: bytes, cuts: list[int]) -> tuple[list[bytes], EventReader]:
    reader = EventReader()
    found = [
        data
        for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)
        for data in reader.push(wire[start:end])
    ]
    return found + reader.finish(), reader


@given(st.lists(st.text(min_size=1, max_size=6), max_size=6), st.sampled_from(LINE_ENDS), st.data())
def test_any_cut_of_the_bytes_gives_the_same_events(texts: list[str], end: str, data: st.DataObject) -> None:
    payloads = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    wire = "".join(f": ping{end}event: x{end}data: {payload}{end}data: 1{end}{end}" for payload in payloads)
    raw = wire.encode("utf-8", "surrogatepass")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    found, reader = read(raw, cuts)
    assert found == [f"{payload}\n1".encode("utf-8", "surrogatepass") for payload in payloads]
    assert reader.stray is None


@pytest.mark.parametrize("end", LINE_ENDS)
def test_a_cut_at_any_place_changes_nothing(end: str) -> None:
    raw = f"\ufeffdata: é{end}data: b{end}{end}: ping{end}{end}data:[DONE]{end}{end}".encode()
    for cut in range(len(raw)):
        assert read(raw, [cut])[0] == ["é\nb".encode(), b"[DONE]"]


@given(st.binary(max_size=80), st.data())
def test_any_bytes_cut_anyhow_are_read_alike(raw: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    (whole, one), (parts, other) = read(raw, []), read(raw, cuts)
    assert (parts, other.stray) == (whole, one.stray)
    for event in whole:
        read_event(event, "chat")


@pytest.mark.parametrize(
    ("wire", "found"),
    [
        (b"data:[DONE]\n\n", [b"[DONE]"]),
        (b"data: [DONE]\n\n", [b"[DONE]"]),
        (b"data: [DONE]", [b"[DONE]"]),
        (b"data: [DONE]\n", [b"[DONE]"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data\n\ndata:\n\n", []),
        (b": comment\n\nid: 1\nretry: 5\n\n", []),
    ],
)
def test_the_rules_of_event_streams(wire: bytes, found: list[bytes]) -> None:
    assert read(wire, [])[0] == found


def test_what_is_no_stream_is_kept_for_the_reason() -> None:
    assert read(b'{"answer": 1}\n<html>', [])[1].stray == b'{"answer": 1}'


@pytest.mark.parametrize("wire", [b"data: " + b"x" * 60, b"data: 123456789\n" * 6])
def test_an_event_without_end_is_refused(wire: bytes) -> None:
    with pytest.raises(ValueError, match="more than 50 bytes"):
        EventReader(max_bytes=50).push(wire)


def chat(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, **fields}]}


@pytest.mark.parametrize(
    ("plain", "event"),
    [
        (chat(delta={"role": "assistant", "content": ""}), Event()),
        (chat(delta={"role": "assistant", "content": None}), Event()),
        (chat(delta={"content": "hé"}), Event(text="hé")),
        (chat(delta={"reasoning_content": "so"}), Event(reasoning="so")),
        (chat(delta={"reasoning": "so"}), Event(reasoning="so")),
        (chat(delta={}, finish_reason="stop"), Event(finish_reason="stop")),
        (chat(delta=None, finish_reason="stop"), Event(finish_reason="stop")),
        ({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}, Event(usage=Usage(3, 4))),
        ({"usage": {"completion_tokens": True}}, Event(usage=Usage(None, None))),
        ({"usage": None, "choices": None}, Event()),
        ({"error": {"message": "no\nmemory", "code": 500}}, Event(error="no memory")),
        ({"error": "no"}, Event(error="no")),
        ({"object": "error", "message": "no"}, Event(error="no")),
    ],
)
def test_what_an_event_of_a_chat_says(plain: Any, event: Event) -> None:
    assert read_event(json.dumps(plain).encode(), "chat") == event


def test_what_an_event_of_a_completion_says() -> None:
    plain = {"choices": [{"text": "a", "finish_reason": "length"}]}
    assert read_event(json.dumps(plain).encode(), "completions") == Event("a", "", "length")


@pytest.mark.parametrize(
    "raw",
    [
        b"{", b"[1]", b"7", b"\xff", b'{"choices": [1]}', b'{"choices": {"a": 1}}', b'{"choices": "a"}',
        b'{"choices": [{"delta": {"content": 1}}]}', b'{"choices": [{"delta": [1]}]}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_event_has_a_fault_of_one_short_line(raw: bytes) -> None:
    event = read_event(raw, "chat")
    assert event.fault is not None
    assert event.is_last
    assert len(event.fault) < 200
    assert event.fault.isprintable()


FIELDS = ("choices", "delta", "usage", "error", "content", "text", "finish_reason")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(FIELDS), inner),
        max_leaves=8,
    )
)
def test_whatever_json_comes_is_read(plain: Any) -> None:
    for route in ("chat", "completions"):
        read_event(json.dumps(plain).encode(), route)
