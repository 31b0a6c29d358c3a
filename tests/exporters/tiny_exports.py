"""Tiny models and tokenizers as Hugging Face folders, and what tests do with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and it doesn't look back.",
    "Question: 48 clips were sold in April and 24 in May. How many in all?\nAnswer: 72.",
    "Größe und Übermut: naïve façade, 12345 times.",
    "def add(a, b):\n    return a + b\n",
)
SPECIALS = ("<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def digits_then_words() -> Any:
    """Single digits, then the GPT-2 pattern."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def split_then_bytes(pattern: str) -> Any:
    """A pattern whose matches are words, then bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level_tokenizer(
    *,
    bos: bool = True,
    pre: Any = None,
    nfc: bool = False,
    ignore_merges: bool = False,
    template: str = TEMPLATE,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of about 400 tokens; with ``bos`` it puts ``<|begin|>`` before texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre or digits_then_words()
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    return fast


def sentencepiece_tokenizer(*, prepend: bool = True) -> PreTrainedTokenizerFast:
    """A BPE over ``▁`` with byte fallback, as SentencePiece makes them, with ``<s>`` before texts."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        SENTENCES * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    plain = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in plain["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=plain["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram model over ``▁`` without byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@dataclass(frozen=True)
class TinyConfig:
    """A config to build; ``config`` adds to or replaces the small common one."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    padded_vocab: int = 0


def make_folder(folder: Path, tiny: TinyConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a seeded random model in float32; weights are large enough for logits that are far apart."""
    tokenizer = tokenizer or byte_level_tokenizer(**tiny.tokenizer)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + tiny.padded_vocab,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        **tiny.config,
    }
    config = AutoConfig.for_model(tiny.model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change keys of ``config.json``; ``None`` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")


def documents(vocab_size: int, count: int = 24, length: int = 100) -> list[list[int]]:
    """Random token ids, seeded: enough tokens that one near tie is far below half a percent."""
    generator = torch.Generator().manual_seed(1)
    ids: list[list[int]] = torch.randint(0, vocab_size, (count, length), generator=generator).tolist()
    return ids
