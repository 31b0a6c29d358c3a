"""From the records of requests to the numbers of a level, and to the ratios of endpoints. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from serve.bench.endpoint.records import (
    OK,
    Level,
    LevelResult,
    LevelRun,
    LevelSummary,
    LoadComparison,
    LoadOptions,
    Quantiles,
    RequestRecord,
)
from serve.bench.records import TOO_FEW_PAIRS, Interval
from serve.bench.statistics import (
    corrected,
    least_pairs,
    median_interval,
    nothing_shown,
    quantile,
    signed_rank_p_value,
)

LATE_MS = 10.0
"""A client that sends its requests later than this, at the 99th percentile, was itself too busy.

A busy client also reads late: a tenth of the 100 ms below which people take an answer to be immediate.
"""


@dataclass(frozen=True)
class LoadMetric:
    """A number of a level's summary that endpoints are compared by; ``better`` is ``lower`` or ``higher``."""

    name: str
    label: str
    unit: str
    better: str
    read: Callable[[LevelSummary], float | None]

    @property
    def words(self) -> tuple[str, str]:
        """What to call the later endpoint where its number is smaller, and where it is larger."""
        if self.better == "lower":
            return "faster", "slower"
        return "less", "more"


def _latency(field: str, label: str, share: str) -> LoadMetric:
    def read(summary: LevelSummary) -> float | None:
        quantiles: Quantiles | None = getattr(summary, f"{field}_ms")
        value: float | None = None if quantiles is None else getattr(quantiles, share)
        return value

    return LoadMetric(f"{field}_{share}_ms", f"{label}, {share}", "ms", "lower", read)


METRICS = (
    LoadMetric(
        "requests_per_second", "Requests", "1/s", "higher", lambda summary: summary.requests_per_second
    ),
    LoadMetric(
        "output_tokens_per_second",
        "Output tokens",
        "1/s",
        "higher",
        lambda summary: summary.output_tokens_per_second,
    ),
    LoadMetric(
        "goodput_per_second", "Good requests", "1/s", "higher", lambda summary: summary.goodput_per_second
    ),
    *(
        _latency(field, label, share)
        for field, label in (
            ("time_to_first_token", "Time to first token"),
            ("inter_token_latency", "Inter-token latency"),
            ("time_per_output_token", "Time per output token"),
            ("end_to_end_latency", "End-to-end latency"),
        )
        for share in ("p50", "p90", "p99")
    ),
)
"""What endpoints are compared by."""


def summarise(
    requests: Sequence[RequestRecord], duration_s: float, asked: int, options: LoadOptions
) -> LevelSummary:
    """Return the summary of requests that took ``duration_s`` in all, of ``asked`` that were to be sent."""
    good = [request for request in requests if request.status == OK]
    lateness = quantile([request.lateness_ms for request in requests], 0.99) if requests else 0.0
    tokens = _known(request.output_tokens for request in good)
    prompt_tokens = _known(request.prompt_tokens for request in good)
    num_met = count_met(good, options)
    return LevelSummary(
        requests=len(requests),
        ok=len(good),
        unsent=asked - len(requests),
        failures=dict(sorted(Counter(r.status for r in requests if r.status != OK).items())),
        duration_s=duration_s,
        requests_per_second=_rate(len(good), duration_s),
        output_tokens_per_second=None if tokens is None else _rate(sum(tokens), duration_s),
        goodput_per_second=None if num_met is None else _rate(num_met, duration_s),
        time_to_first_token_ms=_quantiles(r.time_to_first_token_ms for r in good),
        inter_token_latency_ms=_quantiles(gap for r in good for gap in r.inter_token_latencies_ms),
        time_per_output_token_ms=_quantiles(r.time_per_output_token_ms for r in good),
        end_to_end_latency_ms=_quantiles(r.end_to_end_latency_ms for r in good),
        mean_prompt_tokens=statistics.fmean(prompt_tokens) if prompt_tokens else None,
        mean_output_tokens=statistics.fmean(tokens) if tokens else None,
        mean_content_chunks=statistics.fmean(r.content_chunks for r in good) if good else None,
        lateness_p99_ms=lateness,
        client_was_late=lateness > LATE_MS,
    )


