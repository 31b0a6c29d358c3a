"""The bytes of a GGUF file of any shape in any of llama.cpp's types, known before anything is written.

llama.cpp's quantiser gives some tensors other types than the one a file is named after: more bits to the
output and to some layers, and a fallback where a row does not fill the type's blocks. The tables below say
what it does; a test holds them against the quantiser itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf
from gguf import GGMLQuantizationType as QuantType

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.safetensors_header import TensorInfo
from cusprun.errors import ExportError, require_known
from cusprun.families import axis_length
from cusprun.records import Shape
from exporters.gguf import refuse_unsupported
from exporters.gguf_rope import Rope, rope_of
from exporters.gguf_tensors import QUANTS, PlannedTensor, plan_tensors
from exporters.gguf_vocab import GgufVocab, read_vocab

_BASES = {
    **{name: kind for name, (kind, _) in QUANTS.items()},
    "q4_0": QuantType.Q4_0,
    "q4_1": QuantType.Q4_1,
    "q5_0": QuantType.Q5_0,
    "q5_1": QuantType.Q5_1,
    "iq4_nl": QuantType.IQ4_NL,
    "iq4_xs": QuantType.IQ4_XS,
    "q2_k": QuantType.Q2_K,
    "q3_k_s": QuantType.Q3_K,
    "q3_k_m": QuantType.Q3_K,
    "q3_k_l": QuantType.Q3_K,
    "q4_k_s": QuantType.Q4_K,
    "q4_k_m": QuantType.Q4_K,
    "q5_k_s": QuantType.Q5_K,
    "q5_k_m": QuantType.Q5_K,
    "q6_k": QuantType.Q6_K,
}
_FALLBACKS = {
    QuantType.Q2_K: QuantType.Q4_0,
    QuantType.Q3_K: QuantType.Q4_0,
    QuantType.IQ4_XS: QuantType.IQ4_NL,
    QuantType.Q4_K: QuantType.Q5_0,
    QuantType.Q5_K: QuantType.Q5_1,
    QuantType.Q6_K: QuantType.Q8_0,
}
"""What a tensor gets whose rows do not fill the type's blocks of 256; f16 where they do not fill 32."""

_UNQUANTISED = frozenset({QuantType.F32, QuantType.F16, QuantType.BF16})
_KEY_VALUE_BYTES = 2048  # widths, rope, names, provenance: about forty short pairs
_TENSOR_INFO_BYTES = 64  # name, dimensions, type and offset
_STRING_BYTES = 8  # the length before each string


def gguf_size(index: CheckpointIndex, quant: str) -> Callable[[Shape], int]:
    """Return a function from the shape that a model is cut to, to the bytes of its GGUF file in a type.

    Reads the tokenizer's files once, and no weights.

    Raises:
        ExportError: the type is unknown, the family cannot be exported, or the tokenizer is missing or has
            no form in GGUF.
    """
    require_known(quant, _BASES, "GGUF type", ExportError)
    where = str(index.folder / "config.json")
    refuse_unsupported(index, where)
    vocab = read_vocab(index.folder, index.shape.vocab_size, index.config)
    rope = rope_of(index.config, index.shape, where)
    return lambda shape: _file_bytes(index, shape, quant, rope, vocab)


def _file_bytes(index: CheckpointIndex, shape: Shape, quant: str, rope: Rope, vocab: GgufVocab) -> int:
    tensors = plan_tensors(_cut(index, shape), "f16", rope)
    data = sum(_padded(replace(tensor, type=_type_of(tensor, shape, quant)).num_bytes) for tensor in tensors)
    return data + _TENSOR_INFO_BYTES * len(tensors) + _vocab_bytes(vocab) + _KEY_VALUE_BYTES


def _cut(index: CheckpointIndex, shape: Shape) -> CheckpointIndex:
    """Return the index that a model cut to ``shape`` would have."""
    present = {spec.name for spec in index.family.layer_specs(0) if spec.name in index.tensors}
    first = index.family.layer_prefix(0)
    tensors: dict[str, TensorInfo] = {}
    for layer in (None, *range(shape.num_hidden_layers)):
        specs = index.family.specs(0) if layer is None else index.family.layer_specs(layer)
        for spec in specs:
            own = "" if layer is None else index.family.layer_prefix(layer)
            source = spec.name if layer is None else f"{first}{spec.name.removeprefix(own)}"
            if source in present or (layer is None and source in index.tensors):
                lengths = tuple(axis_length(axis, shape) for axis in spec.axes)
                tensors[spec.name] = replace(index.tensors[source], shape=lengths)
    config: Mapping[str, Any] = {**index.config, "num_hidden_layers": shape.num_hidden_layers}
    return replace(index, config=config, shape=shape, tensors=tensors)


