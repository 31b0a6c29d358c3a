"""The bytes of a GGUF file of any shape in any of llama.cpp's types, known before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import gguf

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.checkpoint.safetensors_header import TensorInfo
from cusprun.errors import ExportError, require_known
from cusprun.families import axis_length
from cusprun.records import Shape
from exporters.gguf_rope import Rope, rope_of
from exporters.gguf_support import refuse_unsupported
from exporters.gguf_tensors import plan_tensors
from exporters.gguf_types import BASES, choose_types
from exporters.gguf_vocab import GgufVocab, read_vocab

_KEY_VALUE_BYTES = 2048  # widths, rope, names, provenance: about forty short pairs
_TENSOR_INFO_BYTES = 64  # name, dimensions, type and offset
_STRING_BYTES = 8  # the length before each string


def gguf_size(
    index: CheckpointIndex, quant: str, *, importance: bool | None = None
) -> Callable[[Shape], int]:
    """Return a function from the shape that a model is cut to, to the bytes of its GGUF file in a type.

    Reads the tokenizer's files once, and no weights. ``importance`` says whether the quantiser gets an
    importance matrix, which makes some files larger and some smaller; unless given, the larger counts.

    Raises:
        ExportError: the type is unknown, the family cannot be exported, or the tokenizer is missing or has
            no form in GGUF.
    """
    require_known(quant, BASES, "GGUF type", ExportError)
    where = str(index.folder / "config.json")
    refuse_unsupported(index, where)
    vocab = read_vocab(index.folder, index.shape.vocab_size, index.config)
    rope = rope_of(index, where)
    cases = (False, True) if importance is None else (importance,)
    return lambda shape: _file_bytes(index, shape, quant, rope, vocab, cases)


def _file_bytes(
    index: CheckpointIndex,
    shape: Shape,
    quant: str,
    rope: Rope,
    vocab: GgufVocab,
    importance_cases: tuple[bool, ...],
) -> int:
    tensors = plan_tensors(_cut(index, shape), "f16", rope)

    def data(importance: bool) -> int:
        chosen = choose_types(tensors, shape, quant, importance=importance)
        return sum(_padded(replace(tensor, type=chosen[tensor.name].type).num_bytes) for tensor in tensors)

    most = max(data(case) for case in importance_cases)
    return most + _TENSOR_INFO_BYTES * len(tensors) + _vocab_bytes(vocab) + _KEY_VALUE_BYTES


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
