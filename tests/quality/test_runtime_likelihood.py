"""Likelihoods in a runtime: against plain arithmetic, and a GGUF file in llama.cpp against transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from cusprun.errors import CorpusError, MeasurementError
from cusprun.quality.likelihood import perplexity
from cusprun.quality.runtime_likelihood import runtime_likelihoods
from cusprun.records import TokenizedDocument
from serve.runtimes.protocol import TopLogProbs

VOCAB = 11


def document(*token_ids: int) -> TokenizedDocument:
    return TokenizedDocument("task", str(token_ids), token_ids)


@dataclass
class Table:
    """A runtime whose logits stand in a table: a row for each token before."""

    table: np.ndarray
    name: str = "table 1"
    max_tokens: int | None = None

    def logits(self, token_ids):
        return self.table[list(token_ids)]


class Server:
    """The same as a server that tells log-probabilities alone."""

    name, max_tokens = "server 1", None

    def __init__(self, table: np.ndarray) -> None:
        self._table = table

    def top_log_probs(self, token_ids):
        following = [math.log(softmax(self._table[before])[after]) for before, after in pairwise(token_ids)]
        nothing = np.zeros((len(token_ids), 1))
        return TopLogProbs(nothing.astype(np.int64), nothing.astype(np.float32), np.float32(following))


def softmax(row: np.ndarray) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32)


def test_a_likelihood_is_the_sum_over_every_token_but_the_first(table) -> None:
    generator = np.random.default_rng(1)
    documents = [document(*generator.integers(0, VOCAB, count).tolist()) for count in (2, 64, 65, 66, 200)]
    found = runtime_likelihoods(Table(table), documents)
    served = runtime_likelihoods(Server(table), documents)
    for row, other, item in zip(found, served, documents, strict=True):
        ids = item.token_ids
        wanted = -sum(math.log(softmax(table[before])[after]) for before, after in pairwise(ids))
        assert row.num_predicted_tokens == other.num_predicted_tokens == len(ids) - 1
        assert row.negative_log_likelihood == pytest.approx(wanted, rel=1e-6)
        assert other.negative_log_likelihood == pytest.approx(wanted, rel=1e-6)


def test_what_cannot_be_measured_is_said(table) -> None:
    with pytest.raises(CorpusError, match="no documents"):
        runtime_likelihoods(Table(table), [])
    with pytest.raises(MeasurementError, match="3 tokens and table 1 takes 2"):
        runtime_likelihoods(Table(table, max_tokens=2), [document(1, 2), document(1, 2, 3)])
    table[3, 4] = np.nan
    with pytest.raises(MeasurementError, match="not finite"):
        runtime_likelihoods(Table(table), [document(1, 2), document(3, 4, 5)])


def test_a_gguf_file_in_llama_cpp_is_as_likely_as_transformers_says(tiny_llama, tmp_path) -> None:
    pytest.importorskip("llama_cpp")
    from transformers import AutoModelForCausalLM

    from exporters.gguf import export
    from serve.runtimes.llamacpp import LlamaCppRuntime

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(2)
    documents = [
        document(*torch.randint(0, 300, (count,), generator=generator).tolist()) for count in (2, 40, 300)
    ]
    wanted = []
    for item in documents:
        ids = torch.tensor([item.token_ids])
        with torch.inference_mode():
            wanted.append(float(model(input_ids=ids, labels=ids).loss) * (len(item.token_ids) - 1))
    found = {}
    for quant, cache in (("f32", "f32"), ("q8_0", "f16")):
        path = export(tiny_llama, tmp_path / f"{quant}.gguf", quant=quant)
        runtime = LlamaCppRuntime(path, n_threads=1, kv_cache=cache)
        try:
            found[quant] = runtime_likelihoods(runtime, documents)
        finally:
            runtime.close()
    for row, nats in zip(found["f32"], wanted, strict=True):
        assert row.negative_log_likelihood == pytest.approx(nats, rel=2e-5)
    exact = math.exp(sum(wanted) / sum(len(item.token_ids) - 1 for item in documents))
    assert perplexity(found["f32"]) == pytest.approx(exact, rel=2e-5)
    assert perplexity(found["q8_0"]) == pytest.approx(exact, rel=0.03)
    assert found["q8_0"] != found["f32"]