def _vocab_bytes(vocab: GgufVocab) -> int:
    """Return the bytes of the tokenizer: texts with their lengths, and 4 for each type and each score."""
    texts = (*vocab.tokens, *vocab.merges, *vocab.chat_templates.values())
    strings = sum(_STRING_BYTES + len(text.encode("utf-8", "replace")) for text in texts)
    return strings + 4 * len(vocab.token_types) + 4 * len(vocab.scores) + len(vocab.precompiled_charsmap)


def _padded(num_bytes: int) -> int:
    alignment = int(gguf.GGUF_DEFAULT_ALIGNMENT)
    return -(-num_bytes // alignment) * alignment


def _type_of(tensor: PlannedTensor, shape: Shape, quant: str) -> QuantType:
    """Return the type that llama.cpp's quantiser gives a tensor in a file named after ``quant``."""
    base = _BASES[quant]
    if len(tensor.shape) < 2:
        return QuantType.F32
    parts = tensor.name.split(".")
    layer = int(parts[1]) if parts[0] == "blk" else -1
    part = parts[-2]
    row = tensor.shape[-1]
    wanted = base
    if base in _UNQUANTISED:
        return base
    if part == "output" or (part == "token_embd" and shape.tie_word_embeddings):
        if row % _block(base):
            wanted = QuantType.Q8_0
        elif base is not QuantType.Q8_0:
            wanted = QuantType.Q6_K
    else:
        rule = _RULES.get(quant, {}).get(part)
        wanted = rule(layer, shape) or base if rule else base
    if row % _block(wanted):
        wanted = _FALLBACKS.get(wanted, wanted)
    return QuantType.F16 if row % _block(wanted) else wanted


def _block(kind: QuantType) -> int:
    return int(gguf.GGML_QUANT_SIZES[kind][0])


_Rule = Callable[[int, Shape], "QuantType | None"]


def _always(kind: QuantType) -> _Rule:
    return lambda _layer, _shape: kind


def _early(kind: QuantType, share: int, then: QuantType | None = None) -> _Rule:
    """Give ``kind`` to the first of ``share`` parts of the layers."""
    return lambda layer, shape: kind if layer < shape.num_hidden_layers // share else then


def _first(kind: QuantType, count: int, then: QuantType | None = None) -> _Rule:
    """Give ``kind`` to the first ``count`` layers."""
    return lambda layer, _shape: kind if layer < count else then


def _spread(kind: QuantType) -> _Rule:
    """Give ``kind`` to the first and last eighth of the layers and to every third between."""

    def rule(layer: int, shape: Shape) -> QuantType | None:
        eighth = shape.num_hidden_layers // 8
        chosen = layer < eighth or layer >= 7 * shape.num_hidden_layers // 8 or (layer - eighth) % 3 == 2
        return kind if chosen else None

    return rule


def _grouped(kind: QuantType, other: QuantType | None = None) -> _Rule:
    """Give ``kind`` where four or more query heads share a KV head."""
    return lambda _layer, shape: kind if shape.queries_per_group >= 4 else other


_RULES: Mapping[str, Mapping[str, _Rule]] = {
    "q2_k": {
        "attn_v": _grouped(QuantType.Q4_K, QuantType.Q3_K),
        "ffn_down": _always(QuantType.Q3_K),
        "attn_output": _always(QuantType.Q3_K),
    },
    "q3_k_m": {
        "attn_v": _first(QuantType.Q5_K, 2, QuantType.Q4_K),
        "ffn_down": _early(QuantType.Q5_K, 16, QuantType.Q4_K),
        "attn_output": _always(QuantType.Q4_K),
        "attn_qkv": _always(QuantType.Q4_K),
    },
    "q3_k_l": {
        "attn_v": _always(QuantType.Q5_K),
        "ffn_down": _always(QuantType.Q5_K),
        "attn_output": _always(QuantType.Q5_K),
        "attn_qkv": _always(QuantType.Q4_K),
    },
    "q4_k_s": {"attn_v": _first(QuantType.Q5_K, 4), "ffn_down": _early(QuantType.Q5_K, 8)},
    "q4_k_m": {
        "attn_v": _spread(QuantType.Q6_K),
        "ffn_down": _spread(QuantType.Q6_K),
        "attn_qkv": _always(QuantType.Q5_K),
    },
    "q5_k_m": {
        "attn_v": _spread(QuantType.Q6_K),
        "ffn_down": _spread(QuantType.Q6_K),
        "attn_qkv": _always(QuantType.Q6_K),
    },
    "iq4_nl": {"attn_v": _grouped(QuantType.Q5_K), "ffn_down": _early(QuantType.Q5_K, 8)},
    "iq4_xs": {"attn_v": _grouped(QuantType.Q5_K), "ffn_down": _early(QuantType.Q5_K, 8)},
}
"""The tensors that a type gives other bits, by GGUF's name of the part; without an importance matrix."""
