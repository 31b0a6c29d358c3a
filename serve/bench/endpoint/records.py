"""What a load test is asked for and what it found: frozen records that round-trip to JSON.

No record holds an API key, a prompt or an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cusprun.errors import ConfigError
from serve.bench.records import Interval

OK = "ok"
REFUSED = "refused"
DROPPED = "dropped"
STALLED = "stalled"
TIMEOUT = "timeout"
MALFORMED = "malformed"
NO_TOKENS = "no_tokens"
WRONG_USAGE = "wrong_usage"
STATUSES = (OK, REFUSED, DROPPED, STALLED, TIMEOUT, MALFORMED, NO_TOKENS, WRONG_USAGE)
"""How a request can end; all but the first are failures."""

CHAT = "chat"
COMPLETIONS = "completions"
ROUTES: Mapping[str, str] = {CHAT: "/chat/completions", COMPLETIONS: "/completions"}
"""The two routes of OpenAI's interface that stream text, below the base URL."""

CONCURRENCY = "concurrency"
RATE = "rate"


DEFAULT_CONCURRENCY = (1, 2, 4, 8)
DEFAULT_PAIRED_ROUNDS = 3
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Level:
    """One load: ``value`` requests under way at once (``concurrency``), or begun per second (``rate``)."""

    kind: str
    value: float

    @property
    def label(self) -> str:
        """The level in words, such as ``4 at once`` or ``2/s``."""
        return f"{self.value:g} at once" if self.kind == CONCURRENCY else f"{self.value:g}/s"


@dataclass(frozen=True)
class LoadOptions:
    """How to load an endpoint.

    One of ``concurrency`` (closed loop: a request that ends makes way for the next) and ``rates`` (open loop:
    requests per second, with the exponential gaps of a Poisson process) gives the levels; neither means a
    concurrency of 1, 2, 4 and 8. Each level has ``requests`` requests with prompts of about ``prompt_tokens``
    tokens and answers of at most ``output_tokens``. ``rounds`` repeats all levels: 1 when None, 3 for several
    endpoints. ``warmup`` requests go to each endpoint first and do not count. A request without an event for
    ``stall_s`` seconds is ``stalled``, one that takes ``request_limit_s`` in all a ``timeout``. ``route`` is
    ``chat`` or ``completions``, the first that works when None; ``model`` is the first that the endpoint
    lists when None. A request is good when its time to first token and its time per output token stay within
    those of the two goodput targets that are given, in milliseconds.
    """

    concurrency: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    requests: int = 32
    prompt_tokens: int = 256
    output_tokens: int = 128
    rounds: int | None = None
    warmup: int = 4
    stall_s: float = 60.0
    request_limit_s: float = 600.0
    route: str | None = None
    model: str | None = None
    goodput_ttft_ms: float | None = None
    goodput_tpot_ms: float | None = None
    seed: int = 0

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels in the order in which they are run."""
        if self.rates:
            return tuple(Level(RATE, float(rate)) for rate in self.rates)
        return tuple(Level(CONCURRENCY, float(count)) for count in self.concurrency or DEFAULT_CONCURRENCY)

    def num_rounds(self, num_endpoints: int) -> int:
        """How often all levels are run."""
        if self.rounds is not None:
            return self.rounds
        return DEFAULT_PAIRED_ROUNDS if num_endpoints > 1 else 1

    def check(self) -> None:
        """Raise ``ConfigError`` with every option that cannot be."""
        faults = self._faults()
        if faults:
            raise ConfigError("the load test's options", faults)

    def _faults(self) -> list[str]:
        counts = {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "rounds": 1 if self.rounds is None else self.rounds,
            "concurrency": min(self.concurrency, default=1),
        }
        faults = [f"{name} must be at least 1, not {value}" for name, value in counts.items() if value < 1]
        positive = {
            "stall_s": (self.stall_s,),
            "request_limit_s": (self.request_limit_s,),
            "rates": self.rates,
            "goodput_ttft_ms": (self.goodput_ttft_ms,),
            "goodput_tpot_ms": (self.goodput_tpot_ms,),
        }
        faults += [
            f"{name} must be a number over 0, not {value:g}"
            for name, values in positive.items()
            for value in values
            if value is not None and not 0 < value < math.inf
        ]
        if self.warmup < 0:
            faults.append(f"warmup must be at least 0, not {self.warmup}")
        if self.concurrency and self.rates:
            faults.append("concurrency and rates cannot both be given; a level is one or the other")
        for name, values in (("concurrency", self.concurrency), ("rates", self.rates)):
            if len(set(values)) < len(values):
                faults.append(f"{name} names a level twice")
        most = max(self.concurrency or (() if self.rates else DEFAULT_CONCURRENCY), default=1)
        if self.requests < most:
            faults.append(f"requests {self.requests} must be at least the largest concurrency {most}")
        if self.route is not None and self.route not in ROUTES:
            faults.append(f"route must be {' or '.join(ROUTES)}, not {self.route!r}")
        return faults


@dataclass(frozen=True)
class Endpoint:
    """What was loaded, and how it lets itself be asked.

    ``asks_usage``: it takes ``stream_options.include_usage``; ``ignores_eos``: it takes ``ignore_eos``, so
    that answers have the asked length.
    """

    url: str
    model: str
    route: str
    asks_usage: bool
    ignores_eos: bool


@dataclass(frozen=True)
class RequestRecord:
    """One request; how its times are defined stands in ``serve.bench.endpoint.timeline``.

    ``sent_s`` counts from the beginning of its level's run; ``lateness_ms`` is how much later than due the
    client sent it. What was not seen is None, or empty. ``output_tokens`` come from ``usage`` or
    ``tokenizer``, as ``tokens_from`` says; where neither counts they are None, and never taken from
    ``content_chunks``.
    """

    status: str
    reason: str | None
    sent_s: float
    lateness_ms: float
    time_to_first_token_ms: float | None
    inter_token_latencies_ms: tuple[float, ...]
    time_per_output_token_ms: float | None
    end_to_end_latency_ms: float | None
    prompt_tokens: int | None
    output_tokens: int | None
    tokens_from: str | None
    content_chunks: int


@dataclass(frozen=True)
class Quantiles:
    """The 50th, 90th and 99th percentile of a sample, in its unit."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class LevelSummary:
    """What one or more runs of a level showed; only requests with the status ``ok`` are timed.

    ``duration_s`` is from the beginning of the load to the end of the last request; rates are per second of
    it. Token rates and goodput are None where token counts that they need are unknown, and goodput where no
    target was set. ``failures`` counts requests by status, ``unsent`` those that were not sent because the
    endpoint hung. ``client_was_late``: the client itself was too busy to keep to its schedule, so that the
    level's latencies are partly its own.
    """

    requests: int
    ok: int
    unsent: int
    failures: Mapping[str, int]
    duration_s: float
    requests_per_second: float
    output_tokens_per_second: float | None
    goodput_per_second: float | None
    time_to_first_token_ms: Quantiles | None
    inter_token_latency_ms: Quantiles | None
    time_per_output_token_ms: Quantiles | None
    end_to_end_latency_ms: Quantiles | None
    mean_prompt_tokens: float | None
    mean_output_tokens: float | None
    mean_content_chunks: float | None
    lateness_p99_ms: float
    client_was_late: bool


