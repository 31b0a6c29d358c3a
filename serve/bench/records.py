"""What a benchmark is asked for and what it found: frozen records that round-trip to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cusprun.errors import ConfigError

SIDES = ("before", "after")
"""The two files of a benchmark."""

NO_DIFFERENCE = "no difference shown"
TOO_FEW_PAIRS = "too few pairs to tell"


@dataclass(frozen=True)
class Metric:
    """One measured quantity; ``better`` is ``lower`` or ``higher``, the words say which way it went.

    Fewer than ``min_pairs`` pairs show no difference. Below six, not even the whole range covers a median in
    95 % of cases (1 - 2 / 2**5 = 0.9375); memory differs by under 0.2 % between runs, and one pair shows it.
    """

    name: str
    label: str
    unit: str
    better: str
    better_word: str
    worse_word: str
    min_pairs: int = 6


METRICS = (
    Metric("load_time_ms", "Load time", "ms", "lower", "faster", "slower"),
    Metric("time_to_first_token_ms", "Time to first token", "ms", "lower", "faster", "slower"),
    Metric("prompt_tokens_per_second", "Prompt speed", "tokens/s", "higher", "faster", "slower"),
    Metric("decode_tokens_per_second", "Decode speed", "tokens/s", "higher", "faster", "slower"),
    Metric("inter_token_latency_p50_ms", "Inter-token latency, median", "ms", "lower", "faster", "slower"),
    Metric("inter_token_latency_p90_ms", "Inter-token latency, p90", "ms", "lower", "faster", "slower"),
    Metric("inter_token_latency_p99_ms", "Inter-token latency, p99", "ms", "lower", "faster", "slower"),
    Metric("peak_memory_bytes", "Peak memory", "bytes", "lower", "less", "more", min_pairs=1),
)
"""Every metric of a run, by the name of its field in ``Run``."""


@dataclass(frozen=True)
class BenchOptions:
    """How to measure; every field has a default that suits a small model on a small machine.

    ``num_prompt_tokens`` tokens are processed at once, then ``num_decode_tokens`` one by one, from a cache
    that holds ``context_depth`` tokens (None: the prompt's own length; what is missing is filled untimed).
    ``prompt_text`` is cut or repeated to that length; without it the ids are drawn from ``seed``.
    ``num_pairs`` counts runs per file: six is the least that gives a median a 95 % interval, nine the least
    whose interval outlives one disturbed pair. No pair but the first is begun that would end after
    ``time_limit_s`` seconds; ``run_limit_s`` stops a run that hangs.
    ``num_threads`` None means the physical cores that this process may use.
    """

    num_prompt_tokens: int = 256
    num_decode_tokens: int = 128
    context_depth: int | None = None
    prompt_text: str | None = None
    num_pairs: int = 9
    time_limit_s: float = 90.0
    run_limit_s: float = 300.0
    num_threads: int | None = None
    seed: int = 0

    @property
    def decode_depth(self) -> int:
        """Tokens in the cache before the first measured decode step."""
        return self.num_prompt_tokens if self.context_depth is None else self.context_depth

    def check(self) -> None:
        """Raise ``ConfigError`` with every option that cannot be."""
        faults = [
            f"{name} must be at least 1, not {value}"
            for name, value in (
                ("num_prompt_tokens", self.num_prompt_tokens),
                ("num_decode_tokens", self.num_decode_tokens),
                ("num_pairs", self.num_pairs),
                ("num_threads", 1 if self.num_threads is None else self.num_threads),
            )
            if value < 1
        ]
        faults += [
            f"{name} must be over 0 seconds, not {value:g}"
            for name, value in (("time_limit_s", self.time_limit_s), ("run_limit_s", self.run_limit_s))
            if not value > 0
        ]
        if self.decode_depth < self.num_prompt_tokens:
            faults.append(
                f"context_depth {self.context_depth} must be at least num_prompt_tokens "
                f"{self.num_prompt_tokens}"
            )
        if self.prompt_text is not None and not self.prompt_text.strip():
            faults.append("prompt_text is empty")
        if faults:
            raise ConfigError("the benchmark's options", faults)


@dataclass(frozen=True)
class Job:
    """What one worker process is to measure."""

    path: str
    num_prompt_tokens: int
    num_decode_tokens: int
    decode_depth: int
    prompt_text: str | None
    num_threads: int
    seed: int


@dataclass(frozen=True)
class Memory:
    """Memory of a worker at the end of its run.

    ``peak_bytes`` is the high-water mark of the resident set, mapped weights included (VmHWM, or ru_maxrss
    where there is no /proc). ``maxrss_bytes`` is ru_maxrss, for comparison: it can also hold the size of the
    process that started the worker. ``pss_bytes`` counts shared pages by share; None where unreadable.
    """

    peak_bytes: int
    maxrss_bytes: int
    pss_bytes: int | None


@dataclass(frozen=True)
class Measurement:
    """What one worker measured. Latencies are milliseconds, one per decoded token, in order.

    ``prefill_ms`` is the time for the prompt's forward pass alone; ``time_to_first_token_ms`` adds choosing
    the token. ``load_time_ms`` is for a file that lies in the page cache.
    """

    load_time_ms: float
    prefill_ms: float
    time_to_first_token_ms: float
    inter_token_latencies_ms: tuple[float, ...]
    num_prompt_tokens: int
    num_parameters: int
    context_length: int
    memory: Memory
    runtime: str


@dataclass(frozen=True)
class Fault:
    """Why a worker has no measurement; ``kind`` is ``model``, ``dependency`` or ``crash``."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Reply:
    """The one line that a worker prints: a measurement or a fault."""

    measurement: Measurement | None = None
    fault: Fault | None = None


@dataclass(frozen=True)
class Run:
    """One run reduced to its metrics; the fields are named after ``METRICS``."""

    side: str
    pair: int
    load_time_ms: float
    time_to_first_token_ms: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    inter_token_latency_p50_ms: float
    inter_token_latency_p90_ms: float
    inter_token_latency_p99_ms: float
    peak_memory_bytes: int
    maxrss_bytes: int
    pss_bytes: int | None


@dataclass(frozen=True)
class LostRun:
    """A run that gave no measurement, and why; its pair does not count."""

    side: str
    pair: int
    reason: str


@dataclass(frozen=True)
class Interval:
    """A median with its interval; see ``serve.bench.statistics`` for how it is found."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One metric of both files, and the ratio after / before taken pair by pair.

    ``verdict`` is the metric's ``better_word`` or ``worse_word``, ``no difference shown`` when the ratio's
    interval contains 1, or ``too few pairs to tell``.
    """

    metric: str
    before: Interval
    after: Interval
    ratio: Interval
    verdict: str


@dataclass(frozen=True)
class Artifact:
    """One of the two files, by its bare name: a report must not tell a user's folders."""

    file_name: str
    file_bytes: int
    num_parameters: int


@dataclass(frozen=True)
class Environment:
    """The machine and the libraries; ``load_average`` is that of the last minute before the start."""

    cpu_model: str
    physical_cores: int
    num_threads: int
    memory_bytes: int
    load_average: float | None
    operating_system: str
    runtime: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class BenchReport:
    """The whole benchmark: what was asked, every run, and the comparison per metric.

    ``noise`` says, sentence by sentence, what made the machine noisy; it is empty on a quiet one.
    ``context_length`` is the size of the cache in tokens, which peak memory includes.
    """

    created: str
    before: Artifact
    after: Artifact
    options: BenchOptions
    environment: Environment
    context_length: int
    comparisons: tuple[Comparison, ...]
    runs: tuple[Run, ...]
    lost_runs: tuple[LostRun, ...]
    noise: tuple[str, ...]
    elapsed_s: float
    schema_version: int = 1

    @property
    def noisy_machine(self) -> bool:
        """Whether the machine was too busy or unsteady for small differences to be trusted."""
        return bool(self.noise)

    @property
    def num_pairs(self) -> int:
        """Pairs in which both files were measured."""
        return len(self.runs) // 2

    def comparison(self, metric: str) -> Comparison:
        """Return the comparison of one metric; raises ``KeyError`` for an unknown name."""
        return {entry.metric: entry for entry in self.comparisons}[metric]


def metric_value(run: Run, metric: str) -> float:
    """Return a run's value of the metric named ``metric``."""
    value: Any = getattr(run, metric)
    return float(value)
