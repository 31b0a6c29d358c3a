"""The impact store: every unit's impact on every document, kept so that plans cost no forward pass.

A store is a folder: ``store.json`` says what it was made from, ``layer-00000.safetensors`` and so on hold one
decoder block each, float32 arrays of [documents, units] named after the kind of unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cusprun.codec import load_json
from cusprun.errors import StoreError
from cusprun.records import UNITS, Shape

STORE_FILE = "store.json"


@dataclass(frozen=True)
class StoredDocument:
    """One scored document."""

    dimension: str
    text_hash: str
    num_tokens: int


@dataclass(frozen=True)
class StoreInfo:
    """What a store was made from."""

    model_hash: str
    corpus_hash: str
    expert_name: str
    shape: Shape
    documents: tuple[StoredDocument, ...]
    cusprun_version: str
    schema_version: int = 1


@dataclass(frozen=True)
class ImpactStore:
    """One or several stores of the same model, read as one."""

    folders: tuple[Path, ...]
    infos: tuple[StoreInfo, ...]

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """All scored documents, in the order of the rows of :meth:`layer`."""
        return tuple(document for info in self.infos for document in info.documents)

    @property
    def shape(self) -> Shape:
        """Shape of the model that was scored."""
        return self.infos[0].shape

    @property
    def model_hash(self) -> str:
        """Hash of the model that was scored."""
        return self.infos[0].model_hash

    @property
    def store_hash(self) -> str:
        """SHA-256 over model and corpora: equal stores have equal hashes."""
        parts = [self.model_hash, *(info.corpus_hash for info in self.infos)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the impacts of one block: per kind of unit, float32 [documents, units].

        Raises:
            StoreError: the file is missing, damaged or does not fit the store's description.
        """
        parts = [_read_layer(f, info, layer) for f, info in zip(self.folders, self.infos, strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def layer_file(layer: int) -> str:
    """Return the file name of one block."""
    return f"layer-{layer:05d}.safetensors"


def open_store(folders: Path | Sequence[Path]) -> ImpactStore:
    """Open one store or several of the same model.

    Raises:
        StoreError: a store is missing or damaged, or they were made from different models.
    """
    paths = (folders,) if isinstance(folders, Path) else tuple(folders)
    if not paths:
        raise StoreError("no store was given; make one with `cusprun score`")
    for path in paths:
        if not (path / STORE_FILE).is_file():
            raise StoreError(f"{path} is not an impact store; make one with `cusprun score`")
    infos = tuple(load_json(StoreInfo, path / STORE_FILE, StoreError) for path in paths)
    for path, info in zip(paths, infos, strict=True):
        if info.model_hash != infos[0].model_hash:
            raise StoreError(
                f"{path} and {paths[0]} were made from different models; score one model for both"
            )
    return ImpactStore(paths, infos)


def _read_layer(folder: Path, info: StoreInfo, layer: int) -> dict[str, torch.Tensor]:
    path = folder / layer_file(layer)
    try:
        arrays: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}); make the store again with `cusprun score`"
        ) from None
    documents = len(info.documents)
    wanted = {kind: (documents, count) for kind, count in unit_counts(info.shape).items()}
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    sound = found == wanted and all(
        bool((torch.isfinite(array) & (array >= 0)).all()) for array in arrays.values()
    )
    if not sound:
        raise StoreError(f"{path} does not fit its store.json; make the store again with `cusprun score`")
    return arrays


def unit_counts(shape: Shape) -> dict[str, int]:
    """Return how many units of each kind a block has."""
    counts = (shape.intermediate_size, shape.num_attention_heads, shape.num_key_value_heads)
    return dict(zip(UNITS, counts, strict=True))
