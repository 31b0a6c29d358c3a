"""The load test against every engine as it is served."""

from __future__ import annotations

from endpoint import Endpoint
from parrot import Parrot

from cusprun.pipeline.load_test import load_test
from serve.bench.endpoint.records import LoadOptions

TOKENS = 8


def test_every_engine_is_measured_with_its_own_counts(endpoint: Endpoint, parrot: Parrot) -> None:
    options = LoadOptions(
        concurrency=(1, 2), requests=4, prompt_tokens=24, output_tokens=TOKENS, warmup=1, goodput_ttft_ms=1e6
    )
    report = load_test([endpoint.url], options, tokenizer=parrot.folder)
    (served,) = report.endpoints
    assert (served.model, served.route, served.asks_usage) == ("parrot", "chat", True)
    assert report.num_failed == 0, [request.reason for run in report.runs for request in run.requests]
    requests = [request for run in report.runs for request in run.requests]
    assert len(requests) == 8
    for request in requests:
        assert request.tokens_from == "usage"
        assert request.output_tokens is not None
        assert 1 <= request.content_chunks <= request.output_tokens <= TOKENS
        assert request.output_tokens == TOKENS or not served.ignores_eos
        # What is sent is as long as asked; the chat template comes on top.
        assert request.prompt_tokens is not None
        assert request.prompt_tokens >= 24
        assert request.time_to_first_token_ms is not None
        assert request.end_to_end_latency_ms is not None
        assert 0 < request.time_to_first_token_ms <= request.end_to_end_latency_ms
    for result in report.results:
        assert result.summary.goodput_per_second == result.summary.requests_per_second > 0
