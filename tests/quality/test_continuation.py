"""Continuations against stock generation and against the model's own probabilities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cusprun.corpus.augment import Prompt
from cusprun.corpus.tokens import load_tokenizer
from cusprun.errors import ModelError
from cusprun.quality.continuation import BATCH_DOCUMENTS, continuations
from cusprun.quality.stock import load_stock_model

STOPS = {0, 1, 2, 3}
"""The special tokens of the tiny tokenizer."""


def prompts(count: int, tokens: int = 20) -> list[Prompt]:
    """Beginnings of 1 to 12 tokens, seeded."""
    generator = torch.Generator().manual_seed(3)
    return [
        Prompt(
            "task",
            tuple(torch.randint(4, 380, (1 + number % 12,), generator=generator).tolist()),
            tokens - number % 3,
            seed=number,
        )
        for number in range(count)
    ]


@pytest.fixture(params=["tiny_llama", "tiny_gemma"])
def parts(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    folder: Path = request.getfixturevalue(request.param)
    return load_stock_model(folder), load_tokenizer(folder)


def stock_greedy(model: Any, prompt: Prompt, vocab_size: int) -> tuple[int, ...]:
    """Token by token, without padding and without a cache, through the plain forward pass."""
    ids = list(prompt.token_ids)
    for _ in range(prompt.max_new_tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :vocab_size]
        token = int(logits.argmax())
        if token in STOPS:
            break
        ids.append(token)
    return tuple(ids[len(prompt.token_ids) :])


def test_temperature_0_is_stock_greedy_generation(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    chosen = prompts(BATCH_DOCUMENTS + 5)
    found = continuations(model, tokenizer, chosen, 0.0)
    assert list(found) == [stock_greedy(model, prompt, len(tokenizer)) for prompt in chosen]
    first = chosen[11]
    generated = model.generate(
        torch.tensor([first.token_ids]),
        max_new_tokens=first.max_new_tokens,
        do_sample=False,
        suppress_tokens=list(range(len(tokenizer), model.config.vocab_size)) or None,
    )
    stock = generated[0, len(first.token_ids) :].tolist()
    assert found[11] == tuple(stock[: len(found[11])])


def test_the_same_seed_gives_the_same_whatever_the_order(parts: tuple[Any, Any]) -> None:
    chosen = prompts(BATCH_DOCUMENTS + 5)
    found = continuations(*parts, chosen, 0.9)
    assert continuations(*parts, chosen[::-1], 0.9) == found[::-1]
    assert continuations(*parts, chosen[4:5], 0.9) == found[4:5]
    others = continuations(*parts, [replace(prompt, seed=prompt.seed + 1000) for prompt in chosen], 0.9)
    assert sum(a != b for a, b in zip(found, others, strict=True)) > len(chosen) / 2


def test_tokens_are_drawn_from_the_models_own_distribution(tiny_llama: Path) -> None:
    """Chi-square over the likely tokens, at a level of one in a million."""
    model, tokenizer = load_stock_model(tiny_llama), load_tokenizer(tiny_llama)
    prompt, draws, temperature = prompts(8)[7], 3000, 1.5
    found = continuations(
        model,
        tokenizer,
        [replace(prompt, max_new_tokens=1, seed=seed) for seed in range(draws)],
        temperature,
    )
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1, : len(tokenizer)].double()
    expected = draws * torch.softmax(logits / temperature, dim=-1)
    counted = torch.zeros_like(expected)
    for ids in found:
        if ids:
            counted[ids[0]] += 1
    expected[list(STOPS)] = 0
    likely = expected >= 8
    assert int(likely.sum()) >= 10
    chi_square = float(((counted - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum())
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_special_tokens_and_rows_without_a_token_never_appear(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    found = continuations(model, tokenizer, prompts(64), 2.0)
    tokens = {token for ids in found for token in ids}
    assert max(tokens) < len(tokenizer)
    assert not tokens & STOPS
    assert any(len(ids) < prompt.max_new_tokens for ids, prompt in zip(found, prompts(64), strict=True)), (
        "no continuation met its end, so the test shows nothing"
    )
    assert all(len(ids) <= prompt.max_new_tokens for ids, prompt in zip(found, prompts(64), strict=True))


def test_settings_that_come_with_the_model_do_not_count(tiny_llama: Path) -> None:
    model, tokenizer = load_stock_model(tiny_llama), load_tokenizer(tiny_llama)
    plain = continuations(model, tokenizer, prompts(4), 0.0)
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.max_length = 5
    assert continuations(model, tokenizer, prompts(4), 0.0) == plain


def test_weights_that_are_not_finite_are_refused(tiny_llama: Path) -> None:
    model, tokenizer = load_stock_model(tiny_llama), load_tokenizer(tiny_llama)
    model.get_input_embeddings().weight.data[7] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        continuations(model, tokenizer, prompts(2), 0.8)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded by transformers"):
        load_stock_model(tmp_path)
