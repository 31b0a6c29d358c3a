"""What a Hugging Face folder holds, known from its config and tensor headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.checkpoint.config_check import check_config
from cusprun.checkpoint.safetensors_header import TensorInfo, read_header
from cusprun.errors import ModelError, UnsupportedModelError
from cusprun.families import Family, axis_length, family_of, shape_of
from cusprun.families.features import foreign_tensor_reason
from cusprun.records import Shape

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
"""The types of weights that can be pruned and written."""

_HASH_CHUNK_BYTES = 1 << 22
_COMPARED_BYTES = 1 << 16


@dataclass(frozen=True)
class CheckpointIndex:
    """A checked Hugging Face folder: every tensor the family wants is there, in the shape the config says."""

    folder: Path
    config: Mapping[str, Any]
    family: Family
    shape: Shape
    tensors: Mapping[str, TensorInfo]

    @property
    def num_parameters(self) -> int:
        """Parameters stored (a tied head is counted once)."""
        return sum(info.num_elements for info in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(info.num_bytes for info in self.tensors.values())

    def stated(self, key: str) -> Any:
        """Return what the config states, or the default of the family's stock config."""
        value = self.config.get(key)
        return self.family.config_defaults.get(key) if value is None else value

    @property
    def head_name(self) -> str:
        """Name of the output projection; the embedding's own when they are tied."""
        return self.family.embedding_name() if self.shape.tie_word_embeddings else "lm_head.weight"


def open_checkpoint(folder: Path) -> CheckpointIndex:
    """Open a Hugging Face folder, reading headers only.

    Raises:
        ModelError: no such folder, no config or one with values that cannot be, pickled weights only, a shard
            missing, a damaged header, or a tensor that is missing or has another shape than the config says.
        UnsupportedModelError: a family that is not supported, or a feature that cannot be pruned.
    """
    config = read_config(folder)
    family = family_of(config, str(folder))
    if config.get("quantization_config"):
        raise ModelError(
            f"{folder} holds quantised weights; start from the folder with the full-precision weights"
        )
    check_config(config, str(folder / "config.json"))
    shape = shape_of(config, str(folder / "config.json"))
    tensors = _read_tensors(folder)
    if shape.num_hidden_layers > len(tensors):  # also keeps the table that is built per block small
        raise ModelError(
            f"{folder / 'config.json'} names {shape.num_hidden_layers:,} blocks and the folder holds "
            f"{len(tensors):,} tensors; copy the folder again"
        )
    known = {spec.name: spec for spec in family.specs(shape.num_hidden_layers)}
    if shape.tie_word_embeddings:
        _require_the_embedding(
            folder, tensors.pop("lm_head.weight", None), tensors.get(family.embedding_name())
        )
    elif "lm_head.weight" not in tensors:
        raise ModelError(f"{folder} has no tensor lm_head.weight, and its config does not tie the embeddings")
    for name, spec in known.items():
        if name not in tensors and not spec.optional:
            raise ModelError(
                f"{folder} has no tensor {name}, which its config calls for; copy the folder again"
            )
    for name, info in list(tensors.items()):
        if name not in known:
            if name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints saved; recomputed
                del tensors[name]
                continue
            if reason := foreign_tensor_reason(name):
                raise UnsupportedModelError(f"{folder}: the tensor {name} {reason}")
            raise ModelError(f"{folder}: the tensor {name} does not belong to the family {family.model_type}")
        wanted = tuple(axis_length(axis, shape) for axis in known[name].axes)
        if info.shape != wanted:
            raise ModelError(f"{folder}: {name} has the shape {info.shape} where the config says {wanted}")
        if info.dtype not in FLOAT_TYPES:
            raise ModelError(
                f"{folder}: {name} has the type {info.dtype}, which is not supported "
                f"(supported: {', '.join(FLOAT_TYPES)}); save the model as bfloat16"
            )
    _require_stated_biases(folder, config, family, tensors, shape.num_hidden_layers)
    return CheckpointIndex(
        folder, config, family, shape, {name: tensors[name] for name in known if name in tensors}
    )


def _require_the_embedding(folder: Path, head: TensorInfo | None, embedding: TensorInfo | None) -> None:
    """Refuse a head of its own where the config ties it: stock versions disagree on which of them counts.

    The first rows tell: a matrix of its own differs in all of them.
    """
    if head is None or embedding is None:
        return
    alike = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not alike or _first_bytes(head) != _first_bytes(embedding):
        raise ModelError(
            f"{folder / 'config.json'} ties the embeddings, and the folder holds another lm_head.weight; set "
            "tie_word_embeddings to false or remove the tensor"
        )


def _first_bytes(info: TensorInfo) -> bytes:
    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        return stream.read(min(info.num_bytes, _COMPARED_BYTES))


def _require_stated_biases(
    folder: Path, config: Mapping[str, Any], family: Family, tensors: Mapping[str, TensorInfo], layers: int
) -> None:
    """Refuse biases that the config does not state, and stated ones that are missing: stock code obeys."""
    for flag, patterns in family.bias_flags.items():
        stated = bool(config.get(flag))
        for name in (
            pattern.replace("{layer}", str(layer)) for layer in range(layers) for pattern in patterns
        ):
            if (name in tensors) != stated:
                raise ModelError(
                    f"{folder / 'config.json'} says {flag} is {str(stated).lower()}, and {name} is "
                    f"{'missing' if stated else 'there'}; mend the config or copy the folder again"
                )


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; raises ``ModelError`` when the folder or the file is missing or not JSON."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; give a Hugging Face folder, a hub id or a GGUF file")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json; give the folder that holds the model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} does not hold a mapping")
    return config


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / SINGLE_NAME).is_file():  # before an index, as stock code looks for them
        return read_header(folder / SINGLE_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when read; "
            "convert them to safetensors first"
        )
    raise ModelError(f"{folder} holds no safetensors weights; give the folder that holds the model")


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file, names in _read_index(folder).items():
        path = folder / file
        if not path.is_file():
            raise ModelError(
                f"{folder} lacks the shard {file} that {INDEX_NAME} names; copy the folder again"
            )
        header = read_header(path)
        absent = [name for name in names if name not in header]
        if absent:
            raise ModelError(f"{path} lacks the tensor {absent[0]} that {INDEX_NAME} names; copy it again")
        tensors.update((name, header[name]) for name in names)
    return tensors


def _read_index(folder: Path) -> dict[str, list[str]]:
    try:
        weight_map = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ModelError(f"{folder / INDEX_NAME} names a file outside the folder: {file}")
            files.setdefault(file, []).append(name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ModelError(f"{folder / INDEX_NAME} is damaged; copy the file again") from None
    return files


def model_hash(index: CheckpointIndex) -> str:
    """Return a SHA-256 over config and weights, the same however the weights are sharded."""
    digest = hashlib.sha256(json.dumps(index.config, sort_keys=True).encode())
    for name in sorted(index.tensors):
        info = index.tensors[name]
        digest.update(f"{name}|{info.dtype}|{info.shape}|".encode())
        left = info.num_bytes
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            while left:
                chunk = stream.read(min(left, _HASH_CHUNK_BYTES))
                if not chunk:
                    raise ModelError(f"{info.file} ended early while {name} was read; copy the file again")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()
