"""Tiny GGUF files, written from a tiny stock model with an independent copy of the format's rules."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers import pre_tokenizers as pre
from transformers import AutoConfig, AutoModelForCausalLM

TEXT = [
    "The quick brown fox jumps over the lazy dog, 12 times in 345 days.",
    "def add(a, b):\n    return a + b  # it's simple, isn't it?\n\n\nprint(add(1, 2))",
    "Ein schöner Tag in München; grüße aus Köln! Straßenbahn Nr. 7.",
    "Привет, мир! Как дела? 中文字符和日本語のテキスト。 한국어 문장도 있습니다. العربية हिन्दी",
    "   leading spaces and   runs    of     spaces\t\ttabs\r\nnew lines\n\n",
    "🙂👩‍👩‍👧 emoji, “quotes”, em—dash … and ½ ² Ⅷ ٣٤",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BLOCKS = [
    (0x00, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF),
    (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x206F), (0x2070, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xFE00, 0xFFFD), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF),
]  # fmt: skip
ATOMS = [
    *SPECIAL, "<|im_start", "im_end|>", "'s", "'S", "'Ll", "'ſ", "’s", " ", "  ", "   ", "\n", "\r\n", "\t",
    "\v", "\u00a0", "\u2003", "\u3000", "\u0085", "\u2028", "\ufeff", "\u200b", "\u200d", "0", "12",
    "1234567", "٣٤", "½", "²", "Ⅷ", "The", "hello", "World", "don't", "x=1;", "def f():\n    return",
    '{"a": [1, 2]}', "/", "//\n", "...", "—", "é", "e\u0301", "中文", "日本語", "한국어", "русский", "हिन्दी",
    "ไทย", "🙂", "👩\u200d👩\u200d👧", "🇩🇪", "\x00", "\x07", "\x1b[0m", "\x7f", "<0x0A>", "▁", "Ġ", "Ċ",
]  # fmt: skip
ROPE_ORDER_SUFFIXES = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
"""What llama.cpp calls the graph of a family, where that is not the family's own name."""

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "phi3": {"pad_token_id": None},
    "gemma3_text": {
        "head_dim": 32, "query_pre_attn_scalar": 32, "num_key_value_heads": 1, "num_hidden_layers": 6,
        "sliding_window": 16, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}  # fmt: skip
"""What the tiny models of some families have besides the common sizes."""


def strings(count: int, seed: int = 0) -> list[str]:
    """Return seeded strings of words, scripts, spaces, control characters and look-alikes of tokens."""
    source = random.Random(seed)
    found = list(TEXT)
    while len(found) < count:
        text = ""
        for _ in range(source.choice((1, 2, 4, 8, 20))):
            if source.random() < 0.6:
                text += source.choice(ATOMS) * source.choice((1, 1, 1, 2, 5))
            else:
                text += "".join(
                    chr(source.randint(*source.choice(BLOCKS))) for _ in range(source.randint(1, 5))
                )
        found.append(text)
    return found


def gguf_name(name: str, family: str) -> str:
    """Return the GGUF name of a Hugging Face tensor."""
    names = LAYER_NAMES | (GEMMA_NORMS if family == "gemma3_text" else {})
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{names[module]}.{kind}"


def pair_rows(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of each head as adjacent pairs (i, i + half), one row at a time."""
    size = matrix.shape[0] // heads
    rows = []
    for head in range(heads):
        for i in range(size // 2):
            rows += [matrix[head * size + i], matrix[head * size + size // 2 + i]]
    return np.stack(rows)


def tiny_model(family: str, tied: bool, vocab_size: int, **config: Any) -> Any:
    """Return a seeded model of few blocks; every parameter random, also the norms and biases."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": tied,
    }  # fmt: skip
    made = AutoConfig.for_model(family, **(sizes | OF_FAMILY.get(family, {}) | config))
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and family != "gemma3_text" else 0.0
            parameter.copy_(centre + 0.15 * torch.randn(parameter.shape))
    return model


def byte_level_parts(size: int = 400) -> dict[str, Any]:
    """Return tokens, types and merges of a small byte-level vocabulary whose merges ignore word borders."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    return {"tokens": tokens, "types": [3 if token in SPECIAL else 1 for token in tokens], "merges": merges}


def sentencepiece_parts(size: int = 500) -> dict[str, Any]:
    """Return tokens, types and scores of a small SentencePiece-like vocabulary with byte fallback."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    tokenizer.train_from_iterator(["▁" + text.replace(" ", "▁") for text in TEXT[:3]], trainer)
    vocabulary = tokenizer.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.get)
    long = [piece for piece in pieces if len(piece) > 1]
    single = [piece for piece in pieces if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *long, *single]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(long) + len(single))]
    scores = [0.0] * 259 + [-float(n) for n in range(len(long) + len(single))]
    return {"tokens": tokens, "types": types, "scores": scores}


def add_tokenizer(writer: Any, parts: dict[str, Any], pre_name: str, **flags: bool) -> None:
    """Write a vocabulary; flags are add_bos, add_eos and add_space_prefix."""
    writer.add_tokenizer_model("gpt2" if "merges" in parts else "llama")
    writer.add_tokenizer_pre(pre_name)
    writer.add_token_list(parts["tokens"])
    writer.add_token_types(parts["types"])
    if "merges" in parts:
        writer.add_token_merges(parts["merges"])
    else:
        writer.add_token_scores(parts["scores"])
    writer.add_bos_token_id(parts["tokens"].index("<s>"))
    writer.add_eos_token_id(parts["tokens"].index("</s>"))
    writer.add_unk_token_id(parts["tokens"].index("<unk>"))
    writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    for name, value in flags.items():
        {
            "add_bos": writer.add_add_bos_token,
            "add_eos": writer.add_add_eos_token,
            "add_space_prefix": writer.add_add_space_prefix,
        }[name](value)


def write_gguf(
    path: Path,
    model: Any,
    parts: dict[str, Any],
    *,
    kind: str = "F32",
    pre_name: str = "gpt-2",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    **flags: bool,
) -> Path:
    """Write a stock model as GGUF, matrices in type ``kind``; ``metadata`` adds or replaces keys by type."""
    config = model.config
    family = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, family)
    replaced = metadata or {}
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    values: dict[str, Any] = {f"{family}.{key}": value for key, value in numbers.items()}
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    values[f"{family}.rope.freq_base"] = float(rope["rope_theta"])
    if config.model_type in ("qwen3", "gemma3_text"):
        values[f"{family}.attention.key_length"] = values[f"{family}.attention.value_length"] = (
            config.head_dim
        )
    if config.model_type == "gemma3_text":
        values["gemma3.attention.sliding_window"] = config.sliding_window
    if config.model_type == "phi3":
        dimensions = config.hidden_size // config.num_attention_heads
        share = config.rope_parameters["partial_rotary_factor"]
        values["phi3.rope.dimension_count"] = int(dimensions * share)
        values["phi3.rope.scaling.original_context_length"] = config.max_position_embeddings
    values[f"{family}.attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    for key, value in (values | replaced).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    add_tokenizer(writer, parts, pre_name, **flags)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, target = tensor.float().numpy(), gguf_name(name, config.model_type)
        if config.model_type == "gemma3_text" and "norm" in name:
            array = array + 1
        if family == "llama" and target.endswith(ROPE_ORDER_SUFFIXES):
            heads = config.num_attention_heads if "attn_q" in target else config.num_key_value_heads
            array = pair_rows(array, heads)
        wanted = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(np.ascontiguousarray(array), wanted)
        writer.add_tensor(target, packed, raw_dtype=wanted)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