def _rate(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _known(counts: Iterable[int | None]) -> list[int] | None:
    """Return the counts, None when any of them is unknown: a sum of the others would be too small."""
    found = list(counts)
    known = [count for count in found if count is not None]
    return known if len(known) == len(found) else None


def _quantiles(values: Iterable[float | None]) -> Quantiles | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Quantiles(quantile(known, 0.5), quantile(known, 0.9), quantile(known, 0.99))


def count_met(good: Sequence[RequestRecord], options: LoadOptions) -> int | None:
    """Count the requests that met the goodput targets; None without a target, or where that is unknown.

    An answer of one token has no time per output token and meets any target for it.
    """
    ttft_ms, tpot_ms = options.goodput_ttft_ms, options.goodput_tpot_ms
    if ttft_ms is None and tpot_ms is None:
        return None
    if tpot_ms is not None and any(request.output_tokens is None for request in good):
        return None
    return sum(
        _within(request.time_to_first_token_ms, ttft_ms)
        and _within(request.time_per_output_token_ms, tpot_ms)
        for request in good
    )


def _within(value_ms: float | None, target_ms: float | None) -> bool:
    return target_ms is None or value_ms is None or value_ms <= target_ms


def level_results(runs: Sequence[LevelRun], options: LoadOptions) -> tuple[LevelResult, ...]:
    """Return each level of each endpoint over its rounds, all requests together."""
    places = dict.fromkeys((run.endpoint, run.level) for run in runs)
    found = []
    for endpoint, level in sorted(places, key=lambda place: (place[0], place[1].value)):
        own = [run for run in runs if (run.endpoint, run.level) == (endpoint, level)]
        summary = summarise(
            [request for run in own for request in run.requests],
            math.fsum(run.duration_s for run in own),
            options.requests * len(own),
            options,
        )
        found.append(LevelResult(endpoint, level, summary))
    return tuple(found)


def compare_endpoints(
    runs: Sequence[LevelRun], num_endpoints: int, seed: int, metrics: Sequence[LoadMetric] = METRICS
) -> tuple[LoadComparison, ...]:
    """Compare each later endpoint with the first, over all levels together and level by level.

    Two runs of the same level in the same round are a pair; one with a request that failed is in none. The
    tests over all levels together are corrected for their number, and so are those of the single levels.
    """
    by_place = {(run.endpoint, run.level, run.round): run for run in runs}
    levels = sorted({run.level for run in runs}, key=lambda level: level.value)
    families: list[list[Level | None]] = [[None], [*levels]] if len(levels) > 1 else [[*levels]]
    return tuple(
        found
        for endpoint in range(1, num_endpoints)
        for scopes in families
        for found in _judged(
            [
                (metric, _compare(metric, endpoint, scope, list(_pairs(by_place, endpoint, scope)), seed))
                for scope in scopes
                for metric in metrics
            ]
        )
    )


def _pairs(
    by_place: dict[tuple[int, Level, int], LevelRun], endpoint: int, scope: Level | None
) -> Iterator[tuple[LevelSummary, LevelSummary]]:
    for (place, level, number), run in by_place.items():
        other = by_place.get((endpoint, level, number))
        if place != 0 or other is None or scope not in (None, level):
            continue
        if all(summary.ok == summary.requests for summary in (run.summary, other.summary)):
            yield run.summary, other.summary


def _compare(
    metric: LoadMetric,
    endpoint: int,
    scope: Level | None,
    pairs: Sequence[tuple[LevelSummary, LevelSummary]],
    seed: int,
) -> LoadComparison:
    """Return a comparison that is not judged yet; its p-value is of this test alone."""
    values = [
        (first, later)
        for one, other in pairs
        # A ratio to or of nothing is none: leaving out the one but not the other would favour a side.
        if (first := metric.read(one)) and (later := metric.read(other))
    ]
    if not values:
        return LoadComparison(endpoint, scope, metric.name, 0, None, None, None, TOO_FEW_PAIRS)
    ratios = [later / first for first, later in values]
    return LoadComparison(
        endpoint=endpoint,
        level=scope,
        metric=metric.name,
        num_pairs=len(values),
        first=median_interval([first for first, _ in values], seed),
        later=median_interval([later for _, later in values], seed),
        ratio=median_interval(ratios, seed),
        verdict=TOO_FEW_PAIRS,
        p_value=signed_rank_p_value(ratios),
    )


def _judged(drafts: Sequence[tuple[LoadMetric, LoadComparison]]) -> Iterator[LoadComparison]:
    """Yield comparisons with their verdicts, the p-values of all of them corrected for their number."""
    p_values = iter(corrected([draft.p_value for _, draft in drafts if draft.p_value is not None]))
    least = least_pairs_of([draft for _, draft in drafts])
    for metric, draft in drafts:
        if draft.ratio is None:
            yield draft
            continue
        p_value = next(p_values)
        found = verdict(metric, draft.ratio, p_value, draft.num_pairs, least)
        yield replace(draft, p_value=p_value, verdict=found)


def least_pairs_of(family: Sequence[LoadComparison]) -> int:
    """Return the pairs from which comparisons that are corrected together can show a difference at all."""
    return least_pairs(max(1, sum(entry.ratio is not None for entry in family)))


def verdict(metric: LoadMetric, ratio: Interval, p_value: float, num_pairs: int, least: int) -> str:
    """Say what the ratio later / first shows."""
    smaller, larger = metric.words
    return nothing_shown(ratio, p_value, num_pairs, least) or (smaller if ratio.median < 1 else larger)
