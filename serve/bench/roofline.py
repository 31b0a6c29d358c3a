"""What the hardware allows: the time to read and to compute what one token needs, beside the time measured.

The roofline model (Williams, Waterman and Patterson, Communications of the ACM 52, 2009), for one text at a
time: a token can come no faster than its weights and cache are read, or its products computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from serve.bench.metrics import DECODE_SPEED, PROMPT_SPEED, at
from serve.bench.records import NO_DIFFERENCE, TOO_FEW_PAIRS, BenchOptions, Bound, Comparison, Roofline

_EXPLAINED = 0.5
"""Share of the time from which reading or computing is what bounds a speed; below, it is neither."""

BOUND_BY = {
    "memory": "reading weights and cache from memory",
    "arithmetic": "arithmetic",
    "overhead": "neither reading nor arithmetic, but the fixed cost of a token",
}


@dataclass(frozen=True)
class Work:
    """What one model needs for a token; see :func:`decode_work` and :func:`prompt_work`.

    ``weight_bytes`` are those that are read for a token, ``cache_bytes_per_position`` the keys and values of
    one token in all layers. ``block_flops`` and ``head_flops`` are operations for one token in the blocks'
    matrices and in the output head (two for each weight), ``attention_flops_per_position`` those for one
    token and one position that it attends to.
    """

    weight_bytes: int
    cache_bytes_per_position: int
    block_flops: float
    head_flops: float
    attention_flops_per_position: float


@dataclass(frozen=True)
class Speeds:
    """What the machine does, measured with the same number of threads: bytes and operations per second."""

    bytes_per_second: float
    flops_per_second: float


def decode_work(work: Work, depth: int, num_tokens: int) -> tuple[float, float]:
    """Return bytes and operations per token when ``num_tokens`` follow ``depth`` ones one by one."""
    positions = depth + (num_tokens + 1) / 2  # each token attends to itself too
    return (
        work.weight_bytes + work.cache_bytes_per_position * positions,
        work.block_flops + work.head_flops + work.attention_flops_per_position * positions,
    )


def prompt_work(work: Work, length: int, batch: int = 512) -> tuple[float, float]:
    """Return bytes and operations per token of a prompt that is read in batches, with logits for its last."""
    reads = -(-length // batch)
    positions = (length + 1) / 2
    return (
        (work.weight_bytes * reads + work.cache_bytes_per_position * length) / length,
        work.block_flops + work.head_flops / length + work.attention_flops_per_position * positions,
    )


def bound(
    side: str, metric: str, needs: tuple[float, float], speeds: Speeds, measured_tokens_per_second: float
) -> Bound:
    """Compare one measured speed with what the machine allows."""
    num_bytes, flops = needs
    read_s, compute_s = num_bytes / speeds.bytes_per_second, flops / speeds.flops_per_second
    limit = 1 / max(read_s, compute_s)
    reached = measured_tokens_per_second / limit
    larger = "memory" if read_s >= compute_s else "arithmetic"
    return Bound(
        side=side,
        metric=metric,
        bytes_per_token=num_bytes,
        flops_per_token=flops,
        bandwidth_bytes_per_second=speeds.bytes_per_second,
        flops_per_second=speeds.flops_per_second,
        limit_tokens_per_second=limit,
        reached=reached,
        bound_by=larger if reached >= _EXPLAINED else "overhead",
    )


def roofline(
    options: BenchOptions,
    comparisons: Sequence[Comparison],
    works: Mapping[str, Work],
    speeds: Mapping[str, Speeds],
) -> Roofline:
    """Put the limits beside every speed; ``works`` and ``speeds`` are by side."""
    measured = {entry.metric: entry for entry in comparisons}
    points: list[tuple[str, Callable[[Work], tuple[float, float]]]] = [
        (at(PROMPT_SPEED.name, length), partial(prompt_work, length=length))
        for length in sorted(options.prompt_lengths)
    ]
    points += [
        (
            at(DECODE_SPEED.name, depth),
            partial(decode_work, depth=depth, num_tokens=options.num_decode_tokens),
        )
        for depth in sorted(options.context_depths)
    ]
    bounds: list[Bound] = []
    notes: list[str] = []
    for name, needs in points:
        if name not in measured:
            continue
        entry = measured[name]
        pair = [
            bound(side, name, needs(works[side]), speeds[side], getattr(entry, side).median)
            for side in ("before", "after")
        ]
        bounds += pair
        notes.append(_note(entry, *pair))
    return Roofline(tuple(bounds), tuple(notes))


def _note(entry: Comparison, before: Bound, after: Bound) -> str:
    """Say in one sentence why a speed-up is what it is."""
    fewer = before.bytes_per_token / after.bytes_per_token
    less = before.flops_per_token / after.flops_per_token
    shown = entry.verdict not in (NO_DIFFERENCE, TOO_FEW_PAIRS)
    got = f"× {entry.ratio.median:.2f}" if shown else f"× {entry.ratio.median:.2f}, {entry.verdict}"
    return (
        f"{entry.label}: {got}, where bytes per token allow × {fewer:.2f} and operations × {less:.2f}; "
        f"{before.reached:.0%} and {after.reached:.0%} of what this machine allows are reached, and after "
        f"pruning it is bound by {BOUND_BY[after.bound_by]}"
    )
