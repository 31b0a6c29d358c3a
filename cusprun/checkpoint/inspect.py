"""What a model is made of: parameters, bytes and shapes by part, from headers alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.checkpoint.files import TOKENIZER_FILES
from cusprun.checkpoint.gguf_header import GgufFile, read_gguf
from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ModelError
from cusprun.families import families
from cusprun.records import Shape

PARTS = ("embedding", "attention", "ffn", "norms", "output_head", "other")
"""The parts of a decoder, in the order of a report; biases belong to their projection's part."""

_PART_PATTERNS = (
    (re.compile(r"(^|\.)embed_tokens\.|^token_embd\."), "embedding"),
    (re.compile(r"^lm_head\.|^output\.(weight|bias)$"), "output_head"),
    (re.compile(r"norm"), "norms"),
    (re.compile(r"\.self_attn\.|^blk\.\d+\.attn_"), "attention"),
    (re.compile(r"\.mlp\.|^blk\.\d+\.ffn_"), "ffn"),
)
"""The first pattern found in a tensor's name, of either convention, says which part it belongs to."""

_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")
_GGUF_TOKENIZER_KEY = "tokenizer.ggml.model"
_GGUF_TEMPLATE_KEY = "tokenizer.chat_template"
_MANIFEST_NAME = "cusprun.json"


@dataclass(frozen=True)
class Part:
    """One part of a model; the shares are of the whole model's parameters and bytes, 0 to 1."""

    name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    parameter_share: float
    byte_share: float
    bits_per_weight: float
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class LayerSize:
    """One decoder block; what is in no other part counts in the sums of ``Inspection`` alone."""

    layer: int
    attention_parameters: int
    attention_bytes: int
    ffn_parameters: int
    ffn_bytes: int
    norm_parameters: int
    norm_bytes: int


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ in their block's number alone, which stands as ``*`` in ``name``.

    ``shape`` has the slowest axis first, as in torch: ``(outputs, inputs)`` for a projection.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    dtype: str
    count: int


@dataclass(frozen=True)
class Provenance:
    """Where an expert came from, out of its ``cusprun.json``; None where that does not say."""

    source: str | None
    expert: str | None
    rule: str | None
    ratio: float | None
    parameters_before: int | None
    parameters_after: int | None
    created: str | None
    cusprun_version: str | None


@dataclass(frozen=True)
class Inspection:
    """A model's make-up.

    ``format`` is ``huggingface`` or ``gguf``; ``dtypes`` counts parameters by type, in the format's own
    spelling; ``num_parameters`` counts a tied head once; ``num_bytes`` is tensor data, ``file_bytes`` the
    files that hold it. ``shape`` is None for a GGUF whose metadata states no uniform one. ``notes`` are
    sentences about what could not be shown.
    """

    path: str
    format: str
    family: str
    supported: bool
    name: str | None
    shape: Shape | None
    dtypes: Mapping[str, int]
    num_parameters: int
    num_bytes: int
    file_bytes: int
    bits_per_weight: float
    context_length: int | None
    tied: bool
    has_tokenizer: bool
    has_chat_template: bool
    parts: tuple[Part, ...]
    layers: tuple[LayerSize, ...]
    tensors: tuple[TensorGroup, ...]
    provenance: Provenance | None
    notes: tuple[str, ...] = ()
    schema_version: int = 1

    def part(self, name: str) -> Part:
        """Return the part called ``name``; raises ``KeyError`` when the model has no such part."""
        return {part.name: part for part in self.parts}[name]


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str
    num_parameters: int
    num_bytes: int

    @property
    def part(self) -> str:
        return next((part for pattern, part in _PART_PATTERNS if pattern.search(self.name)), "other")

    @property
    def layer(self) -> int | None:
        match = _LAYER_NUMBER.search(self.name)
        return int(match.group(1)) if match else None


def inspect(path: Path) -> Inspection:
    """Say what the Hugging Face folder or GGUF file at ``path`` is made of; no weight is read.

    Raises:
        ModelError: nothing is there, or it is no sound model.
        UnsupportedModelError: a Hugging Face folder of a family that is not supported, or a GGUF version or
            tensor type that cannot be read.
    """
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a Hugging Face folder or a GGUF file")
    return _inspect_folder(path) if path.is_dir() else _inspect_gguf(path)


def _inspect_folder(folder: Path) -> Inspection:
    index = open_checkpoint(folder)
    tensors = [
        _Tensor(info.name, info.shape, info.dtype, info.num_elements, info.num_bytes)
        for info in index.tensors.values()
    ]
    provenance, notes = _read_provenance(folder / _MANIFEST_NAME)
    context_length = index.config.get("max_position_embeddings")
    return Inspection(
        path=str(folder),
        format="huggingface",
        family=index.family.model_type,
        supported=True,
        name=index.config.get("_name_or_path") or None,
        shape=index.shape,
        file_bytes=sum(file.stat().st_size for file in {info.file for info in index.tensors.values()}),
        context_length=context_length if isinstance(context_length, int) else None,
        tied=index.shape.tie_word_embeddings,
        has_tokenizer=any((folder / name).is_file() for name in TOKENIZER_FILES),
        has_chat_template=_has_chat_template(folder),
        provenance=provenance,
        notes=notes,
        **_make_up(tensors),
    )


