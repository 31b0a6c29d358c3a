"""The frontier of a sweep: its records, and which of its points nobody should choose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from cusprun.errors import UserError
from cusprun.pipeline.curve_quality import CurveQuality
from cusprun.pipeline.dominance import Axis, Candidate, Measured, Resampled, dominators
from cusprun.pipeline.evaluation import HELD_OUT
from cusprun.quality.report import mean_per_token, resampled
from serve.bench.records import Interval

_LEAST_PAIRS = 6
"""The whole range of six values covers the median in 97 % of cases, that of five in 94 %."""


@dataclass(frozen=True)
class SpeedOptions:
    """How the speed of an export is measured, against the original in the same export.

    ``prompt_tokens`` are processed at once and timed; ``decode_tokens`` are decoded one by one at
    ``context_depth`` tokens in the cache, and timed. ``num_pairs`` runs of both are made, no further pair
    being begun after ``time_limit_s`` seconds. ``num_threads`` None leaves them to the benchmark.
    """

    prompt_tokens: int = 128
    context_depth: int = 128
    decode_tokens: int = 32
    num_pairs: int = 10
    time_limit_s: float = 60.0
    num_threads: int | None = None

    def check(self) -> None:
        """Raise ``UserError`` for an option that cannot be."""
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UserError(f"the speed option {name} must be above 0, not {value:g}")


@dataclass(frozen=True)
class Speed:
    """The speed of one export; ``*_ratio`` is to the original in the same export, taken pair by pair.

    ``peak_memory_bytes`` is the median over runs. ``library`` ran it on ``machine``; ``noise`` says what
    made the machine noisy meanwhile.
    """

    decode_tokens_per_second: Interval
    decode_ratio: Interval
    prompt_tokens_per_second: Interval
    prompt_ratio: Interval
    peak_memory_bytes: float
    num_pairs: int
    library: str
    machine: str
    noise: tuple[str, ...] = ()

    @property
    def too_few_pairs(self) -> bool:
        """Whether the intervals say nothing."""
        return self.num_pairs < _LEAST_PAIRS


@dataclass(frozen=True)
class DocumentSums:
    """Of each document: its predicted tokens, and their negative log-likelihood in nats."""

    num_tokens: tuple[int, ...]
    nats: tuple[float, ...]


@dataclass(frozen=True)
class FrontierPoint:
    """One size in one export; ``ratio`` 0 is the original.

    ``file_bytes`` are all bytes of the artifact on disk, ``bits_per_weight`` 8 times that over
    ``num_parameters``. ``corpora`` was measured in the artifact's own runtime; its ratios are to the
    original's perplexity in float32. ``held_out`` holds what they rest on, document by document, for
    comparing points with each other. ``dominated_by`` names the point to choose instead, None where there
    is none. ``failure`` says why something could not be made or measured: what was is there, and the point
    is compared with no other. ``inputs_hash`` stands for the options of export and measurement.
    """

    ratio: float
    format: str
    precision: str
    num_parameters: int
    inputs_hash: str
    file_bytes: int | None = None
    bits_per_weight: float | None = None
    corpora: Mapping[str, CurveQuality] = field(default_factory=dict)
    held_out: DocumentSums | None = None
    speed: Speed | None = None
    dominated_by: str | None = None
    failure: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[float, str, str]:
        """What a curve has one point of: the ratio, the format and the precision."""
        return self.ratio, self.format, self.precision

    @property
    def name(self) -> str:
        """What tables call the point, such as ``0.25 gguf:q8_0``."""
        return f"{self.ratio or 'original'} {self.format}:{self.precision}"


def merged(*groups: Iterable[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """Return the points of all groups judged, ascending by ratio.

    Of points with one key the last counts, but a failed one never takes the place of a measured one, which
    another sweep may have been luckier with.
    """
    points: dict[tuple[float, str, str], FrontierPoint] = {}
    for point in chain(*groups):
        known = points.get(point.key)
        if known is None or known.failure is not None or point.failure is None:
            points[point.key] = point
    return judged([points[key] for key in sorted(points)])


def judged(points: Iterable[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """Return points with ``dominated_by`` set: each of the measured points is judged against the others.

    The axes are the held-out perplexity, of two points on the same draws of documents, the bytes on disk and,
    where it was measured, the decode speed. See :func:`cusprun.pipeline.dominance.dominators` for the rule.
    Of several that dominate a point the one of the lowest perplexity is named. Speeds of different machines
    are not compared.
    """
    points = tuple(points)
    measured = sorted((point for point in points if point.failure is None), key=_perplexity)
    verdicts = dominators([_candidate(point) for point in measured])
    return tuple(replace(point, dominated_by=verdicts.get(point.name)) for point in points)


def _perplexity(point: FrontierPoint) -> tuple[float, str]:
    return point.corpora[HELD_OUT].perplexity.value, point.name


def _candidate(point: FrontierPoint) -> Candidate:
    assert point.held_out is not None
    assert point.file_bytes is not None
    nats = np.array(point.held_out.nats, dtype=np.float64)
    tokens = np.array(point.held_out.num_tokens, dtype=np.float64)
    draws = resampled(len(tokens), seed=0)
    axes: list[Axis] = [Resampled(mean_per_token(nats, tokens, draws)), Measured.exact(point.file_bytes)]
    if point.speed is None:
        return Candidate(point.name, tuple(axes))
    rate = point.speed.decode_tokens_per_second
    low, high = (-math.inf, math.inf) if point.speed.too_few_pairs else (rate.low, rate.high)
    axes.append(Measured.more_is_better(rate.median, low, high))
    return Candidate(point.name, tuple(axes), point.speed.machine)
