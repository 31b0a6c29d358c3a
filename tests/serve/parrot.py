"""A tiny model that says a known text: each token has one successor, whatever came before.

The blocks add nothing to the residual stream, the embedding is one-hot and the output head is the table of
successors. So what a server must answer is known without running a model, in any runtime and precision.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))
from tiny_exports import byte_level_tokenizer

PROMPT = "The"
ANSWER = " quick brown fox 😀 dog."
CHAT_ANSWER = PROMPT + ANSWER
"""What follows a chat's generation prompt, which ends with a line end."""

LOOP = "z"
"""A prompt whose answer never ends: this letter again and again, and, when sampling, sometimes the rival."""

_RIVAL = "q"

CONTEXT_TOKENS = 256
_LOGIT = 8.0  # of the successor, others have 0: e^8 / (e^8 + 400) = 0.88 of the probability
_RIVAL_LOGIT = 7.5  # 0.35 of the probability, so that samplers that cut the tail off keep it


@dataclass(frozen=True)
class Parrot:
    """The folder, and how many tokens the prompt (with ``<|begin|>``) and the answer have."""

    folder: Path
    num_prompt_tokens: int
    num_answer_tokens: int


def make_parrot(folder: Path) -> Parrot:
    """Write the model; its tokenizer is a byte-level BPE with ``<|begin|>`` before texts."""
    tokenizer = byte_level_tokenizer()
    prompt = tokenizer(PROMPT)["input_ids"]
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    chain = [newline, prompt[-1], *answer, tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain), "a token that comes twice has two successors"
    loop, rival = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (LOOP, _RIVAL))
    vocab_size = len(tokenizer)
    successor = torch.full((vocab_size,), loop)
    for before, after in pairwise(chain):
        successor[before] = after
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=-(-vocab_size // 64) * 64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_().fill_diagonal_(1)
        head = model.lm_head.weight.zero_()
        # The norm makes a one-hot vector's one sqrt(hidden_size).
        head[successor, torch.arange(vocab_size)] = _LOGIT / config.hidden_size**0.5
        head[rival, loop] = _RIVAL_LOGIT / config.hidden_size**0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Parrot(folder, len(prompt), len(answer))