@dataclass(frozen=True)
class LevelRun:
    """One level of one endpoint in one round, with every request; ``endpoint`` is its place in the report."""

    endpoint: int
    level: Level
    round: int
    duration_s: float
    requests: tuple[RequestRecord, ...]
    summary: LevelSummary


@dataclass(frozen=True)
class LevelResult:
    """A level of an endpoint over all rounds."""

    endpoint: int
    level: Level
    summary: LevelSummary


@dataclass(frozen=True)
class LoadComparison:
    """One metric of a later endpoint against the first: the ratio later / first, run by run.

    ``level`` is None for the pairs of all levels together. A run with a failed request is in no pair.
    ``first``, ``later`` and ``ratio`` are None where no pair is left. ``p_value`` is of no difference,
    corrected for the number of metrics, and of levels where it is of one; None without a pair.
    """

    endpoint: int
    level: Level | None
    metric: str
    num_pairs: int
    first: Interval | None
    later: Interval | None
    ratio: Interval | None
    verdict: str
    p_value: float | None = None


@dataclass(frozen=True)
class EndpointReport:
    """The whole load test: what was asked, every request, and what it comes to.

    ``prompts`` and ``tokenizer`` name where the prompts and, where ``usage`` is absent, the token counts come
    from. ``client`` are the versions of what sent the requests. ``is_complete`` is False when it was
    interrupted; the runs that had ended are there.
    """

    created: str
    options: LoadOptions
    prompts: str
    tokenizer: str | None
    client: Mapping[str, str]
    endpoints: tuple[Endpoint, ...]
    runs: tuple[LevelRun, ...]
    results: tuple[LevelResult, ...]
    comparisons: tuple[LoadComparison, ...]
    elapsed_s: float
    is_complete: bool = True
    schema_version: int = SCHEMA_VERSION

    @property
    def num_failed(self) -> int:
        """Requests that ended otherwise than ``ok``."""
        return sum(run.summary.requests - run.summary.ok for run in self.runs)

    @property
    def num_requests(self) -> int:
        """Requests that count."""
        return sum(run.summary.requests for run in self.runs)
