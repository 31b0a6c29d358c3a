"""Which documents are gone on with, and which continuations are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cusprun.corpus.augment import Prompt, choose_prompts, keep_new
from cusprun.records import Augment, Corpora, TokenizedDocument


def document(dimension: str, *ids: int, name: str | None = None) -> TokenizedDocument:
    return TokenizedDocument(dimension, name or f"{dimension}{ids}", tuple(ids))


def corpora(**documents: int) -> Corpora:
    """So many calibration documents of 20 tokens in each dimension, all different."""
    return Corpora(
        calibration=tuple(
            document(dimension, *range(100 * number, 100 * number + 20))
            for dimension, count in documents.items()
            for number in range(count)
        ),
        held_out=(document("task", *range(9000, 9020)),),
    )


def places(prompts: tuple[Prompt, ...]) -> list[tuple[str, int]]:
    return [(prompt.dimension, prompt.token_ids[0] // 100) for prompt in prompts]


def test_the_dimensions_take_turns_and_begin_again_when_used_up() -> None:
    prompts = choose_prompts(corpora(language=1, task=3), Augment(documents=7), 0, 512)
    assert places(prompts) == [
        ("language", 0),
        ("task", 0),
        ("language", 0),
        ("task", 1),
        ("language", 0),
        ("task", 2),
        ("language", 0),
    ]
    assert len({prompt.seed for prompt in prompts}) == 7


def test_greedy_continuations_are_made_once_of_each_document() -> None:
    prompts = choose_prompts(corpora(language=1, task=3), Augment(documents=100, temperature=0), 0, 512)
    assert places(prompts) == [("language", 0), ("task", 0), ("task", 1), ("task", 2)]


@pytest.mark.parametrize(("wanted", "length"), [(4, 4), (10, 10), (32, 10)])
def test_a_prompt_is_at_most_half_of_its_document(wanted: int, length: int) -> None:
    (prompt,) = choose_prompts(corpora(task=1), Augment(documents=1, prompt_tokens=wanted), 0, 24)
    assert prompt.token_ids == tuple(range(length))
    assert prompt.max_new_tokens == 24 - length


def test_a_document_of_two_tokens_gives_one() -> None:
    short = Corpora(calibration=(document("task", 5, 6),), held_out=())
    (prompt,) = choose_prompts(short, Augment(documents=1, max_new_tokens=3), 0, 512)
    assert (prompt.token_ids, prompt.max_new_tokens) == ((5,), 3)


def test_a_seed_is_its_documents_own() -> None:
    few, many = corpora(task=2), corpora(task=5, language=4)
    settings = Augment(documents=50)

    def seeds(prompts: tuple[Prompt, ...]) -> set[int]:
        return {prompt.seed for prompt in prompts if prompt.dimension == "task"}

    of_many = seeds(choose_prompts(many, settings, 0, 512))
    assert seeds(choose_prompts(few, replace(settings, documents=2), 0, 512)) < of_many
    assert not seeds(choose_prompts(few, settings, 1, 512)) & of_many


def test_held_out_documents_are_never_begun() -> None:
    prompts = choose_prompts(corpora(task=2), Augment(documents=50), 0, 512)
    assert {prompt.token_ids[0] for prompt in prompts} == {0, 100}


def spelt(ids: tuple[int, ...]) -> str:
    """As a tokenizer that spells token 1 like the tokens 2 and 3."""
    return "-".join("2-3" if token == 1 else str(token) for token in ids)


def test_what_repeats_a_text_is_dropped() -> None:
    given = Corpora(
        calibration=(document("task", 4, 5, 6, 7),),
        held_out=(document("task", 8, 9, 2, 3, 8),),
        general=(document("general", 7, 7, 7, 7, name="general text"),),
    )
    kept = document("task", 4, 5, 9)
    longer = document("task", 4, 5, 6, 7, 8)  # all of a calibration document and more
    generated = [
        document("task", 4, 5),  # the prompt alone
        document("task", 8, 9),  # the beginning of a held-out document
        document("task", 8, 9, 2, 3, 8, 4, 4),  # a held-out document and more
        document("task", 7, 7, 7, 7, 1),  # a general one and more
        document("task", 8, 9, 1, 8, name="8-9-2-3-8"),  # a held-out text in other tokens
        document("task", 1, 7, name="general text"),
        kept,
        longer,
        replace(kept, text_hash="another spelling"),
        document("task", 5, 6, name=kept.text_hash),
    ]
    assert keep_new(given, generated, spelt) == (kept, longer)


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


@given(st.lists(IDS, max_size=6), st.lists(IDS, max_size=4), st.lists(IDS, max_size=12))
def test_beginnings_are_found_as_by_comparing_all(
    existing: list[tuple[int, ...]], unseen: list[tuple[int, ...]], made: list
) -> None:
    kept: list[tuple[int, ...]] = []
    for ids in made:
        repeats = any(known[: len(ids)] == ids for known in [*existing, *unseen, *kept])
        if not repeats and not any(ids[: len(known)] == known for known in unseen):
            kept.append(ids)
    found = keep_new(
        Corpora(
            calibration=tuple(document("task", *ids) for ids in existing),
            held_out=tuple(document("task", *ids) for ids in unseen[::2]),
            general=tuple(document("general", *ids) for ids in unseen[1::2]),
        ),
        [document("task", *ids) for ids in made],
        str,
    )
    assert [item.token_ids for item in found] == kept
