"""What a benchmark is asked for and what it found: frozen records that round-trip to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from cusprun.errors import ConfigError

SIDES = ("before", "after")
"""The two models of a benchmark."""

MAX_LOST_RUNS = 2
"""Of one suite: a worker that dies three times will die again."""

NO_DIFFERENCE = "no difference shown"
TOO_FEW_PAIRS = "too few pairs to tell"


@dataclass(frozen=True)
class BenchOptions:
    """How to measure; every field has a default that suits a small model on a small machine.

    For each of ``prompt_lengths`` that many tokens are processed at once from an empty cache, timed; at each
    of ``context_depths``, tokens in the cache, ``num_decode_tokens`` are decoded one by one, timed.
    ``prompt_text`` is cut or repeated to the lengths; without it the ids are drawn from ``seed``.
    ``num_pairs`` None repeats until the intervals of the speeds are within ``precision`` of their ratio,
    half a width, or ``max_pairs`` is reached. No pair but the first is begun that would end after
    ``time_limit_s`` seconds of one runtime (None: its own in ``serve.bench.engines``); ``run_limit_s`` stops
    a run that hangs. ``num_threads`` None means the physical cores that this process may use.
    """

    prompt_lengths: tuple[int, ...] = (128, 512)
    context_depths: tuple[int, ...] = (128, 512)
    num_decode_tokens: int = 64
    prompt_text: str | None = None
    num_pairs: int | None = None
    max_pairs: int = 48
    precision: float = 0.02
    time_limit_s: float | None = None
    run_limit_s: float | None = None
    num_threads: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise ``ConfigError`` with every option that cannot be."""
        counts = {
            "num_decode_tokens": (self.num_decode_tokens,),
            "num_pairs": (self.num_pairs,),
            "max_pairs": (self.max_pairs,),
            "num_threads": (self.num_threads,),
            "prompt_lengths": self.prompt_lengths,
            "context_depths": self.context_depths,
        }
        faults = [
            f"{name} must be at least 1, not {value}"
            for name, values in counts.items()
            for value in values
            if value is not None and value < 1
        ]
        for name in ("prompt_lengths", "context_depths"):
            values = sorted(getattr(self, name))
            if not values:
                faults.append(f"{name} names none; give at least one number of tokens")
            faults += [f"{name} names {one} twice" for one, other in pairwise(values) if one == other]
        amounts = {
            "time_limit_s": (self.time_limit_s, "seconds"),
            "run_limit_s": (self.run_limit_s, "seconds"),
            "precision": (self.precision, "of the ratio"),
        }
        faults += [
            f"{name} must be over 0 {unit}, not {value:g}"
            for name, (value, unit) in amounts.items()
            if value is not None and not 0 < value < math.inf
        ]
        if self.prompt_text is not None and not self.prompt_text.strip():
            faults.append("prompt_text is empty")
        if faults:
            raise ConfigError("the benchmark's options", faults)


@dataclass(frozen=True)
class Interval:
    """A median with its interval; see ``serve.bench.statistics`` for how it is found."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One metric of both models, and the ratio after / before taken pair by pair.

    ``metric`` is a name of ``serve.bench.metrics``, such as ``decode_tokens_per_second@512``: what is
    measured at a prompt length or context depth carries it. ``better`` is ``lower`` or ``higher``.
    ``p_value`` is of no difference, corrected for the number of metrics; None where no test is made.
    ``verdict`` is a word such as ``faster`` or ``more``, ``no difference shown``, or ``too few pairs to
    tell``.
    """

    metric: str
    label: str
    unit: str
    better: str
    before: Interval
    after: Interval
    ratio: Interval
    p_value: float | None
    verdict: str


@dataclass(frozen=True)
class Artifact:
    """One of the two models, by its bare name: a report must not tell a user's folders.

    ``bits_per_weight`` are 8 times the bytes on disk over the parameters; None where they are not counted.
    """

    file_name: str
    file_bytes: int
    num_parameters: int | None
    bits_per_weight: float | None
    precision: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of one model, by the names of ``serve.bench.metrics``."""

    side: str
    pair: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class LostRun:
    """A run that gave no measurement, and why; its pair does not count."""

    side: str
    pair: int
    reason: str


@dataclass(frozen=True)
class Bound:
    """What the hardware allows for one speed of one model, and how much of that was reached.

    ``limit_tokens_per_second`` is the slower of reading ``bytes_per_token`` at
    ``bandwidth_bytes_per_second`` and computing ``flops_per_token`` at ``flops_per_second``; ``bound_by`` is
    ``memory``, ``arithmetic`` or ``overhead`` (what neither explains).
    """

    side: str
    metric: str
    bytes_per_token: float
    flops_per_token: float
    bandwidth_bytes_per_second: float
    flops_per_second: float
    limit_tokens_per_second: float
    reached: float
    bound_by: str


@dataclass(frozen=True)
class Roofline:
    """The limits beside the measurements, and ``notes``: why each speed-up is what it is, in sentences."""

    bounds: tuple[Bound, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """Both models in one runtime.

    ``runtime`` is its key (``llamacpp``, ``onnx``, ``torch``, ``vllm``), ``library`` name, version and
    build. ``failure`` says why there are no comparisons; ``noise``, sentence by sentence, what made the
    machine noisy. ``context_length`` is the size of the cache in tokens, which memory includes; None where
    the cache grows. ``stopped`` says why no more pairs were measured.
    """

    runtime: str
    library: str
    before: Artifact
    after: Artifact
    context_length: int | None
    comparisons: tuple[Comparison, ...]
    runs: tuple[Run, ...]
    lost_runs: tuple[LostRun, ...]
    noise: tuple[str, ...]
    stopped: str
    roofline: Roofline | None
    elapsed_s: float
    failure: str | None = None

    @property
    def num_pairs(self) -> int:
        """Pairs in which both models were measured."""
        return len(self.runs) // 2

    @property
    def given_up(self) -> str | None:
        """Why fewer pairs were measured than were wanted, because of lost runs; None where they were not."""
        if self.failure is not None or len(self.lost_runs) <= MAX_LOST_RUNS:
            return None
        last = self.lost_runs[-1].reason
        return f"{len(self.lost_runs)} runs were lost, the last time because {last}"

    def comparison(self, metric: str) -> Comparison:
        """Return the comparison of one metric; raises ``KeyError`` for one that was not measured."""
        return {entry.metric: entry for entry in self.comparisons}[metric]


@dataclass(frozen=True)
class Environment:
    """The machine and the libraries; ``load_average`` is that of the last minute before the start.

    ``usable_cpus`` are the numbers of the CPUs that the process may use, ``governor`` how the first one's
    frequency is ruled; None where the system does not say.
    """

    cpu_model: str
    physical_cores: int
    num_threads: int
    memory_bytes: int
    load_average: float | None
    usable_cpus: str | None
    governor: str | None
    gpus: tuple[str, ...]
    operating_system: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class BenchReport:
    """The whole benchmark: what was asked, the machine, and a suite for each runtime."""

    created: str
    options: BenchOptions
    environment: Environment
    suites: tuple[Suite, ...]
    elapsed_s: float
    schema_version: int = 2

    @property
    def failed(self) -> bool:
        """Whether a runtime could not be measured, or not to the end."""
        return any(suite.failure or suite.given_up for suite in self.suites)
