"""What the stages of a walk take of memory, and how large their batches may be within a budget. Pure sums.

Counted is memory that no file stands behind, the kernel's ``RssAnon``: weights in their stored type, hidden
states and whatever else lies in mapped files is the system's to drop. Every sum is meant as an upper limit;
``tests/walk/test_budget.py`` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import UserError
from cusprun.families import axis_length
from cusprun.walk.batches import DEFAULT_BATCH_TOKENS
from cusprun.walk.device import DEFAULT_DTYPE
from cusprun.walk.fallback import DEFAULT_BATCHING, Batching

BASE_BYTES = 420_000_000
"""The interpreter, torch, transformers and what they keep for their threads, with 64 MB for the allocator."""

MARGIN = 1.1
"""What is taken on top of a sum for the small things that it leaves out."""

FLOAT = 4
_COPIES = ({"hidden": 4, "heads": 5, "kv": 4}, {"hidden": 6, "heads": 1, "ffn": 5})
"""Rows of each width that exist for every token at the widest moment of attention, and of the FFN."""

_ROUNDED_BYTES = ({"hidden": 2, "heads": 2}, {"hidden": 2, "ffn": 2})
"""What a product in a type of two bytes takes beside them for every token: its input and its output."""

_PRODUCT_ELEMENTS = 1 << 23
"""Entries of the products of groups of heads in memory at one time, as ``pruning/impact.py`` has it."""

_ENTRY_BYTES = 1200
"""What a tokenizer takes for each entry of its vocabulary, and keeps when it is dropped (Gemma 3: 950)."""

_TOKEN_BYTES = 40
"""What a document's token takes: an integer of Python's, and its place in a list."""

_MASK_BYTES = 5
"""For each pair of tokens of a document under a sliding window: a truth value, and what is made from it."""

HEAD_PIECE_BYTES = 1 << 25
"""Float32 weights of an output projection in memory at one time, 34 MB, at the most."""

HEAD_PIECE_ENTRIES = 1024
"""Entries of the vocabulary whose logits exist at one time, at the most: products run at full rate."""

_HEAD_COPIES = {"hidden": 6, "entries": 5}
"""Rows of last hidden states and of logits, in float32, for every token at the widest moment of the head."""


@dataclass(frozen=True)
class Demand:
    """The memory of one stage: ``fixed`` says what of it is there at any batch, in bytes by its name.

    ``token_bytes`` come for each padded token of one batch, which holds at least the longest document.
    """

    stage: str
    fixed: Mapping[str, int]
    token_bytes: int
    longest: int

    def total_bytes(self, batch_tokens: int) -> int:
        """Return what the stage takes with batches of at most ``batch_tokens``."""
        tokens = max(batch_tokens, self.longest)
        return BASE_BYTES + round(MARGIN * (sum(self.fixed.values()) + tokens * self.token_bytes))

    @property
    def least_bytes(self) -> int:
        """Return what the stage takes at the least."""
        return self.total_bytes(1)

    def batch_tokens(self, memory_bytes: int) -> int:
        """Return the largest batch that fits, in padded tokens; at most the usual one, 0 when none does."""
        if memory_bytes < self.least_bytes:
            return 0
        left = (memory_bytes - BASE_BYTES) / MARGIN - sum(self.fixed.values())
        return max(self.longest, min(DEFAULT_BATCH_TOKENS, int(left // self.token_bytes)))

    def refusal(self, memory_bytes: int) -> str:
        """Say in one sentence that a budget is too small for the stage, and what would do."""
        parts = {**self.fixed, f"a batch of {self.longest:,} tokens": self.longest * self.token_bytes}
        told = ", ".join(f"{megabytes(count)} for {name}" for name, count in parts.items() if count)
        return (
            f"a memory of {megabytes(memory_bytes)} is too little for {self.stage}, which takes at least "
            f"{megabytes(self.least_bytes)} ({megabytes(BASE_BYTES)} for the program, {told}); allow as much"
        )


def require_memory(memory_bytes: int | None, demands: Iterable[Demand]) -> None:
    """Raise ``UserError`` when a budget is too small for one of several stages; it names the largest one."""
    largest = max(demands, key=lambda demand: demand.least_bytes, default=None)
    if memory_bytes is not None and largest is not None and memory_bytes < largest.least_bytes:
        raise UserError(largest.refusal(memory_bytes))


def batching_within(memory_bytes: int | None, demand: Demand) -> Batching:
    """Return the batches of a stage within a budget; the usual ones without.

    Raises:
        UserError: the budget is too small for the stage.
    """
    if memory_bytes is None:
        return DEFAULT_BATCHING
    require_memory(memory_bytes, (demand,))
    return Batching(demand.batch_tokens(memory_bytes))


def scoring(index: CheckpointIndex, lengths: Sequence[int], dtype: str = DEFAULT_DTYPE) -> Demand:
    """Return what scoring documents of some lengths, in tokens, takes with products in ``dtype``."""
    shape = index.shape
    width = shape.queries_per_group * shape.head_dim
    product = shape.num_key_value_heads * width * width
    # W^T W of every group, and the same of the channels of as many documents as are taken together.
    together = min(max(product, _PRODUCT_ELEMENTS), len(lengths) * product)
    fixed = {
        **kept_bytes(index, lengths),
        f"one block in {dtype}": block_bytes(index, dtype),
        "the products of heads": FLOAT * (product + together),
    }
    return Demand("scoring", fixed, token_bytes(index, lengths, dtype), max(lengths, default=1))


def walking(index: CheckpointIndex, lengths: Sequence[int], stage: str) -> Demand:
    """Return what running documents of some lengths through the blocks takes."""
    fixed = {**kept_bytes(index, lengths), "one block in float32": block_bytes(index)}
    return Demand(stage, fixed, token_bytes(index, lengths), max(lengths, default=1))


def measuring(indexes: Sequence[CheckpointIndex], lengths: Sequence[int]) -> Demand:
    """Return what the likelihood of documents takes, of one model or of one and its reference."""
    # The head comes behind the blocks: the larger of both counts, of weights and of tokens.
    weights = max(HEAD_PIECE_BYTES, *map(block_bytes, indexes))
    fixed = {**kept_bytes(indexes[0], lengths), "one block or a piece of the head in float32": weights}
    per_token = max(max(token_bytes(index, lengths), _head_token_bytes(index)) for index in indexes)
    return Demand("measuring quality", fixed, per_token, max(lengths, default=1))


def _head_token_bytes(index: CheckpointIndex) -> int:
    shape = index.shape
    entries = min(HEAD_PIECE_ENTRIES, shape.vocab_size)
    return FLOAT * (_HEAD_COPIES["hidden"] * shape.hidden_size + _HEAD_COPIES["entries"] * entries)


def kept_bytes(index: CheckpointIndex, lengths: Sequence[int]) -> dict[str, int]:
    """Return the bytes of what is there in every stage, by its name."""
    return {
        "the tokenizer and the documents": _ENTRY_BYTES * index.shape.vocab_size + _TOKEN_BYTES * sum(lengths)
    }


def block_bytes(index: CheckpointIndex, dtype: str = DEFAULT_DTYPE) -> int:
    """Return the bytes of the largest decoder block whose linear layers are in ``dtype``.

    In another type than float32 both last projections exist in float32 beside it, to be looked at.
    """
    family, modules = index.family, index.family.modules
    largest = 0
    for layer in range(index.shape.num_hidden_layers):
        sizes = {
            spec.name: index.tensors[spec.name].num_elements
            for spec in family.layer_specs(layer)
            if spec.name in index.tensors
        }
        last = sum(
            sizes[f"{family.layer_prefix(layer)}{path}.weight"]
            for path in (modules.attention_output, modules.mlp_output)
        )
        whole = sum(sizes.values())
        largest = max(largest, FLOAT * (whole if dtype == DEFAULT_DTYPE else whole // 2 + last))
    return largest


def token_bytes(index: CheckpointIndex, lengths: Sequence[int], dtype: str = DEFAULT_DTYPE) -> int:
    """Return the bytes that a block takes for each padded token of a batch, with products in ``dtype``."""
    rounded = _ROUNDED_BYTES if dtype != DEFAULT_DTYPE else ({}, {})
    widest = max(
        FLOAT * _of_widths(copies, index) + _of_widths(more, index)
        for copies, more in zip(_COPIES, rounded, strict=True)
    )
    windowed = index.family.has_sliding_window(index.config)
    return widest + (_MASK_BYTES * max(lengths, default=1) if windowed else 0)


def _of_widths(counts: Mapping[str, int], index: CheckpointIndex) -> int:
    return sum(count * axis_length(axis, index.shape) for axis, count in counts.items())


def megabytes(count: int) -> str:
    """Return bytes for people, rounded up: ``640 MB``, ``3.9 GB``."""
    if count < 10**9:
        return f"{-(-count // 10**6)} MB"
    return f"{-(-count // 10**8) / 10:.1f} GB"
