"""A GGUF file becomes a folder that stock transformers loads and that computes what the source computes."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_tiny import TEXT, byte_level_parts, sentencepiece_parts, tiny_model, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cusprun.checkpoint.gguf_import import import_gguf
from cusprun.checkpoint.index import open_checkpoint

PARTS = byte_level_parts()
SIZE = len(PARTS["tokens"])


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def load_silently(folder: Path, **options: Any) -> tuple[Any, Any]:
    """Load model and tokenizer with stock transformers; any warning or log line fails the test."""
    records = _Records()
    logger = logging.getLogger("transformers")
    logger.addHandler(records)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    finally:
        logger.removeHandler(records)
    assert records.texts == []
    assert not any(info.values()), info
    return model.eval(), tokenizer


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def llama_logits(path: Path, ids: list[int]) -> torch.Tensor:
    """Compute the logits with llama.cpp, keys and values kept as float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0
    )
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)].copy())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_weights_and_logits(tmp_path: Path, family: str, tied: bool, kind: str) -> None:
    model = tiny_model(family, tied, SIZE)
    path = write_gguf(tmp_path / "m.gguf", model, PARTS, kind=kind)
    folder = import_gguf(path, tmp_path / "out", dtype="float32")
    loaded, _ = load_silently(folder)
    assert loaded.config.tie_word_embeddings is tied
    assert loaded.config.head_dim == (32 if family == "gemma3_text" else 16)
    source, found = model.state_dict(), loaded.state_dict()
    assert source.keys() == found.keys()
    # Half a step of each type and the rounding of its scale, as a share of the largest value of 32.
    share = {"F32": 0.0, "F16": 2**-11, "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8}[kind]
    for name, tensor in source.items():
        error = (tensor - found[name]).abs()
        if tensor.ndim == 1:
            # One is added to a norm of Gemma and taken off again.
            assert error.max() <= (2**-23 if family == "gemma3_text" else 0), name
        else:
            blocks = tensor.reshape(-1, 32).abs().amax(-1, keepdim=True)
            assert (error.reshape(-1, 32) <= share * blocks + 1e-7).all(), name
    ids = list(range(5, 69))
    if kind == "F32":
        exact = family != "gemma3_text"
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0 if exact else 1e-4)
    if kind in ("F32", "F16"):  # quantised matrices meet rounded activations in llama.cpp
        # llama.cpp reads Gemma's gelu from a table of float16.
        bound = 2e-2 if kind == "F16" else 5e-3 if family == "gemma3_text" else 1e-3
        assert (llama_logits(path, ids) - logits(loaded, ids)).abs().max() < bound


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float16"), ("Q5_1", "float16")],
)
def test_automatic_type(tmp_path: Path, kind: str, dtype: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", True, SIZE), PARTS, kind=kind)
    folder = import_gguf(path, tmp_path / "out")
    loaded, _ = load_silently(folder)
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert open_checkpoint(folder).shape.hidden_size == 64


@pytest.mark.parametrize("pattern", [None, 2, [True, False, False, True, True, False], "no window"])
def test_sliding_blocks_and_both_rotary_tables_of_gemma3(tmp_path: Path, pattern: Any) -> None:
    """64 tokens against a window of 16: which block slides, and by which table it rotates, shows."""
    known = {"None": [True] * 5 + [False], "2": [True, False] * 3, "no window": [False] * 6}
    slides = known.get(str(pattern), pattern)
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    model = tiny_model("gemma3_text", True, SIZE, layer_types=kinds)
    metadata: dict[str, Any] = {}
    if pattern == "no window":
        metadata["gemma3.attention.sliding_window"] = 0
    elif pattern is not None:
        metadata["gemma3.attention.sliding_window_pattern"] = pattern
    path = write_gguf(tmp_path / "m.gguf", model, PARTS, metadata=metadata)
    loaded, _ = load_silently(import_gguf(path, tmp_path / "out"))
    assert loaded.config.layer_types == kinds
    assert loaded.config.rope_parameters == model.config.rope_parameters
    ids = list(range(5, 69))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=1e-4)
    if pattern in (None, "no window"):  # other patterns are newer than some releases of llama.cpp
        assert (llama_logits(path, ids) - logits(loaded, ids)).abs().max() < 5e-3


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_partly_rotated_heads_of_phi3(tmp_path: Path, share: float) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    model = tiny_model("phi3", False, SIZE, rope_parameters=rope)
    path = write_gguf(tmp_path / "m.gguf", model, PARTS)
    loaded, _ = load_silently(import_gguf(path, tmp_path / "out"))
    assert loaded.config.rope_parameters["partial_rotary_factor"] == share
    ids = list(range(5, 69))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
    assert (llama_logits(path, ids) - logits(loaded, ids)).abs().max() < 1e-3


