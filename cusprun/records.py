"""The records that flow between stages: frozen, and each round-trips to a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cusprun.codec import Indices

DIMENSIONS = ("language", "domain", "task")
"""What an expert is for; an expert names one, two or all three."""

UNITS = ("ffn_channel", "query_head", "kv_group")
"""Structural units with an impact; a KV group is a KV head with the query heads that share it."""


@dataclass(frozen=True)
class Shape:
    """The widths of a decoder, in the names of the Hugging Face config."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class Source:
    """One place that documents come from; exactly one of ``path``, ``dataset`` and ``pack`` is set.

    ``template`` is text with ``{field}`` placeholders, or a list of ``{role, content}`` messages whose
    contents are such texts. ``limit`` is the number of documents taken, in the order of the source.
    """

    path: str | None = None
    dataset: str | None = None
    pack: str | None = None
    config: str | None = None
    split: str | None = None
    template: Any = None
    limit: int | None = None


@dataclass(frozen=True)
class Expert:
    """What a model is to be good at: sources for up to three dimensions, and how they are used.

    ``held_out`` is the share of documents kept apart for evaluation; ``max_tokens`` cuts long documents;
    ``general`` is text outside the expert, only ever used to measure what general ability is left.
    """

    name: str
    dimensions: Mapping[str, tuple[Source, ...]]
    general: tuple[Source, ...] = ()
    held_out: float = 0.2
    max_tokens: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One text or chat of one dimension (or ``general``), before tokenisation."""

    dimension: str
    text: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as the model sees it; ``text_hash`` identifies its text across sources."""

    dimension: str
    text_hash: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Corpora:
    """An expert's documents: calibration and held-out never share a text."""

    calibration: tuple[TokenizedDocument, ...]
    held_out: tuple[TokenizedDocument, ...]
    general: tuple[TokenizedDocument, ...] = ()

    @property
    def calibration_tokens(self) -> int:
        """Number of calibration tokens."""
        return sum(len(document.token_ids) for document in self.calibration)


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder block keeps, as indices into the source model's units."""

    kv_groups: Indices
    query_heads: Indices
    ffn_channels: Indices


@dataclass(frozen=True)
class Candidate:
    """One legal shape for the ratio, with the loss the plan predicts for it (smaller is better)."""

    num_key_value_heads: int
    num_attention_heads: int
    intermediate_size: int
    block_ratio: float
    predicted_loss: float


@dataclass(frozen=True)
class Plan:
    """Which units survive; made from a store, editable by hand, applied to the model it was made for.

    ``ratio`` is what was asked for; ``block_ratio`` and ``total_ratio`` are the shares of the decoder
    blocks' attention and FFN parameters, and of all parameters, that go. ``ffn_thresholds`` are the scores,
    in the units of the rule, at or below which an FFN channel of each block was found irrelevant.
    """

    model_hash: str
    store_hash: str
    rule: str
    ratio: float
    block_ratio: float
    total_ratio: float
    targets: tuple[str, ...]
    before: Shape
    after: Shape
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    ffn_thresholds: tuple[float, ...]
    layers: tuple[LayerPlan, ...]
    schema_version: int = 1


@dataclass(frozen=True)
class LayerRefit:
    """How well one projection's surviving columns reproduce the full output on calibration tokens.

    Errors are relative: the squared norm of the output difference over that of the full output.
    """

    layer: int
    projection: str
    relative_error_before: float
    relative_error_after: float


@dataclass(frozen=True)
class Manifest:
    """``cusprun.json``: where an expert came from and how, enough to make it again."""

    cusprun_version: str
    created: str
    source: str
    source_hash: str
    model_hash: str
    expert: Expert
    corpus_hash: str
    calibration_documents: int
    calibration_tokens: int
    held_out_documents: int
    rule: str
    refit: tuple[LayerRefit, ...]
    plan: Plan
    parameters_before: int
    parameters_after: int
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    measurements: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = 1
