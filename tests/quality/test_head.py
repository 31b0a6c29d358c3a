"""Likelihood, agreement and divergence gathered over pieces of the vocabulary, against all logits at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import documents, save_model

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ModelError
from cusprun.quality import head as head_module
from cusprun.quality.head import Head, Predicted, predictions
from cusprun.quality.likelihood import measure_likelihood
from cusprun.walk.shell import DecoderShell


@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 9),
    vocab=st.integers(1, 40),
    step=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
)
def test_pieces_of_any_size_give_what_all_logits_do(
    seed: int, tokens: int, vocab: int, step: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    own, theirs = (torch.randn(tokens, vocab, generator=generator) * scale for _ in range(2))
    following = torch.randint(0, vocab, (tokens,), generator=generator)
    model, reference = Predicted(following), Predicted(following)
    for start in range(0, vocab, step):
        part = own[:, start : start + step].clone()
        reference.add(theirs[:, start : start + step].clone(), start, part)
        model.add(part, start)
    logs = torch.log_softmax(own.double(), dim=1), torch.log_softmax(theirs.double(), dim=1)
    for predicted, log in zip((model, reference), logs, strict=True):
        wanted = -log[torch.arange(tokens), following]
        torch.testing.assert_close(predicted.negative_log_likelihood(), wanted, rtol=1e-5, atol=1e-5)
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(dim=1)
    torch.testing.assert_close(reference.divergence(model), kl, rtol=1e-4, atol=1e-4)
    if scale:
        assert torch.equal(model.top, own.argmax(dim=1))


@pytest.mark.parametrize("pieces", [1, 7, 96, 500])
def test_a_head_in_pieces_gives_the_logits_of_the_whole(
    pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "HEAD_PIECE_ENTRIES", pieces)
    index = open_checkpoint(save_model(tmp_path / "model", "llama-untied-biased"))
    shell = DecoderShell(index)
    hidden, following = torch.randn(5, 48), torch.tensor([3, 95, 0, 17, 17])
    with torch.inference_mode():
        (found,) = predictions([Head(shell)], [hidden], following)
    from safetensors.torch import load_file

    weight = load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"]
    logs = torch.log_softmax((shell.load_norm()(hidden) @ weight.T).double(), dim=1)
    torch.testing.assert_close(
        found.negative_log_likelihood(), -logs[torch.arange(5), following], rtol=1e-5, atol=1e-5
    )


def test_models_with_other_vocabularies_are_not_compared(tmp_path: Path) -> None:
    one = open_checkpoint(save_model(tmp_path / "one"))
    other = open_checkpoint(save_model(tmp_path / "other", vocab_size=100))
    with pytest.raises(ModelError, match=r"96 entries and .*other one of 100"):
        measure_likelihood(one, documents(2), other)