def test_a_head_count_that_stock_llama_refuses_makes_a_mistral(tmp_path: Path) -> None:
    """Both are llama's graph in llama.cpp, and six heads do not divide a hidden size of 64."""
    model = tiny_model("mistral", False, SIZE, num_attention_heads=6, head_dim=12, sliding_window=None)
    sizes = {f"llama.{name}": 12 for name in ("attention.key_length", "attention.value_length")}
    path = write_gguf(tmp_path / "m.gguf", model, PARTS, metadata={**sizes, "llama.rope.dimension_count": 12})
    loaded, _ = load_silently(import_gguf(path, tmp_path / "out"))
    assert (loaded.config.model_type, loaded.config.sliding_window) == ("mistral", None)
    ids = list(range(5, 69))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
    assert (llama_logits(path, ids) - logits(loaded, ids)).abs().max() < 1e-3


def test_a_quantised_gemma3_becomes_bfloat16(tmp_path: Path) -> None:
    """Its hidden states pass the range of float16, so stock code must not compute in that."""
    path = write_gguf(tmp_path / "m.gguf", tiny_model("gemma3_text", True, SIZE), PARTS, kind="Q8_0")
    loaded, _ = load_silently(import_gguf(path, tmp_path / "out"))
    assert loaded.dtype == torch.bfloat16


def test_biases_of_a_llama(tmp_path: Path) -> None:
    model = tiny_model("llama", False, SIZE, attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    path = write_gguf(tmp_path / "m.gguf", model, PARTS)
    reader = gguf.GGUFReader(path)
    assert any(tensor.name == "blk.1.attn_k.bias" for tensor in reader.tensors)
    loaded, _ = load_silently(import_gguf(path, tmp_path / "out"))
    ids = list(range(5, 69))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert (llama_logits(path, ids) - logits(loaded, ids)).abs().max() < 1e-3


def test_missing_output_bias_is_zero(tmp_path: Path) -> None:
    model = tiny_model("qwen2", False, SIZE)  # biases on Q, K and V, none on O
    twin = tiny_model("llama", False, SIZE, attention_bias=True)
    for layer in twin.model.layers:
        layer.self_attn.o_proj.bias = None
    twin.load_state_dict(model.state_dict())
    path = write_gguf(tmp_path / "m.gguf", twin, PARTS)
    loaded, _ = load_silently(import_gguf(path, tmp_path / "out"))
    assert loaded.config.attention_bias is True
    ids = list(range(5, 69))
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=1e-5)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"factor": 32.0},
        {"original_max_position_embeddings": 4096, "low_freq_factor": 1.5, "factor": 4.0},
        {"original_max_position_embeddings": 64, "low_freq_factor": 1.0, "factor": 4.0},
    ],
)
def test_llama3_rotary_factors(tmp_path: Path, changed: dict[str, Any]) -> None:
    """The divisors are taken from transformers' own frequencies; the imported config must give them again."""
    rope = LLAMA3 | changed
    context = 131072 if rope["original_max_position_embeddings"] > 256 else 256
    model = tiny_model(
        "llama", True, SIZE, rope_parameters=rope, head_dim=64, max_position_embeddings=context
    )
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    factors = (plain / scaled.double().numpy()).astype(np.float32)
    path = write_gguf(
        tmp_path / "m.gguf", model, PARTS, extra={"rope_freqs.weight": factors},
        metadata={"llama.attention.key_length": 64, "llama.attention.value_length": 64,
                  "llama.rope.dimension_count": 64},
    )  # fmt: skip
    loaded, _ = load_silently(import_gguf(path, tmp_path / "out"))
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](loaded.config, torch.device("cpu"))
    torch.testing.assert_close(found, scaled, rtol=1e-3, atol=0)
    if not changed:
        assert loaded.config.rope_parameters == rope
    ids = list(range(5, 69))
    assert (llama_logits(path, ids) - logits(loaded, ids)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotary_scaling(tmp_path: Path, kind: str) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny_model("llama", True, SIZE), PARTS,
        metadata={"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0,
                  "llama.rope.scaling.original_context_length": 64},
    )  # fmt: skip
    loaded, _ = load_silently(import_gguf(path, tmp_path / "out"))
    ids = [5 + n % 200 for n in range(200)]
    assert (llama_logits(path, ids) - logits(loaded, ids)).abs().max() < 1e-3


def test_sentencepiece_model_and_templates(tmp_path: Path) -> None:
    parts = sentencepiece_parts()
    path = write_gguf(
        tmp_path / "m.gguf", tiny_model("llama", False, len(parts["tokens"])), parts,
        metadata={"tokenizer.chat_template.tool_use": "tools: {{ tools }}"},
    )  # fmt: skip
    folder = import_gguf(path, tmp_path / "out")
    _, tokenizer = load_silently(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "user: Hi\n"
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools: {{ tools }}"
    for text in TEXT:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
