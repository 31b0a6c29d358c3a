"""Random models of real shapes, with a tokenizer of their own, and documents for them.

A model is written tensor by tensor into shards, so that one of any size takes the memory of its largest
tensor. ``python benchmarks/scale_model.py NAME FOLDER`` writes one of :data:`MODELS`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cusprun.checkpoint.files import write_config
from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.output import atomic_folder
from cusprun.checkpoint.safetensors_header import TensorInfo
from cusprun.checkpoint.writer import CheckpointWriter, Declared
from cusprun.corpus.sources import read_source
from cusprun.families import TensorSpec, axis_length, family_of, shape_of
from cusprun.records import Corpora, Shape, Source, TokenizedDocument

Config = Mapping[str, Any]

_COMMON: Config = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
_LLAMA: Config = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
}
LLAMA_8B: Config = {
    **_LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
"""Llama-3.1-8B: the config that it is published with, but for the ids of the two special tokens."""

QWEN_1_5B: Config = {
    **_COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
"""Qwen2.5-1.5B, likewise."""

MEDIUM: Config = {
    **_LLAMA,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""Wide enough that matrix products are most of the work."""

TINY: Config = {
    **MEDIUM,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,
}
"""Small enough that a run takes seconds, and deep enough that it is a row of steps."""

MODELS: Mapping[str, Config] = {
    "llama-3.1-8b": LLAMA_8B,
    "qwen2.5-1.5b": QWEN_1_5B,
    "medium": MEDIUM,
    "tiny": TINY,
}

_BEGIN, _END = "<|begin|>", "<|end|>"
_TOKENS = 1024
_DTYPE = "BF16"
_CHUNK_ELEMENTS = 1 << 24
"""Elements that are drawn at one time: 64 MB in float32."""


def random_model(folder: Path, config: Config, seed: int = 0) -> Path:
    """Write a model as it is before training, in bfloat16, and return its folder; one that is there stays.

    Matrices are drawn from a normal distribution with the config's ``initializer_range``, each from a seed of
    its own; norms are ones, biases zeros.
    """
    if folder.exists():
        return folder
    shape = shape_of(config, "the config")
    specs = list(_stored(config, shape))
    declared = [Declared(spec.name, _DTYPE, _lengths(spec, shape)) for spec in specs]
    with atomic_folder(folder) as partial:
        write_config(partial, config)
        _write_tokenizer(partial)
        with CheckpointWriter(partial, declared) as writer:
            for number, (spec, tensor) in enumerate(zip(specs, declared, strict=True)):
                writer.write(spec.name, _values(spec, tensor.shape, config, seed * len(specs) + number))
    return folder


def model_folder(scratch: Path, name: str, config: Config) -> Path:
    """Return where a model stands that several tables may use."""
    return scratch / "models" / f"{name}-{config['num_hidden_layers']}-blocks"


def index_of(config: Config) -> CheckpointIndex:
    """Return the index of a model that does not exist: names, types and shapes, and no files."""
    shape = shape_of(config, "the config")
    tensors = {
        spec.name: TensorInfo(spec.name, _DTYPE, _lengths(spec, shape), Path(), 0)
        for spec in _stored(config, shape)
    }
    return CheckpointIndex(Path(), config, family_of(config, "the config"), shape, tensors)


def _lengths(spec: TensorSpec, shape: Shape) -> tuple[int, ...]:
    return tuple(axis_length(axis, shape) for axis in spec.axes)


def _stored(config: Config, shape: Shape) -> Iterator[TensorSpec]:
    """Yield the tensors of a checkpoint; of the optional ones, the head that is not tied."""
    for spec in family_of(config, "the config").specs(shape.num_hidden_layers):
        is_head = spec.name == "lm_head.weight" and not shape.tie_word_embeddings
        if is_head or not spec.optional:
            yield spec


def _values(spec: TensorSpec, shape: tuple[int, ...], config: Config, seed: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.full(shape, float(spec.is_norm), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(shape, dtype=torch.bfloat16)
    # Drawn in float32: bfloat16 has too few digits for the transformation that makes normal numbers.
    for chunk in values.view(-1).split(_CHUNK_ELEMENTS):
        chunk.copy_(torch.empty(chunk.shape).normal_(0, config["initializer_range"], generator=generator))
    return values


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE of the shipped English texts, which begins each text with a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS,
        special_tokens=[_BEGIN, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, tokenizer.token_to_id(_BEGIN))]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_BEGIN, eos_token=_END).save_pretrained(
        folder
    )


@cache
def _texts() -> tuple[str, ...]:
    """Return the shipped English texts, and none of the chats."""
    return tuple(
        document.text
        for pack in ("lang/en", "general/en")
        for document in read_source(Source(pack=pack), "language")
        if document.text
    )


def expert_file(folder: Path, documents: int, max_tokens: int) -> Path:
    """Write an expert whose corpus has ``documents`` for calibration and one apart; return its YAML file.

    Each is a run of shipped texts, longer than ``max_tokens`` as long as that is below some hundreds.
    """
    texts = _texts()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(documents + 1):
            run = [texts[(number + offset) % len(texts)] for offset in range(1 + max_tokens // 200)]
            stream.write(json.dumps({"text": "\n\n".join(run)}) + "\n")
    path = folder / "expert.yaml"
    # The smallest share holds out nothing but the one document that is held out of every corpus.
    path.write_text(
        "name: scale\ndomain:\n  sources: [{path: documents.jsonl}]\n"
        f"held_out: 1.0e-9\nmax_tokens: {max_tokens}\n",
        encoding="utf-8",
    )
    return path


def random_corpora(documents: int, tokens: int, seed: int = 0) -> Corpora:
    """Return calibration documents of ``tokens`` random token ids each; the first is the BOS token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, _TOKENS, (documents, tokens), generator=generator)
    ids[:, 0] = 0
    made = [TokenizedDocument("domain", f"random-{n}", tuple(row)) for n, row in enumerate(ids.tolist())]
    return Corpora(tuple(made), ())


def cut_to(config: Config, layers: int) -> Config:
    """Return a config with fewer blocks."""
    return {**config, "num_hidden_layers": layers}


def main(arguments: Sequence[str]) -> None:
    """Write the model that the command line names."""
    name, folder = arguments
    random_model(Path(folder), MODELS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
