"""The Grafana dashboard, and the metrics that each engine exports, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

DATASOURCE_UID = "prometheus"

_MATCH = "{}"
"""Stands behind every metric, for the labels of what the dashboard is about."""

QUEUE_METRICS: Mapping[str, str] = {
    "llamacpp": "llamacpp:requests_deferred",
    "onnx": "cusprun_prompts_waiting",
    "vllm": "vllm:num_requests_waiting",
}
"""Requests that wait for one of those that are worked on to end: what a cluster adds servers for."""


@dataclass(frozen=True)
class Query:
    """One line of a panel: PromQL, and its legend, in which ``{{label}}`` stands for a label's value."""

    expression: str
    legend: str = "{{instance}}"


@dataclass(frozen=True)
class Panel:
    """One panel; ``unit`` is Grafana's name of it."""

    title: str
    unit: str
    queries: tuple[Query, ...]


def _sum(metric: str) -> str:
    return f"sum by (instance) ({metric}{_MATCH})"


def _per_second(metric: str) -> str:
    return f"sum by (instance) (rate({metric}{_MATCH}[$__rate_interval]))"


def _tokens(prompt: str, generated: str) -> Panel:
    return Panel(
        "Tokens per second",
        "short",
        (
            Query(_per_second(generated), "{{instance}} generated"),
            Query(_per_second(prompt), "{{instance}} of prompts"),
        ),
    )


def _work(running: str, engine: str) -> Panel:
    return Panel(
        "Worked on and waiting",
        "short",
        (
            Query(_sum(running), "{{instance}} worked on"),
            Query(_sum(QUEUE_METRICS[engine]), "{{instance}} waiting"),
        ),
    )


def _quantiles(title: str, histogram: str) -> Panel:
    return Panel(
        title,
        "s",
        tuple(
            Query(
                f"histogram_quantile({share}, sum by (instance, le) "
                f"(rate({histogram}_bucket{_MATCH}[$__rate_interval])))",
                f"{{{{instance}}}} {name}",
            )
            for share, name in ((0.5, "median"), (0.95, "95 %"))
        ),
    )


FRONT: tuple[Panel, ...] = (
    Panel("Requests under way", "short", (Query(_sum("cusprun_requests_under_way")),)),
    Panel(
        "Requests per second, by status",
        "reqps",
        (
            Query(
                f"sum by (instance, status) (rate(cusprun_requests_total{_MATCH}[$__rate_interval]))",
                "{{instance}} {{status}}",
            ),
        ),
    ),
    Panel(
        "Mean time of a request",
        "s",
        (
            Query(
                f"{_per_second('cusprun_request_seconds_total')} / {_per_second('cusprun_requests_total')}",
            ),
        ),
    ),
)
"""What the front counts, whatever the engine."""

ENGINES: Mapping[str, tuple[Panel, ...]] = {
    "llamacpp": (
        _work("llamacpp:requests_processing", "llamacpp"),
        _tokens("llamacpp:prompt_tokens_total", "llamacpp:tokens_predicted_total"),
        Panel(
            "Time per generated token",
            "s",
            (
                Query(
                    f"{_per_second('llamacpp:tokens_predicted_seconds_total')} / "
                    f"{_per_second('llamacpp:tokens_predicted_total')}"
                ),
            ),
        ),
    ),
    "onnx": (
        _work("cusprun_prompts_running", "onnx"),
        _tokens("cusprun_prompt_tokens_total", "cusprun_generated_tokens_total"),
    ),
    "vllm": (
        _work("vllm:num_requests_running", "vllm"),
        _tokens("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
        _quantiles("Time to the first token", "vllm:time_to_first_token_seconds"),
        _quantiles("Time between tokens", "vllm:inter_token_latency_seconds"),
        Panel("KV cache in use", "percentunit", (Query(_sum("vllm:kv_cache_usage_perc")),)),
    ),
}
"""What each engine counts itself."""

_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2


def of_pods(namespace: str, name: str) -> str:
    """Return the labels, in PromQL, of the pods that a deployment (or KServe's) called ``name`` makes."""
    return f'{{namespace="{namespace}", pod=~"{name}-(predictor-)?[a-z0-9]+-[a-z0-9]+"}}'


def panels(engine: str, match: str = "") -> tuple[Panel, ...]:
    """Return the panels for an engine, about series with the labels ``match``, ``{...}`` or all."""
    return tuple(
        replace(
            panel,
            queries=tuple(
                replace(query, expression=query.expression.replace(_MATCH, match)) for query in panel.queries
            ),
        )
        for panel in FRONT + ENGINES[engine]
    )


def json_bytes(engine: str, model: str, place: str, match: str = "") -> bytes:
    """Return the dashboard as Grafana reads it; each ``place`` has one of its own in a Grafana."""
    plain = {
        "uid": f"cusprun-{hashlib.sha256(place.encode()).hexdigest()[:16]}",
        "title": f"cusprun: {model}",
        "tags": ["cusprun"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": [_plain(panel, number) for number, panel in enumerate(panels(engine, match))],
    }
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def _plain(panel: Panel, number: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": DATASOURCE_UID}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": {
            "x": number % _COLUMNS * _WIDTH,
            "y": number // _COLUMNS * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": source,
                "expr": query.expression,
                "legendFormat": query.legend,
            }
            for index, query in enumerate(panel.queries)
        ],
    }
