"""The split: no text on both sides, whatever comes twice, from where, and in what order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cusprun.corpus.split import split, text_hash
from cusprun.records import DIMENSIONS, Document, Message

TEXTS = st.one_of(
    st.sampled_from(["one", "two", "three", "a  b", "a b", " a b\n", "caf\u00e9", "cafe\u0301"]),
    st.text(min_size=1, max_size=8).filter(str.strip),
)
PLAIN = st.builds(Document, st.sampled_from(DIMENSIONS), TEXTS)
CHAT = st.builds(
    lambda dimension, question, answer: Document(
        dimension, messages=(Message("user", question), Message("assistant", answer))
    ),
    st.sampled_from(DIMENSIONS),
    TEXTS,
    TEXTS,
)
DOCUMENTS = st.lists(st.one_of(PLAIN, CHAT), max_size=30)
SHARES = st.floats(0.01, 0.5)
SEEDS = st.integers(0, 1000)


def hashes(documents: tuple[Document, ...]) -> set[str]:
    return {text_hash(document) for document in documents}


@given(DOCUMENTS, SHARES, SEEDS)
def test_sides_share_no_text_and_lose_none(documents: list[Document], share: float, seed: int) -> None:
    calibration, held_out = split(documents, share, seed)
    assert not hashes(calibration) & hashes(held_out)
    places = [(d.dimension, text_hash(d)) for d in (*calibration, *held_out)]
    assert len(places) == len(set(places))
    assert set(places) == {(d.dimension, text_hash(d)) for d in documents}


@given(DOCUMENTS, SHARES, SEEDS, st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(
    documents: list[Document], share: float, seed: int, rng: random.Random
) -> None:
    shuffled = documents + documents[: len(documents) // 2]
    rng.shuffle(shuffled)
    assert split(shuffled, share, seed) == split(documents, share, seed)


@given(DOCUMENTS, SHARES, SEEDS)
def test_every_dimension_keeps_a_calibration_document(
    documents: list[Document], share: float, seed: int
) -> None:
    calibration, held_out = split(documents, share, seed)
    assert {d.dimension for d in calibration} == {d.dimension for d in documents}
    if len({d.dimension for d in documents}) == 1 and len(hashes(tuple(documents))) >= 2:
        assert held_out


@given(SEEDS, st.sampled_from([0.05, 0.2, 0.5]))
@settings(max_examples=20, deadline=None)
def test_share_is_close_on_many(seed: int, share: float) -> None:
    _, held_out = split([Document("task", f"document {i}") for i in range(2000)], share, seed)
    assert abs(len(held_out) / 2000 - share) < 0.06


def test_seed_changes_the_sides() -> None:
    documents = [Document("task", f"document {i}") for i in range(50)]
    assert split(documents, 0.2, 0) != split(documents, 0.2, 1)


def test_new_documents_do_not_move_old_ones() -> None:
    old = [Document("task", f"document {i}") for i in range(100)]
    _, before = split(old, 0.2, 3)
    _, after = split([*old, *(Document("task", f"more {i}") for i in range(100))], 0.2, 3)
    assert hashes(before) <= hashes(after)


def test_two_dimensions_of_one_text_each_hold_nothing_out() -> None:
    calibration, held_out = split([Document("task", "one"), Document("domain", "two")], 0.5, 0)
    assert (len(calibration), len(held_out)) == (2, 0)


@pytest.mark.parametrize("seed", range(20))
def test_two_texts_hold_one_out(seed: int) -> None:
    calibration, held_out = split([Document("task", "one"), Document("task", "two")], 0.01, seed)
    assert (len(calibration), len(held_out)) == (1, 1)


def test_text_and_chat_of_the_same_words_are_the_same_text() -> None:
    chat = Document("task", messages=(Message("user", "Why?"), Message("assistant", "Because.")))
    assert text_hash(chat) == text_hash(Document("language", "Why?\nBecause."))
    assert text_hash(Document("task", "2\u00b2")) != text_hash(Document("task", "22"))
