"""The records that flow between stages: frozen, and each round-trips to a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cusprun.codec import Indices

DIMENSIONS = ("language", "domain", "task")
"""What an expert is for; an expert names one, two or all three."""

UNITS = ("ffn_channel", "query_head", "kv_group", "block")
"""Structural units with an impact; a KV group is a KV head with the query heads that share it."""

NEURONS = ("query_row", "key_row", "value_row", "output_column", "ffn_channel")
"""Single neurons with an impact: rows of Q, K and V, columns of O, FFN channels."""

GRANULARITIES = ("unit", "neuron")
"""What a store holds impacts of: structural units or single neurons."""

REFIT_TARGETS = ("output", "residual", "auto")
"""What the least squares of the refit aim at; see ``docs/method.md``."""


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
class Augment:
    """How the model makes more calibration documents by going on with the ones that are there.

    ``documents`` continuations are drawn in all, each from the first ``prompt_tokens`` tokens of a
    calibration document (half of a shorter one) and of at most ``max_new_tokens`` tokens; ``temperature`` 0
    takes the most likely token each time.
    """

    documents: int
    temperature: float = 0.8
    max_new_tokens: int = 256
    prompt_tokens: int = 32


@dataclass(frozen=True)
class Expert:
    """What a model is to be good at: sources for up to three dimensions, and how they are used.

    ``held_out`` is the share of documents kept apart for evaluation; ``max_tokens`` cuts long documents;
    ``general`` is text outside the expert, only ever used to measure what general ability is left;
    ``augment`` adds documents that the model makes itself to those for calibration.
    """

    name: str
    dimensions: Mapping[str, tuple[Source, ...]]
    general: tuple[Source, ...] = ()
    held_out: float = 0.2
    max_tokens: int = 512
    seed: int = 0
    augment: Augment | None = None


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
    """One legal shape for the budget, with the loss the plan predicts for it (smaller is better)."""

    num_hidden_layers: int
    num_key_value_heads: int
    num_attention_heads: int
    intermediate_size: int
    block_ratio: float
    predicted_loss: float


@dataclass(frozen=True)
class Plan:
    """Which units survive; made from a store, editable by hand, applied to the model it was made for.

    ``budget`` says in words what was asked for, ``ratio`` as a ratio; where something else was asked, it is
    the ratio that was reached. ``block_ratio`` and ``total_ratio`` are the shares of the decoder blocks'
    attention and FFN parameters, and of all parameters, that go. ``units`` are the kinds that could go.
    ``kept_blocks`` are the source's numbers of the blocks that survive, ``layers`` what each of them keeps.
    ``ffn_thresholds`` are the scores, in the units of the rule, at or below which an FFN channel of each
    kept block was found irrelevant. ``content_hash`` tells, when the plan is applied, whether what was asked
    for or what survives was edited since.
    """

    model_hash: str
    store_hash: str
    rule: str
    ratio: float
    budget: str
    block_ratio: float
    total_ratio: float
    targets: tuple[str, ...]
    units: tuple[str, ...]
    before: Shape
    after: Shape
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    ffn_thresholds: tuple[float, ...]
    kept_blocks: Indices
    layers: tuple[LayerPlan, ...]
    content_hash: str
    schema_version: int = 2


@dataclass(frozen=True)
class LayerRefit:
    """How well one projection's surviving columns reproduce the full output on calibration tokens.

    Errors are relative: the squared norm of the difference to the target over that of the target, which is
    the full output or, with the refit target ``residual``, what brings the stream back to the original's.
    ``measured_on`` says whether on calibration documents kept apart (``held-out``) or on those that were
    fitted (``calibration``). ``ridge`` is the share of the usual tokens' mean diagonal that was chosen, None
    where no refit was better and the columns stay.
    """

    layer: int
    projection: str
    relative_error_before: float
    relative_error_after: float
    ridge: float | None = None
    measured_on: str = "held-out"


@dataclass(frozen=True)
class Manifest:
    """``cusprun.json``: where an expert came from and how, enough to make it again.

    ``compensation`` made good for what went: ``refit`` (least squares), ``bias`` or ``none``;
    ``refit_weights`` are those of the dimensions' documents in the least squares, 1 where none is given;
    ``refit_target`` is what these aimed at, ``output`` or ``residual``. Where ``auto`` chose it,
    ``measurements`` say so under ``refit_target``, with the perplexity that decided of each.
    """

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
    compensation: str = "refit"
    refit_weights: Mapping[str, float] = field(default_factory=dict)
    refit_target: str = "output"
    schema_version: int = 1


@dataclass(frozen=True)
class NeuronLayer:
    """The neurons of one block that are set to zero, per kind, and the scores that decided.

    ``thresholds`` are the scores at or below which (at or above which, when the most relevant go) the neurons
    of each kind went; a kind that loses none has no threshold.
    """

    removed: Mapping[str, Indices]
    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class NeuronPlan:
    """Which single neurons of every matrix are set to zero; every shape stays.

    ``ratio`` is the share of each matrix' neurons that was asked for. With ``relevant`` the neurons with the
    highest scores go instead of those with the lowest, to see that the scores find what matters.
    """

    model_hash: str
    store_hash: str
    rule: str
    ratio: float
    relevant: bool
    seed: int
    layers: tuple[NeuronLayer, ...]
    schema_version: int = 1


@dataclass(frozen=True)
class NeuronManifest:
    """``cusprun.json`` of a model with single neurons set to zero: where it came from and how.

    ``counts`` holds, for each block, how many neurons of each kind are zero.
    """

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
    ratio: float
    relevant: bool
    counts: tuple[Mapping[str, int], ...]
    plan: NeuronPlan
    parameters: int
    zeroed_parameters: int
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    measurements: Mapping[str, Any] = field(default_factory=dict)
    granularity: str = "neuron"
    schema_version: int = 1
