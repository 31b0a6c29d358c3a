"""A tiny llama GGUF, written with the gguf library alone, and a hand-made measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from serve.bench.measurement import Measurement, Memory, Timing


def _write_tiny_gguf(path: Path, intermediate_size: int = 64) -> int:
    """Write a random two-block llama with a byte tokenizer; return its number of parameters."""
    hidden, heads, kv_heads, head_dim, blocks = 32, 4, 2, 8, 2
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256)), b"\xe2\x96\x81"]
    types = [
        gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL,
        *[gguf.TokenType.BYTE] * 256, gguf.TokenType.NORMAL,
    ]  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), hidden),
        "output_norm.weight": (hidden,),
    }
    for i in range(blocks):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (heads * head_dim, hidden),
            f"blk.{i}.attn_k.weight": (kv_heads * head_dim, hidden),
            f"blk.{i}.attn_v.weight": (kv_heads * head_dim, hidden),
            f"blk.{i}.attn_output.weight": (hidden, heads * head_dim),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.ffn_gate.weight": (intermediate_size, hidden),
            f"blk.{i}.ffn_up.weight": (intermediate_size, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, intermediate_size),
        }
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, generator.standard_normal(shape).astype(np.float32) * 0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.fixture
def write_tiny_gguf() -> Callable[..., int]:
    """Return the writer of a tiny GGUF file."""
    return _write_tiny_gguf


@pytest.fixture
def make_measurement() -> Callable[..., Measurement]:
    """Return a maker of measurements of two points, whose decode latencies are all ``latency_ms``."""

    def make(latency_ms: float = 10.0, peak_bytes: int = 1_000_000, **changes: float) -> Measurement:
        first_s = changes.get("first_ms", 401.0) / 1000
        timings = tuple(
            Timing(length, first_s - 0.001, first_s, (latency_ms / 1000,) * 4) for length in (128, 512)
        )
        return Measurement(
            load_time_ms=changes.get("load_time_ms", 50.0),
            timings=timings,
            num_parameters=1000,
            context_length=768,
            memory=Memory(peak_bytes, peak_bytes, None, None),
            library="fake 1.0",
        )

    return make
