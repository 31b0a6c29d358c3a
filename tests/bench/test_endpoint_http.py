"""The load test over HTTP, against a real server on loopback that behaves well and badly."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_endpoint import KEY, HttpEndpoint, http_endpoint

from cusprun.codec import json_bytes
from cusprun.errors import CorpusError, MissingDependencyError, UserError
from cusprun.pipeline.load_test import load_test
from serve.bench.endpoint.records import EndpointReport, LoadOptions


@pytest.fixture(scope="module")
def server() -> Iterator[HttpEndpoint]:
    with http_endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: HttpEndpoint) -> HttpEndpoint:
    server.bodies.clear()
    server.headers.clear()
    return server


def load(endpoint: HttpEndpoint, model: str | None = None, **changes: Any) -> EndpointReport:
    defaults: dict[str, Any] = {
        "concurrency": (2,), "requests": 3, "prompt_tokens": 12, "output_tokens": 5, "warmup": 1,
        "stall_s": 20.0,
    }  # fmt: skip
    key = changes.pop("api_key", None)
    outside = {name: changes.pop(name) for name in ("prompts", "tokenizer") if name in changes}
    options = LoadOptions(**{**defaults, "model": model, **changes})
    return load_test([endpoint.url], options, api_key=key, **outside)


@pytest.mark.parametrize("model", [None, "in_bytes", "strict", "stricter", "no_usage", "reasons"])
def test_whoever_answers_is_measured(endpoint: HttpEndpoint, model: str | None) -> None:
    report = load(endpoint, model)
    assert report.num_failed == 0
    (result,) = report.results
    assert result.summary.ok == 3
    assert result.summary.time_to_first_token_ms is not None
    (found,) = report.endpoints
    assert (found.model, found.route) == (model or "good", "chat")
    has_usage = model not in ("no_usage", "stricter")
    assert (result.summary.output_tokens_per_second is not None) == has_usage
    assert found.ignores_eos == (model not in ("strict", "stricter"))
    assert found.asks_usage == (model != "stricter")
    chunks = {request.content_chunks for request in report.runs[0].requests}
    assert chunks == ({2} if model == "reasons" else {5})
    assert len(endpoint.bodies) >= 1 + 1 + 3  # the probe, the warm-up, the level
    assert all(body["max_tokens"] == 5 for body in endpoint.bodies[-3:])


def test_without_a_chat_the_completions_are_asked(endpoint: HttpEndpoint) -> None:
    report = load(endpoint, "base")
    assert (report.endpoints[0].route, report.num_failed) == ("completions", 0)
    assert load(endpoint, "good", route="completions").endpoints[0].route == "completions"
    with pytest.raises(UserError, match=r"refuses to answer \(chat: HTTP 400: no chat template\)"):
        load(endpoint, "base", route="chat")


@pytest.mark.parametrize(
    ("model", "status", "reason"),
    [
        ("stall", "stalled", "no event for 0.2 s, after 2 events"),
        ("stall_at_once", "stalled", "no event for 0.2 s, after 0 events"),
        ("drop", "dropped", "the stream ended after 2 events with text"),
        ("break", "dropped", "in the middle of the answer"),
        ("malformed", "malformed", "an event is not JSON: {oops"),
        ("error", "refused", "out of memory, [key]"),
        ("no_tokens", "no_tokens", "without any text (usage: 0 tokens)"),
        ("wrong_usage", "wrong_usage", "usage says 50 tokens, and at most 5"),
        ("zero_usage", "wrong_usage", "usage says 0 tokens, and text came"),
        ("no_stream", "malformed", "the answer is no stream of events"),
        ("teapot", "refused", "HTTP 418: no tea for [key]"),
        ("redirect", "refused", "HTTP 302"),
    ],
)
def test_what_goes_wrong_is_a_row(endpoint: HttpEndpoint, model: str, status: str, reason: str) -> None:
    stall_s = 0.2 if model.startswith("stall") else 20.0
    report = load(endpoint, model, stall_s=stall_s, api_key=KEY)
    (run,) = report.runs
    assert run.summary.failures == {status: len(run.requests)}
    assert report.num_failed == len(run.requests)
    for request in run.requests:
        assert reason in str(request.reason), request.reason
    assert KEY.encode() not in json_bytes(report)
    assert {headers["Authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}


def test_a_bad_endpoint_leaves_the_rows_of_a_good_one(endpoint: HttpEndpoint) -> None:
    with http_endpoint(model="zero_usage") as bad:
        options = LoadOptions(concurrency=(1,), requests=2, rounds=2, output_tokens=5, warmup=0)
        report = load_test([endpoint.url, bad.url], options)
    assert [result.summary.ok for result in report.results] == [4, 0]
    assert [result.summary.failures for result in report.results] == [{}, {"wrong_usage": 4}]
    assert {comparison.ratio for comparison in report.comparisons} == {None}


def test_two_endpoints_are_compared(endpoint: HttpEndpoint) -> None:
    options = LoadOptions(concurrency=(1, 2), requests=2, output_tokens=5, warmup=0)
    report = load_test([endpoint.url, endpoint.url.replace("127.0.0.1", "localhost")], options)
    assert [(run.round, run.level.value) for run in report.runs[::2]] == [
        (r, c) for r in range(3) for c in (1, 2)
    ]
    together = {entry.metric: entry for entry in report.comparisons if entry.level is None}
    assert together["time_to_first_token_p50_ms"].num_pairs == 6
    assert together["output_tokens_per_second"].ratio is not None


def test_prompts_of_a_file_are_sent(endpoint: HttpEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert load(endpoint, prompts=path).prompts == "mine.jsonl"
    sent = [body["messages"][0]["content"] for body in endpoint.bodies[-3:]]
    assert set(sent) == {"one", "two"}
    path.write_text('{"prompt": "one"}\n{"prompt": 2}\n', encoding="utf-8")
    with pytest.raises(CorpusError, match=r"mine\.jsonl:2 has no text under 'prompt' or 'text'"):
        load(endpoint, prompts=path)


def test_nobody_there_no_key_and_no_model_are_said_before_anything_is_measured(
    endpoint: HttpEndpoint,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    for model in (None, "m"):
        with pytest.raises(UserError, match="cannot be reached"):
            load_test([url], LoadOptions(model=model))
    with pytest.raises(UserError, match=r"without its key \(HTTP 401: bad key \[key\]\)"):
        load(endpoint, api_key="wrong")
    with pytest.raises(UserError, match="names no model"):
        load_test([endpoint.url + "/deeper"], LoadOptions())
    with pytest.raises(UserError, match="there is no endpoint"):
        load_test([])


def test_an_interrupt_keeps_what_had_ended(endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.bench.endpoint import collect

    whole, ended = collect._run_level, []

    async def interrupted(*given: Any) -> Any:
        if ended:
            raise KeyboardInterrupt
        ended.append(1)
        return await whole(*given)

    monkeypatch.setattr(collect, "_run_level", interrupted)
    report = load(endpoint, concurrency=(1, 2))
    assert (len(report.runs), report.is_complete) == (1, False)
    with pytest.raises(KeyboardInterrupt):
        load(endpoint)


def test_without_aiohttp_the_command_that_adds_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cusprun\[serve\]'"):
        load_test(["http://127.0.0.1:1"])
