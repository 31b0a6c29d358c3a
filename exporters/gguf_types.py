"""The type that each tensor of a GGUF file gets, known before llama.cpp's quantiser chooses it.

The quantiser gives some tensors other types than the one a file is named after: more bits to the output and
to some layers, and a fallback where a row does not fill the type's blocks. The tables below say what it does;
a test holds them against the quantiser itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import gguf
from gguf import GGMLQuantizationType as QuantType
from gguf import LlamaFileType

from cusprun.errors import ExportError, require_known
from cusprun.records import Shape
from exporters.gguf_tensors import QUANTS, PlannedTensor

BASES = {
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
"""The type that most matrices of a file get, by the file's name for it."""

FILE_TYPES = {
    name: QUANTS[name][1] if name in QUANTS else LlamaFileType[f"MOSTLY_{name.upper()}"] for name in BASES
}
"""What a file calls itself (``general.file_type``)."""

TENSOR_TYPES = {kind.name.lower(): kind for kind in BASES.values()}
"""The types that a single tensor can be given."""

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
_LARGE_MODEL_LAYERS = 80  # llama.cpp takes these for the 70B model and spends more on its few KV heads


@dataclass(frozen=True)
class ChosenType:
    """The type a tensor gets, and the one it would get if its rows filled every type's blocks."""

    type: QuantType
    wanted: QuantType


def choose_types(
    tensors: Sequence[PlannedTensor],
    shape: Shape,
    quant: str,
    *,
    importance: bool = False,
    overrides: Mapping[str, QuantType] | None = None,
) -> dict[str, ChosenType]:
    """Return the type of every tensor of a file, by GGUF tensor name.

    ``importance`` says whether the quantiser gets an importance matrix, which changes some of its choices;
    ``overrides`` are the types that were asked for by tensor name.
    """
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    given = overrides or {}
    chosen = {}
    for tensor in tensors:
        if len(tensor.shape) < 2:
            chosen[tensor.name] = ChosenType(QuantType.F32, QuantType.F32)
            continue
        wanted = given.get(tensor.name)
        if wanted is None:
            wanted = _wanted(tensor, shape, quant, tied, importance)
        chosen[tensor.name] = ChosenType(_fitting(wanted, tensor.shape[-1]), wanted)
    return chosen


def parse_tensor_types(
    given: Sequence[str], tensors: Sequence[PlannedTensor], quant: str
) -> dict[str, QuantType]:
    """Turn ``PATTERN=TYPE`` texts into types by tensor name; the first pattern that matches a name counts.

    A pattern is a regular expression that is searched for in GGUF names (``blk.3.ffn_down.weight``).

    Raises:
        ExportError: a text or type is malformed, a pattern matches no matrix, or the file is not quantised.
    """
    if given and BASES[quant] in _UNQUANTISED:
        raise ExportError(f"types of single tensors need a quantised file, not {quant}; choose q8_0 or less")
    names = [tensor.name for tensor in tensors if len(tensor.shape) > 1]
    types: dict[str, QuantType] = {}
    for text in given:
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern:
            raise ExportError(f"the tensor type {text!r} must be PATTERN=TYPE, as in ffn_down=q6_k")
        require_known(kind, TENSOR_TYPES, f"type of the tensors {pattern!r}", ExportError)
        matched = [name for name in names if _compiled(pattern).search(name)]
        if not matched:
            raise ExportError(
                f"the pattern {pattern!r} matches no matrix of the file; names are {names[0]}, "
                f"{next(iter(names[1:]), names[0])}, ..."
            )
        for name in matched:
            types.setdefault(name, TENSOR_TYPES[kind])
    return types


def substitutions(chosen: Mapping[str, ChosenType]) -> Iterator[str]:
    """Say in one sentence which types were replaced because of row lengths, if any."""
    replaced = Counter((c.wanted, c.type) for c in chosen.values() if c.wanted is not c.type)
    if not replaced:
        return
    parts = ", ".join(
        f"{got.name.lower()} instead of {wanted.name.lower()} in {count}"
        for (wanted, got), count in replaced.most_common()
    )
    yield (
        f"{sum(replaced.values())} matrices get another type, since their rows do not fill its "
        f"blocks of 256 or 32 values: {parts}"
    )


def bits_per_weight(tensors: Sequence[PlannedTensor], chosen: Mapping[str, ChosenType]) -> float:
    """Return the bits of tensor data over the number of weights, vectors included."""
    sized = [replace(tensor, type=chosen[tensor.name].type) for tensor in tensors]
    return 8 * sum(tensor.num_bytes for tensor in sized) / sum(tensor.num_elements for tensor in sized)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ExportError(f"the pattern {pattern!r} is no regular expression ({error}); mend it") from None


def _wanted(tensor: PlannedTensor, shape: Shape, quant: str, tied: bool, importance: bool) -> QuantType:
    """Return the type that the quantiser wants for a matrix, before it looks at the length of its rows."""
    base = BASES[quant]
    if base in _UNQUANTISED:
        return base
    parts = tensor.name.split(".")
    layer = int(parts[1]) if parts[0] == "blk" else -1
    part = _ALIKE.get(parts[-2], parts[-2])
    if part == "output" or (part == "token_embd" and tied):
        return base if base is QuantType.Q8_0 else QuantType.Q6_K
    rules = {**_RULES.get(quant, {}), **(_IMPORTANCE_RULES.get(quant, {}) if importance else {})}
    rule = rules.get(part)
    ruled = rule(layer, shape) if rule else None
    wanted = base if ruled is None else ruled
    large = shape.num_hidden_layers == _LARGE_MODEL_LAYERS and shape.queries_per_group > 1
    return QuantType.Q5_K if large and part == "attn_v" and wanted in _RAISED_IN_LARGE else wanted


def _fitting(wanted: QuantType, row: int) -> QuantType:
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


_ALIKE = {"attn_qkv": "attn_v"}
"""Parts that are treated as another: fused Q, K and V count as V."""

_RAISED_IN_LARGE = frozenset({QuantType.Q3_K, QuantType.Q4_K})

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
    },
    "q3_k_l": {
        "attn_v": _always(QuantType.Q5_K),
        "ffn_down": _always(QuantType.Q5_K),
        "attn_output": _always(QuantType.Q5_K),
    },
    "q4_k_s": {"attn_v": _first(QuantType.Q5_K, 4), "ffn_down": _early(QuantType.Q5_K, 8)},
    "q4_k_m": {"attn_v": _spread(QuantType.Q6_K), "ffn_down": _spread(QuantType.Q6_K)},
    "q5_k_m": {"attn_v": _spread(QuantType.Q6_K), "ffn_down": _spread(QuantType.Q6_K)},
    "iq4_nl": {"attn_v": _grouped(QuantType.Q5_K), "ffn_down": _early(QuantType.Q5_K, 8)},
    "iq4_xs": {"attn_v": _grouped(QuantType.Q5_K), "ffn_down": _early(QuantType.Q5_K, 8)},
}
"""The tensors that a type gives other bits, by GGUF's name of the part; without an importance matrix."""

_IMPORTANCE_RULES: Mapping[str, Mapping[str, _Rule]] = {
    "q4_0": {"ffn_down": _early(QuantType.Q4_1, 8)},
    "q5_0": {"ffn_down": _early(QuantType.Q5_1, 8)},
    "iq4_nl": {"ffn_down": _always(QuantType.IQ4_NL)},
    "iq4_xs": {"ffn_down": _always(QuantType.IQ4_XS)},
}
"""Where an importance matrix makes the quantiser choose otherwise."""
