"""The walk against the stock model that holds everything at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, documents, save_model
from transformers import AutoModelForCausalLM

from cusprun.checkpoint.index import open_checkpoint
from cusprun.quality.likelihood import measure_likelihood, perplexity
from cusprun.walk.batches import make_batches
from cusprun.walk.shell import DecoderShell
from cusprun.walk.spill import spilled


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_at_a_time_give_the_hidden_states_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", family)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shell = DecoderShell(open_checkpoint(folder))
    texts = documents(5)
    batches = make_batches(texts, batch_tokens=64)
    with spilled(batches, 48) as start:
        shell.embed_into(start, batches)
        inputs = [start.read(position) for position in range(len(batches))]
    for batch, rows in zip(batches, inputs, strict=True):
        hidden = rows
        for layer in range(3):
            block = shell.load_block(layer)
            with shell.holding(layer, block):
                hidden = shell.run(hidden)
        for row, document in enumerate(batch.documents):
            ids = torch.tensor([texts[document].token_ids])
            with torch.no_grad():
                states = whole(ids, output_hidden_states=True).hidden_states[-1][0]
                ours = shell.load_norm()(hidden[row, : ids.shape[1]])
            torch.testing.assert_close(ours, states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_and_agreement_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder, other = save_model(tmp_path / "a", family), save_model(tmp_path / "b", family, seed=1)
    texts = documents(4)
    models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, other)]
    nll = [0.0, 0.0]
    kl, same, count = 0.0, 0, 0
    for document in texts:
        ids = torch.tensor([document.token_ids])
        with torch.no_grad():
            own, reference = (torch.log_softmax(model(ids).logits[0, :-1], -1) for model in models)
        for place, scores in enumerate((own, reference)):
            nll[place] -= float(scores[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum())
        kl += float(torch.nn.functional.kl_div(own, reference, log_target=True, reduction="sum"))
        same += int((own.argmax(-1) == reference.argmax(-1)).sum())
        count += ids.shape[1] - 1
    measured = measure_likelihood(open_checkpoint(folder), texts, open_checkpoint(other))
    assert sum(m.num_predicted_tokens for m in measured) == count
    assert perplexity(measured) == pytest.approx(torch.tensor(nll[0] / count).exp().item(), rel=1e-4)
    assert sum(m.reference_negative_log_likelihood for m in measured) == pytest.approx(nll[1], rel=1e-4)
    assert sum(m.kl_divergence for m in measured) == pytest.approx(kl, rel=1e-4)
    assert sum(m.top1_agreements for m in measured) == same


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), limit=st.integers(1, 120))
def test_batches_hold_every_document_once_and_keep_to_the_limit(lengths: list[int], limit: int) -> None:
    from cusprun.records import TokenizedDocument

    texts = [TokenizedDocument("task", str(n), tuple(range(length))) for n, length in enumerate(lengths)]
    batches = make_batches(texts, limit)
    assert sorted(d for batch in batches for d in batch.documents) == list(range(len(texts)))
    for batch in batches:
        assert batch.num_padded_tokens <= limit or len(batch.documents) == 1
        for row, document in enumerate(batch.documents):
            assert batch.token_ids[row][batch.mask[row]].tolist() == list(texts[document].token_ids)


def test_hidden_states_have_disk_behind_them() -> None:
    batches = make_batches(documents(40))
    with spilled(batches, 256) as spill:
        rows = sum(batch.num_padded_tokens for batch in batches)
        # A hole would kill the process with SIGBUS when it is filled on a full disk.
        assert os.fstat(spill._file.fileno()).st_blocks * 512 >= rows * 256 * 4
