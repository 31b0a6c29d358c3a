"""The stop filter against its definition, character by character."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve.api.stops import StopFilter

TEXTS = st.text(st.sampled_from("abé"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("abé"), min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> str | None:
    """Return what is shown of a text whose characters come one by one; None when no stop is in it."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return None


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(place % (len(text) + 1) for place in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 99), max_size=8))
def test_any_pieces_give_the_text_before_the_first_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    filter_ = StopFilter(stops)
    shown = "".join(filter_.push(piece) for piece in pieces(text, cuts))
    wanted = cut(text, stops)
    assert filter_.is_stopped == (wanted is not None)
    assert shown + filter_.finish() == (text if wanted is None else wanted)


@given(text=TEXTS, stops=STOPS)
def test_what_is_held_back_is_the_beginning_of_a_stop_and_no_more(text: str, stops: list[str]) -> None:
    filter_ = StopFilter(stops)
    shown = ""
    for end in range(1, len(text) + 1):
        shown += filter_.push(text[end - 1])
        if filter_.is_stopped:
            return
        open_ends = [
            size
            for stop in stops
            for size in range(1, len(stop))
            if size <= end and text[end - size : end] == stop[:size]
        ]
        assert end - len(shown) == max(open_ends, default=0)


def test_nothing_comes_after_a_stop() -> None:
    filter_ = StopFilter(["END"])
    assert filter_.push("one E") == "one "
    assert filter_.push("ND two") == ""
    assert filter_.is_stopped
    assert filter_.push("three") == ""
    assert filter_.finish() == ""