def _inspect_gguf(path: Path) -> Inspection:
    source = read_gguf(path)
    architecture = str(source.metadata.get("general.architecture", "unknown"))
    tensors = [
        _Tensor(entry.name, entry.shape, entry.type.name, entry.num_elements, entry.num_bytes)
        for entry in source.tensors.values()
    ]
    if not tensors:
        raise ModelError(f"{path} holds no tensors; give the GGUF file that holds the model")
    shape, notes = _gguf_shape(source, architecture)
    name = source.metadata.get("general.name")
    context_length = source.metadata.get(f"{architecture}.context_length")
    experts = source.metadata.get(f"{architecture}.expert_count", 0)
    if experts:
        notes = (*notes, f"a mixture of {experts} experts, which cannot be pruned")
    return Inspection(
        path=str(path),
        format="gguf",
        family=architecture,
        supported=not experts
        and architecture in {family.gguf_architecture for family in families().values()},
        name=name if isinstance(name, str) else None,
        shape=shape,
        file_bytes=path.stat().st_size,
        context_length=context_length if isinstance(context_length, int) else None,
        tied="output.weight" not in source.tensors,
        has_tokenizer=_GGUF_TOKENIZER_KEY in source.metadata,
        has_chat_template=_GGUF_TEMPLATE_KEY in source.metadata,
        provenance=None,
        notes=notes,
        **_make_up(tensors),
    )


def _gguf_shape(source: GgufFile, architecture: str) -> tuple[Shape | None, tuple[str, ...]]:
    """Read the widths from the metadata, or say why they make no uniform shape."""

    def width(key: str, default: int | None = None) -> int:
        return source.integer(f"{architecture}.{key}", default)

    try:
        heads, hidden = width("attention.head_count"), width("embedding_length")
        embedding = source.tensors.get("token_embd.weight")
        return Shape(
            num_hidden_layers=width("block_count"),
            hidden_size=hidden,
            intermediate_size=width("feed_forward_length"),
            num_attention_heads=heads,
            num_key_value_heads=width("attention.head_count_kv", heads),
            head_dim=width("attention.key_length", hidden // max(heads, 1)),
            vocab_size=embedding.shape[0] if embedding else width("vocab_size"),
            tie_word_embeddings="output.weight" not in source.tensors,
        ), ()
    except ModelError as error:
        return None, (f"the shape is not shown: {error}",)


def _make_up(tensors: list[_Tensor]) -> dict[str, Any]:
    """Return the fields of ``Inspection`` that follow from the tensors alone."""
    parameters, num_bytes = _sums(tensors)
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.num_parameters
    return {
        "num_parameters": parameters,
        "num_bytes": num_bytes,
        "bits_per_weight": _bits(num_bytes, parameters),
        "dtypes": dict(dtypes.most_common()),
        "parts": tuple(_parts(tensors, parameters, num_bytes)),
        "layers": tuple(_layers(tensors)),
        "tensors": tuple(_groups(tensors)),
    }


def _sums(tensors: Iterable[_Tensor]) -> tuple[int, int]:
    chosen = list(tensors)
    return sum(tensor.num_parameters for tensor in chosen), sum(tensor.num_bytes for tensor in chosen)


def _bits(num_bytes: int, num_parameters: int) -> float:
    return 8 * num_bytes / num_parameters if num_parameters else 0.0


def _parts(tensors: list[_Tensor], all_parameters: int, all_bytes: int) -> Iterable[Part]:
    for name in PARTS:
        chosen = [tensor for tensor in tensors if tensor.part == name]
        if chosen:
            parameters, num_bytes = _sums(chosen)
            yield Part(
                name=name,
                num_tensors=len(chosen),
                num_parameters=parameters,
                num_bytes=num_bytes,
                parameter_share=parameters / all_parameters,
                byte_share=num_bytes / all_bytes,
                bits_per_weight=_bits(num_bytes, parameters),
                dtypes=tuple(sorted({tensor.dtype for tensor in chosen})),
            )


def _layers(tensors: list[_Tensor]) -> Iterable[LayerSize]:
    by_layer: dict[int, list[_Tensor]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            by_layer.setdefault(tensor.layer, []).append(tensor)
    for layer in sorted(by_layer):
        attention, ffn, norms = (
            _sums(tensor for tensor in by_layer[layer] if tensor.part == part)
            for part in ("attention", "ffn", "norms")
        )
        yield LayerSize(layer, *attention, *ffn, *norms)


def _groups(tensors: list[_Tensor]) -> Iterable[TensorGroup]:
    """Group by name without the block's number; a shape or type of its own makes a group of its own."""
    counts: Counter[tuple[str, str, tuple[int, ...], str]] = Counter()
    for tensor in tensors:
        match = _LAYER_NUMBER.search(tensor.name)
        name = tensor.name
        if match:
            name = f"{name[: match.start(1)]}*{name[match.end(1) :]}"
        counts[name, tensor.part, tensor.shape, tensor.dtype] += 1
    for (name, part, shape, dtype), count in sorted(counts.items(), key=lambda item: PARTS.index(item[0][1])):
        yield TensorGroup(name, part, shape, dtype, count)


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool(_read_mapping(folder / "tokenizer_config.json").get("chat_template"))


def _read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; an empty one when the file is missing or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_provenance(path: Path) -> tuple[Provenance | None, tuple[str, ...]]:
    """Read what a manifest says; a damaged one costs a note, since the model itself is sound."""
    if not path.is_file():
        return None, ()
    manifest = _read_mapping(path)
    if not manifest:
        return None, (f"{path} cannot be read, so where the model came from is not shown",)

    def found(kind: type | tuple[type, ...], *keys: str) -> Any:
        value: Any = manifest
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, kind) and not isinstance(value, bool) else None

    return Provenance(
        source=found(str, "source"),
        expert=found(str, "expert", "name"),
        rule=found(str, "rule"),
        ratio=found((int, float), "plan", "ratio"),
        parameters_before=found(int, "parameters_before"),
        parameters_after=found(int, "parameters_after"),
        created=found(str, "created"),
        cusprun_version=found(str, "cusprun_version"),
    ), ()
