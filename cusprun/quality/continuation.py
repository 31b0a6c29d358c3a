"""Continuations of beginnings of documents by a stock model: seeded, batched, with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cusprun.corpus.augment import Prompt
from cusprun.errors import ModelError
from cusprun.progress import SILENT, Progress
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import Batching, with_smaller_batches

BATCH_DOCUMENTS = 16
"""Documents generated at one time: 0.6 GB of KV cache for a model with 32 blocks of 8 KV heads of 128, in
16 bits, at 288 tokens each."""


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    temperature: float,
    progress: Progress = SILENT,
    *,
    device: Device = CPU,
) -> tuple[tuple[int, ...], ...]:
    """Return what the model goes on with after each prompt, cut before the first special token.

    Each token is drawn from softmax(logits / temperature) by the prompt's own seeded draws; at temperature 0
    it is the most likely one. No other setting that comes with the model (top-k, penalties) is applied.
    Prompts of like length run together, padded on the left, whatever order they are given in. The model runs
    where it is, ``device``; the drawing is the host's, where cumulative sums are the same every time.

    Raises:
        DeviceError: the device has too little memory, for fewer documents at one time too.
        ModelError: the logits are not finite.
    """
    from transformers import GenerationConfig

    stop_ids = _special_ids(model, tokenizer)
    model.generation_config = GenerationConfig()  # else the model's own settings fill in what is not set
    # The longest first shows at once whether memory suffices.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), prompts[i].seed))

    def work(batching: Batching) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        size = batching.share_of(BATCH_DOCUMENTS)
        with progress.stage(f"augmenting{batching.note}", len(prompts), "document") as advance:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                chosen = [prompts[position] for position in batch]
                rows = _continue_batch(model, chosen, temperature, stop_ids, len(tokenizer), device)
                found |= zip(batch, rows, strict=True)
                advance(len(batch))
        return found

    found = with_smaller_batches(device, work)
    return tuple(found[position] for position in range(len(prompts)))


def _special_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a text or is none: end, beginning, padding, turns of a chat."""
    special = set(tokenizer.all_special_ids)
    special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    for config in (model.config, model.generation_config):
        ends = getattr(config, "eos_token_id", None)
        special.update(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends])
    return frozenset(special)


def _continue_batch(
    model: Any,
    prompts: Sequence[Prompt],
    temperature: float,
    stop_ids: frozenset[int],
    vocab_size: int,
    device: Device,
) -> list[tuple[int, ...]]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(len(prompt.token_ids) for prompt in prompts)
    steps = max(prompt.max_new_tokens for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, width - len(prompt.token_ids) :] = 1
    draws = None if temperature == 0 else torch.stack([_draws(prompt.seed, steps) for prompt in prompts])
    ends = sorted(stop_ids)
    with torch.inference_mode():
        output = model.generate(
            input_ids=device.put(ids),
            attention_mask=device.put(mask),
            generation_config=GenerationConfig(
                max_new_tokens=steps,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            ),
            logits_processor=LogitsProcessorList([_Pick(width, vocab_size, draws, temperature)]),
        )
    rows = output[:, width:].tolist()
    return [_until(row[: prompt.max_new_tokens], stop_ids) for row, prompt in zip(rows, prompts, strict=True)]


def _draws(seed: int, steps: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1), float64 ``[steps]``."""
    return torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _until(ids: Sequence[int], stop_ids: frozenset[int]) -> tuple[int, ...]:
    stop = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return tuple(ids[:stop])


class _Pick:
    """Leaves one possible token a row, so that stock greedy decoding draws; it has no state.

    The token drawn is the first whose cumulative probability exceeds the row's uniform number of the step.
    Rows of the embedding that no token of the tokenizer has are never taken.
    """

    def __init__(
        self, prompt_width: int, vocab_size: int, draws: torch.Tensor | None, temperature: float
    ) -> None:
        self._prompt_width = prompt_width
        self._vocab_size = vocab_size
        self._draws = draws
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take ids [documents, tokens so far] and logits [documents, vocab_size]; return new logits."""
        if not torch.isfinite(scores).all():
            raise ModelError("the model's logits are not finite; check its weights")
        scores = scores.clone()
        scores[:, self._vocab_size :] = -torch.inf
        if self._draws is None:
            return scores
        own = scores.cpu().double()
        cumulative = torch.softmax(own / self._temperature, dim=-1).cumsum(dim=-1)
        step = input_ids.shape[1] - self._prompt_width
        wanted = self._draws[:, step : step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, wanted, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token.to(scores.device), 0.0)
