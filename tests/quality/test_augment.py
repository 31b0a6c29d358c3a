"""Generated calibration documents, from the expert to the corpora."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cusprun.corpus import build_corpora, corpus_hash, load_tokenizer
from cusprun.errors import CorpusError
from cusprun.pipeline.augment import augmented
from cusprun.pipeline.opening import OpenModel, open_model
from cusprun.records import Augment, Corpora, Expert, Source

WORDS = ("river", "stone", "apple", "seven", "cloud", "paper", "green", "under", "train", "music")


@pytest.fixture
def expert(tmp_path: Path, own_cache: Path) -> Expert:
    for start, name in enumerate(("domain", "task", "general")):
        rows = (
            f"{number} " + " ".join(WORDS[(number * (step + 3) + step) % 10] for step in range(12))
            for number in range(start * 100, start * 100 + 16)
        )
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return Expert(
        "tiny",
        {name: (Source(path=str(tmp_path / f"{name}.jsonl")),) for name in ("domain", "task")},
        general=(Source(path=str(tmp_path / "general.jsonl")),),
        max_tokens=60,
        augment=Augment(documents=12, max_new_tokens=24, prompt_tokens=6),
    )


@pytest.fixture
def opened(tiny_llama: Path) -> OpenModel:
    return open_model(tiny_llama)


@pytest.fixture
def given(expert: Expert, tiny_llama: Path) -> Corpora:
    return build_corpora(expert, tiny_llama)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be generated any more."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr("cusprun.quality.continuation.continuations", refuse)


def test_documents_join_their_dimensions(expert: Expert, opened: OpenModel, given: Corpora) -> None:
    found = augmented(opened, expert, given)
    assert (found.held_out, found.general) == (given.held_out, given.general)
    old = len(given.calibration)
    assert found.calibration[:old] == given.calibration
    new = found.calibration[old:]
    assert 8 <= len(new) <= 12
    dimensions = [item.dimension for item in new]
    assert abs(dimensions.count("domain") - dimensions.count("task")) <= 4
    beginnings = {(item.dimension, item.token_ids[:6]) for item in given.calibration}
    assert all((item.dimension, item.token_ids[:6]) in beginnings for item in new)
    assert all(6 < len(item.token_ids) <= 30 for item in new)
    assert corpus_hash(found) != corpus_hash(given)


def test_no_held_out_text_is_begun_or_made(expert: Expert, opened: OpenModel, given: Corpora) -> None:
    found = augmented(opened, replace(expert, augment=replace(expert.augment, documents=60)), given)
    new = found.calibration[len(given.calibration) :]
    held_out = {item.text_hash for item in given.held_out}
    only_held_out = {item.token_ids[:6] for item in given.held_out} - {
        item.token_ids[:6] for item in given.calibration
    }
    assert only_held_out
    assert not held_out & {item.text_hash for item in new}
    assert not only_held_out & {item.token_ids[:6] for item in new}
    assert len({item.text_hash for item in new}) == len(new)


def test_a_model_that_knows_the_held_out_texts_brings_none_in(
    expert: Expert, opened: OpenModel, given: Corpora, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had learnt them: each continuation makes a held-out document, and two make new ones."""
    texts = [item.token_ids for item in given.held_out]
    prompts: list[Any] = []

    def recite(
        model: Any, tokenizer: Any, chosen: Any, *others: Any, **options: Any
    ) -> tuple[tuple[int, ...], ...]:
        prompts.extend(chosen)
        rows = [
            next(text[len(p.token_ids) :] for text in texts if text[: len(p.token_ids)] == p.token_ids)
            for p in chosen
        ]
        return (*rows[:-2], (200, 201), (202, 203))

    monkeypatch.setattr("cusprun.quality.continuation.continuations", recite)
    # The beginnings of the held-out documents themselves, so that nothing but the text tells them apart.
    calibration = tuple(
        replace(item, token_ids=(*text[:6], *item.token_ids[6:]))
        for item, text in zip(given.calibration, texts * 20, strict=False)
    )
    given = replace(given, calibration=calibration)
    found = augmented(opened, expert, given)
    assert len(prompts) == 12
    made = [item.token_ids for item in found.calibration[len(calibration) :]]
    assert made == [(*prompts[-2].token_ids, 200, 201), (*prompts[-1].token_ids, 202, 203)]


def test_the_second_time_it_is_found(
    expert: Expert, opened: OpenModel, given: Corpora, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = augmented(opened, expert, given)
    forbid(monkeypatch)
    assert augmented(opened, expert, given) == found
    with pytest.raises(AssertionError, match="generated again"):
        augmented(opened, replace(expert, seed=1), given)
    for change in ({"temperature": 0.5}, {"documents": 11}, {"max_new_tokens": 23}, {"prompt_tokens": 5}):
        with pytest.raises(AssertionError, match="generated again"):
            augmented(opened, replace(expert, augment=replace(expert.augment, **change)), given)
    with pytest.raises(AssertionError, match="generated again"):
        augmented(replace(opened, model_hash="another"), expert, given)
    with pytest.raises(AssertionError, match="generated again"):
        augmented(opened, expert, replace(given, calibration=given.calibration[1:]))


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"token_ids": ["1 2"]}']
    + ['{"token_ids": [' + f'"{row}", ' * 11 + f'"{row}"]}}' for row in ("x", "3 -1", "3 99999")],
)
def test_a_damaged_cache_is_made_again(
    expert: Expert, opened: OpenModel, given: Corpora, own_cache: Path, text: str
) -> None:
    found = augmented(opened, expert, given)
    (kept,) = (own_cache / "augmented").iterdir()
    kept.write_text(text, encoding="utf-8")
    assert augmented(opened, expert, given) == found
    assert kept.read_text(encoding="utf-8") != text


def test_the_same_from_scratch_and_another_with_another_seed(
    expert: Expert, opened: OpenModel, given: Corpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = augmented(opened, expert, given)
    other = augmented(opened, replace(expert, seed=1), given)
    assert other.calibration != found.calibration
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "another cache"))
    assert augmented(opened, expert, given) == found


def test_documents_longer_than_the_context_are_refused_before_any_is_made(
    expert: Expert, opened: OpenModel, given: Corpora, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch)
    index = replace(opened.index, config={**opened.index.config, "max_position_embeddings": 29})
    with pytest.raises(
        CorpusError, match=r"'augment' of 'tiny' makes documents of up to 30 tokens, .* most 29"
    ):
        augmented(replace(opened, index=index), expert, given)
    # As long as the context is no fault.
    index = replace(index, config={**index.config, "max_position_embeddings": 30})
    with pytest.raises(AssertionError, match="generated again"):
        augmented(replace(opened, index=index), expert, given)


def test_without_the_wish_nothing_happens(
    expert: Expert, opened: OpenModel, given: Corpora, own_cache: Path
) -> None:
    assert augmented(opened, replace(expert, augment=None), given) is given
    assert not own_cache.exists()


def test_greedy_continuations_spell_what_stock_generation_does(
    expert: Expert, opened: OpenModel, given: Corpora, tiny_llama: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    greedy = replace(expert, augment=Augment(2, temperature=0, max_new_tokens=10, prompt_tokens=6))
    new = augmented(opened, greedy, given).calibration[len(given.calibration) :]
    assert new
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ends = load_tokenizer(tiny_llama).all_special_ids
    for item in new:
        stock = model.generate(
            torch.tensor([item.token_ids[:6]]), max_new_tokens=10, do_sample=False, eos_token_id=ends
        )
        ids = stock[0].tolist()
        assert item.token_ids == tuple(ids[:-1] if ids[-1] in ends else ids)
