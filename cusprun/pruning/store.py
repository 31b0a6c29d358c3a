"""Stores of impacts, opened and read as one, so that plans cost no forward pass.

A document that stands in several stores counts once. Only from the sums over all tokens it cannot be taken
out again, so that stores which share documents have no fluctuation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from cusprun.checkpoint.files import tokenizer_hash
from cusprun.checkpoint.index import CheckpointIndex
from cusprun.codec import load_json
from cusprun.errors import PlanError, StoreError, require_known
from cusprun.pruning.rules import Evidence
from cusprun.pruning.store_layout import (
    STORE_FILE,
    SUMS,
    StoredDocument,
    StoreInfo,
    array_shapes,
    check_info,
    kinds_of,
    read_arrays,
)
from cusprun.records import Shape, TokenizedDocument


@dataclass(frozen=True)
class ImpactStore:
    """One or several stores of the same model, read as one."""

    folders: tuple[Path, ...]
    infos: tuple[StoreInfo, ...]

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """All scored documents, each once, in the order of the rows of :meth:`layer`."""
        return tuple(
            info.documents[row] for info, rows in zip(self.infos, self._rows, strict=True) for row in rows
        )

    @cached_property
    def _rows(self) -> tuple[tuple[int, ...], ...]:
        """The rows of each store's documents that no store before it holds in the same dimension."""
        seen: set[tuple[str, str]] = set()
        found = []
        for info in self.infos:
            places = [(document.dimension, document.text_hash) for document in info.documents]
            found.append(tuple(row for row, place in enumerate(places) if place not in seen))
            seen.update(places)
        return tuple(found)

    @property
    def shares_documents(self) -> bool:
        """Whether a document stands in several of the stores."""
        return len(self.documents) < sum(len(info.documents) for info in self.infos)

    @property
    def dimensions(self) -> dict[str, list[int]]:
        """The rows of each dimension's documents."""
        rows: dict[str, list[int]] = {}
        for row, document in enumerate(self.documents):
            rows.setdefault(document.dimension, []).append(row)
        return rows

    @property
    def shape(self) -> Shape:
        """Shape of the model that was scored."""
        return self.infos[0].shape

    @property
    def model_hash(self) -> str:
        """Hash of the model that was scored."""
        return self.infos[0].model_hash

    @property
    def granularity(self) -> str:
        """What the impacts belong to: ``unit`` or ``neuron``."""
        return self.infos[0].granularity

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of unit or neuron that were scored."""
        return kinds_of(self.granularity)

    @property
    def store_hash(self) -> str:
        """SHA-256 over model, corpora and devices other than the CPU: equal stores have equal hashes."""
        parts = [self.model_hash, *(info.corpus_hash for info in self.infos)]
        parts += [info.device for info in self.infos if info.device != "cpu"]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def require_model(self, index: CheckpointIndex, model_hash: str) -> None:
        """Refuse a store that was not made from this model and its tokenizer.

        Raises:
            PlanError: weights, config or shape are another model's.
            StoreError: the tokenizer is another one, so that the documents had other tokens.
        """
        if self.model_hash != model_hash or self.shape != index.shape:
            raise PlanError(
                f"the store {self.folders[0]} was made from another model than {index.folder}; "
                "score this model, or plan the model that was scored"
            )
        own = tokenizer_hash(index.folder)
        for folder, info in zip(self.folders, self.infos, strict=True):
            if own and info.tokenizer_hash not in ("", own):
                raise StoreError(
                    f"the store {folder} was made with other tokens: the tokenizer in {index.folder} is "
                    "another one than when it was scored; score again, or put the tokenizer back"
                )

    def require_tokens(self, documents: Iterable[TokenizedDocument]) -> None:
        """Raise ``StoreError`` when a text that was scored has other token ids among ``documents``."""
        scored = {
            document.text_hash: (document.tokens_hash, folder)
            for folder, info in zip(self.folders, self.infos, strict=True)
            for document in info.documents
        }
        for document in map(StoredDocument.of, documents):
            tokens, folder = scored.get(document.text_hash, (document.tokens_hash, Path()))
            if tokens != document.tokens_hash:
                raise StoreError(
                    f"the store {folder} was made with other tokens: a text of the {document.dimension} "
                    "corpus has other token ids there; score again with this tokenizer and max_tokens"
                )

    def check_files(self) -> None:
        """Read every file whole; raises ``StoreError`` when one is missing, damaged or does not fit."""
        names = tuple(array_shapes(self.shape, 0, self.granularity))
        for layer in range(self.shape.num_hidden_layers):
            self._read(layer, names)

    def layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the impacts of one block: per kind of unit, float32 [documents, units].

        Raises:
            StoreError: the file is missing, damaged or does not fit the store's description.
        """
        parts = self._read(layer, self.kinds)
        return {kind: self._impacts(parts, kind) for kind in self.kinds}

    def evidence(self, layer: int, kind: str, seed: int = 0) -> Evidence:
        """Return all that is known about the units of one kind in one block.

        The fluctuation of stores that share documents is not known, and NaN. ``seed`` makes the seed of the
        random rule, together with block and kind.

        Raises:
            StoreError: the kind was not scored, or the file is missing, damaged or does not fit the store.
        """
        require_known(kind, self.kinds, "kind of unit", StoreError)
        source = _SOURCES.get(kind) if self.granularity == "unit" else None
        sums = [] if source is None else [name for name in SUMS if name.startswith(f"{source}.")]
        parts = self._read(layer, (kind, f"{kind}.weight_squares", *sums))
        impacts = self._impacts(parts, kind)
        documents = self.documents
        return Evidence(
            impacts=impacts,
            tokens=torch.tensor([document.num_tokens for document in documents]),
            dimensions=self.dimensions,
            fluctuation=self._fluctuation(parts, kind, impacts),
            magnitude=parts[0][f"{kind}.weight_squares"].sqrt(),
            seed=_seed(seed, layer, kind),
            texts=tuple(document.text_hash for document in documents),
        )

    def _read(self, layer: int, names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        return [
            read_arrays(folder, info, layer, names)
            for folder, info in zip(self.folders, self.infos, strict=True)
        ]

    def _impacts(self, parts: Sequence[dict[str, torch.Tensor]], kind: str) -> torch.Tensor:
        return torch.cat([part[kind][list(rows)] for part, rows in zip(parts, self._rows, strict=True)])

    def _fluctuation(
        self, parts: Sequence[dict[str, torch.Tensor]], kind: str, impacts: torch.Tensor
    ) -> torch.Tensor:
        """Return the variance of the units' channels times the squared norm of their output columns."""
        if self.granularity != "unit":
            return torch.empty(0)
        if self.shares_documents:
            return torch.full((impacts.shape[1],), torch.nan, dtype=torch.float64)
        num_tokens = sum(document.num_tokens for document in self.documents)
        means = _added(parts, f"{_SOURCES[kind]}.sums") / num_tokens
        if kind == "block":
            squares = impacts.double().square().sum(dim=0) / num_tokens
            return (squares - means.square().sum()).clamp_min(0)
        squares = _added(parts, f"{_SOURCES[kind]}.squares") / num_tokens
        variances = (squares - means.square()).clamp_min(0)
        channels = variances * parts[0][f"{_SOURCES[kind]}.column_squares"]
        # A head's is the mean over its channels, a group's the mean over its heads: both are plain means.
        return channels.view(impacts.shape[1], -1).mean(dim=1)


_SOURCES = {"ffn_channel": "mlp", "query_head": "attention", "kv_group": "attention", "block": "block"}
"""Whose sums tell the fluctuation of a kind of unit."""


def _added(parts: Sequence[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return torch.stack([part[name] for part in parts]).sum(dim=0)


def _seed(seed: int, layer: int, kind: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{layer}|{kind}".encode()).digest()[:7], "big")


def open_store(folders: Path | Sequence[Path]) -> ImpactStore:
    """Open one store or several of the same model, tokens and granularity.

    Raises:
        StoreError: a store is missing, damaged or given twice, or they were made from different models, with
            different tokenizers or different tokens for the same text, or one from units and another from
            neurons.
    """
    paths = (folders,) if isinstance(folders, Path) else tuple(folders)
    if not paths:
        raise StoreError(
            "no store of scores was given; make one with `cusprun score` and name it (--scores STORE)"
        )
    for path in paths:
        if not path.exists():
            raise StoreError(f"{path} does not exist; check the path, or make it with `cusprun score`")
        if not (path / STORE_FILE).is_file():
            raise StoreError(f"{path} is not a store of scores; make one with `cusprun score`")
    _refuse_doubles(paths)
    infos = tuple(load_json(StoreInfo, path / STORE_FILE, StoreError) for path in paths)
    tokens: dict[str, tuple[str, Path]] = {}
    for path, info in zip(paths, infos, strict=True):
        check_info(info, path / STORE_FILE)
        if info.model_hash != infos[0].model_hash or info.shape != infos[0].shape:
            raise StoreError(
                f"{path} and {paths[0]} were made from different models; score one model for both"
            )
        if info.granularity != infos[0].granularity:
            raise StoreError(
                f"{path} holds impacts of each {info.granularity} and {paths[0]} of each "
                f"{infos[0].granularity}; score both alike"
            )
        if len({info.tokenizer_hash, infos[0].tokenizer_hash} - {""}) > 1:
            raise StoreError(
                f"{path} and {paths[0]} were made with other tokens: the model had another tokenizer; "
                "score both with the same one"
            )
        for document in info.documents:
            digest, first = tokens.setdefault(document.text_hash, (document.tokens_hash, path))
            if digest != document.tokens_hash:
                raise StoreError(
                    f"{path} and {first} were made with other tokens: a text has other token ids in one than "
                    "in the other; score both with the same tokenizer and max_tokens"
                )
    return ImpactStore(paths, infos)


def _refuse_doubles(paths: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise StoreError(f"the store {path} is given twice; name every store once")
        seen.add(path.resolve())
