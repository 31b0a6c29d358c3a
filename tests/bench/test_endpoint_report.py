"""Options, prompts, summaries, comparisons, tables, and the report's way to JSON and back."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cusprun.codec import from_plain, json_bytes, to_plain
from cusprun.errors import ConfigError, CorpusError, ModelError, UserError
from serve.bench.endpoint.prompts import GivenPrompts, TextPrompts
from serve.bench.endpoint.records import (
    STATUSES,
    Endpoint,
    EndpointReport,
    Level,
    LevelRun,
    LoadOptions,
    RequestRecord,
)
from serve.bench.endpoint.summary import METRICS, compare_endpoints, count_met, level_results, summarise
from serve.bench.endpoint.table import load_tables, to_markdown, to_text
from serve.bench.endpoint.tokens import load_tokens
from serve.bench.endpoint.transport import base_url, check_key

OK = RequestRecord("ok", None, 0.0, 0.1, 100.0, (10.0, 20.0), 15.0, 140.0, 50, 3, "usage", 3)
STALLED = replace(
    OK, status="stalled", reason="no event for 60 s, after 0 events", time_to_first_token_ms=None,
    inter_token_latencies_ms=(), time_per_output_token_ms=None, end_to_end_latency_ms=None,
    prompt_tokens=None, output_tokens=None, tokens_from=None, content_chunks=0,
)  # fmt: skip


def run_of(endpoint: int, number: int, requests: list[RequestRecord], level: float = 2.0) -> LevelRun:
    options = LoadOptions(requests=len(requests))
    place = Level("concurrency", level)
    return LevelRun(
        endpoint, place, number, 2.0, tuple(requests), summarise(requests, 2.0, len(requests), options)
    )


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"requests": 0}, "requests must be at least 1, not 0"),
            ({"requests": 4}, "requests 4 must be at least the largest concurrency 8"),
            ({"concurrency": (0,)}, "concurrency must be at least 1, not 0"),
            ({"concurrency": (2, 2)}, "concurrency names a level twice"),
            ({"concurrency": (2,), "rates": (1.0,)}, "cannot both be given"),
            ({"rates": (0.0,)}, "rates must be a number over 0, not 0"),
            ({"rates": (float("nan"),)}, "rates must be a number over 0, not nan"),
            ({"rates": (1.0, float("nan"))}, "rates must be a number over 0, not nan"),
            ({"rates": (1.0, float("inf"))}, "rates must be a number over 0, not inf"),
            ({"stall_s": float("inf")}, "stall_s must be a number over 0, not inf"),
            ({"route": "chats"}, "route must be chat or completions, not 'chats'"),
            ({"warmup": -1}, "warmup must be at least 0, not -1"),
            ({"rounds": 0}, "rounds must be at least 1, not 0"),
            ({"goodput_ttft_ms": -1.0}, "goodput_ttft_ms must be a number over 0, not -1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes: dict[str, Any], fault: str) -> None:
        with pytest.raises(ConfigError, match=fault):
            LoadOptions(**changes).check()

    def test_what_is_not_said(self) -> None:
        assert [level.label for level in LoadOptions().levels] == [
            "1 at once",
            "2 at once",
            "4 at once",
            "8 at once",
        ]
        assert [level.label for level in LoadOptions(rates=(0.5,)).levels] == ["0.5/s"]
        assert (LoadOptions().num_rounds(1), LoadOptions().num_rounds(2)) == (1, 3)
        LoadOptions().check()


class TestUrls:
    @pytest.mark.parametrize(
        ("given_url", "base"),
        [
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
            ("127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
            ("https://h/v1/", "https://h/v1"),
            ("https://h/openai/v1/chat/completions", "https://h/openai/v1"),
            ("https://h/v1/completions/", "https://h/v1"),
            ("http://[::1]:80/v1", "http://[::1]:80/v1"),
        ],
    )
    def test_the_base_is_found(self, given_url: str, base: str) -> None:
        assert base_url(given_url) == base

    @pytest.mark.parametrize(
        "url",
        [
            "http://user:hunter2@h/v1", "http://hunter2@h/v1", "user:hunter2@h:80", "http://h/v1?key=hunter2",
            "http://h/v1#hunter2", "http://a:hunter2@h:99999/", "http://a:hunter2@[/v1",
        ],
    )  # fmt: skip
    def test_a_url_with_a_secret_is_refused_without_telling_it(self, url: str) -> None:
        with pytest.raises(UserError) as refusal:
            base_url(url)
        assert "hunter2" not in str(refusal.value)

    @pytest.mark.parametrize(
        "url", ["", "ftp://h/v1", "http://", "http://h:x/v1", "http://h:0/v1", "file:///etc"]
    )
    def test_what_is_no_url_is_refused(self, url: str) -> None:
        with pytest.raises(UserError, match="give one like http"):
            base_url(url)

    def test_a_key_must_fit_into_a_header(self) -> None:
        assert (check_key("sk-1"), check_key(None), check_key(" ")) == ("sk-1", None, None)
        for key in ("a b", "a\nb", "ä"):
            with pytest.raises(UserError, match="printable ASCII"):
                check_key(key)


class TestPrompts:
    TEXTS = tuple(f"Sentence number {i} has a few words. It goes on {i} times!" for i in range(60))

    def test_they_have_the_asked_length_and_differ_from_their_first_sentence_on(self) -> None:
        drawn = TextPrompts(self.TEXTS, 300, seed=1).draw(40, "a")
        assert {len(prompt.split()) for prompt in drawn} == {250}  # five words to six tokens
        assert max(Counter(prompt[:60] for prompt in drawn).values()) <= 2

    def test_the_seed_and_the_key_decide(self) -> None:
        one = TextPrompts(self.TEXTS, 50, seed=1)
        assert one.draw(5, "a") == TextPrompts(self.TEXTS, 50, seed=1).draw(5, "a")
        assert one.draw(5, "a") != one.draw(5, "b")
        assert one.draw(5, "a") != TextPrompts(self.TEXTS, 50, seed=2).draw(5, "a")

    def test_the_text_that_ships_is_enough(self) -> None:
        from cusprun.corpus import read_pack

        texts = [str(row.fields["text"]) for row in read_pack("general/en")]
        drawn = TextPrompts(texts, 256, seed=0).draw(500, "a")
        assert len({prompt[:80] for prompt in drawn}) > 250

    def test_given_ones_are_all_used_before_one_is_repeated(self) -> None:
        drawn = GivenPrompts(["a", "b", "c"], seed=1).draw(7, "k")
        assert sorted(drawn[:3]) == sorted(drawn[3:6]) == ["a", "b", "c"]
        for none in (lambda: GivenPrompts([], 1), lambda: TextPrompts([" "], 5, 1)):
            with pytest.raises(CorpusError):
                none()


class TestTokenizer:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {f"w{i}": i for i in range(9)} | {"[UNK]": 9}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # a full stop is a token
        tokenizer.enable_truncation(2)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    def test_it_counts_and_cuts(self, folder: Path) -> None:
        for place in (folder, folder / "tokenizer.json"):
            tokens = load_tokens(place)
            assert tokens.count("w1 w2 w3 x") == 4
            assert tokens.cut("w1 w2 w3", 2) == "w1 w2"
            assert tokens.cut("w1  w2", 5) == "w1  w2"

    def test_prompts_are_as_long_as_asked(self, folder: Path) -> None:
        tokens = load_tokens(folder)
        drawn = TextPrompts(["w1 w2 w3. w4 w5."], 7, 1, tokens.cut).draw(5, "a")
        assert {tokens.count(prompt) for prompt in drawn} == {7}

    def test_what_is_none_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            load_tokens(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(ModelError, match="no tokenizer that can be read"):
            load_tokens(tmp_path)


class TestSummary:
    def test_only_requests_that_ended_well_are_timed_and_all_are_counted(self) -> None:
        summary = summarise([OK, STALLED, replace(OK, time_to_first_token_ms=300.0)], 4.0, 5, LoadOptions())
        assert (summary.requests, summary.ok, summary.unsent, summary.failures) == (3, 2, 2, {"stalled": 1})
        assert (summary.requests_per_second, summary.output_tokens_per_second) == (0.5, 1.5)
        assert summary.time_to_first_token_ms is not None
        assert summary.time_to_first_token_ms.p50 == 200
        assert summary.inter_token_latency_ms is not None
        assert summary.inter_token_latency_ms.p50 == 15
        assert (summary.mean_prompt_tokens, summary.mean_output_tokens) == (50, 3)

    def test_token_rates_are_absent_when_a_count_is_unknown(self) -> None:
        unknown = replace(OK, output_tokens=None, tokens_from=None, time_per_output_token_ms=None)
        summary = summarise([OK, unknown], 4.0, 2, LoadOptions(goodput_tpot_ms=20.0))
        assert summary.output_tokens_per_second is None
        assert summary.goodput_per_second is None
        assert summary.requests_per_second == 0.5

    def test_a_level_in_which_all_failed_is_a_row_too(self) -> None:
        summary = summarise([STALLED], 60.0, 9, LoadOptions(goodput_ttft_ms=1.0))
        assert (summary.ok, summary.requests_per_second, summary.goodput_per_second) == (0, 0, 0)
        assert summary.time_to_first_token_ms is None
        assert summary.mean_output_tokens is None

    @given(
        st.lists(st.tuples(st.floats(1, 500), st.floats(1, 50) | st.none()), min_size=1, max_size=12),
        st.floats(1, 500) | st.none(),
        st.floats(1, 50) | st.none(),
    )
    def test_goodput_counts_those_within_every_target(
        self, times: list[tuple[float, float | None]], ttft_ms: float | None, tpot_ms: float | None
    ) -> None:
        records = [
            replace(
                OK, time_to_first_token_ms=ttft, time_per_output_token_ms=tpot, output_tokens=9 if tpot else 1
            )
            for ttft, tpot in times
        ]
        met = 0
        for ttft, tpot in times:
            if ttft_ms is not None and ttft > ttft_ms:
                continue
            if tpot_ms is not None and tpot is not None and tpot > tpot_ms:
                continue
            met += 1
        options = LoadOptions(goodput_ttft_ms=ttft_ms, goodput_tpot_ms=tpot_ms)
        assert count_met(records, options) == (None if ttft_ms is None and tpot_ms is None else met)

    def test_rounds_are_taken_together(self) -> None:
        (result,) = level_results(
            [run_of(0, 0, [OK] * 3), run_of(0, 1, [OK, STALLED])], LoadOptions(requests=3)
        )
        assert (result.summary.requests, result.summary.ok, result.summary.duration_s) == (5, 4, 4.0)


class TestComparison:
    @staticmethod
    def scaled(factor: float) -> RequestRecord:
        return replace(OK, time_to_first_token_ms=100.0 * factor)

    def compared(self, factors: list[float]) -> Any:
        runs = [run_of(0, number, [OK] * 2) for number in range(len(factors))]
        runs += [run_of(1, number, [self.scaled(factor)] * 2) for number, factor in enumerate(factors)]
        found = compare_endpoints(runs, 2, seed=0)
        return next(entry for entry in found if entry.metric == "time_to_first_token_p50_ms")

    @pytest.mark.parametrize(
        ("factors", "verdict"),
        [
            ([1.2, 1.21, 1.19, 1.2, 1.22, 1.2] * 2, "slower"),
            ([0.8, 0.81, 0.79, 0.8, 0.82, 0.8] * 2, "faster"),
            ([0.9, 1.1, 1.0, 0.95, 1.05, 1.0] * 2, "no difference shown"),
            # Of six pairs the interval leaves out 1, but one of fourteen metrics does so by chance, too.
            ([1.2, 1.21, 1.19, 1.2, 1.22, 1.2], "too few pairs to tell"),
        ],
    )
    def test_ratios_are_formed_pair_by_pair(self, factors: list[float], verdict: str) -> None:
        entry = self.compared(factors)
        assert entry.verdict == verdict
        assert entry.num_pairs == len(factors)
        assert entry.ratio.low <= sorted(factors)[len(factors) // 2] <= entry.ratio.high

    def test_an_endpoint_against_itself_shows_no_difference(self) -> None:
        """In 19 of 20 load tests at least, none of any latency."""
        draws = random.Random(0)
        latencies = [metric for metric in METRICS if metric.name.endswith("_p50_ms")]

        def noisy() -> RequestRecord:
            times = [value * draws.lognormvariate(0, 0.1) for value in (100.0, 10.0, 20.0, 15.0, 140.0)]
            return replace(
                OK, time_to_first_token_ms=times[0], inter_token_latencies_ms=(times[1], times[2]),
                time_per_output_token_ms=times[3], end_to_end_latency_ms=times[4],
            )  # fmt: skip

        def tells_something() -> bool:
            runs = [run_of(place, n, [noisy(), noisy()]) for n in range(12) for place in (0, 1)]
            found = compare_endpoints(runs, 2, seed=0, metrics=latencies)
            return any(entry.verdict in ("faster", "slower") for entry in found)

        assert sum(tells_something() for _ in range(20)) <= 1

    def test_no_goodput_is_in_no_ratio(self) -> None:
        """Leaving out what the first has none of, but not the other way round, would favour the first."""
        good = LoadOptions(requests=1, goodput_ttft_ms=200.0)
        slow = replace(OK, time_to_first_token_ms=300.0)
        for pair in ((OK, slow), (slow, OK)):
            runs = [
                LevelRun(place, Level("concurrency", 1.0), n, 2.0, (one,), summarise([one], 2.0, 1, good))
                for n in range(3) for place, one in enumerate(pair)
            ]  # fmt: skip
            (found,) = (e for e in compare_endpoints(runs, 2, 0) if e.metric == "goodput_per_second")
            assert (found.num_pairs, found.ratio) == (0, None)

    def test_a_run_with_a_failure_is_in_no_pair(self) -> None:
        runs = [run_of(0, 0, [OK]), run_of(1, 0, [STALLED]), run_of(0, 1, [OK]), run_of(1, 1, [OK])]
        assert {entry.num_pairs for entry in compare_endpoints(runs, 2, 0) if entry.ratio} == {1}
        (lost, *_) = compare_endpoints(runs[:2], 2, 0)
        assert (lost.num_pairs, lost.ratio) == (0, None)

    def test_levels_are_compared_together_and_alone(self) -> None:
        runs = [run_of(e, r, [OK], level) for e in range(2) for r in range(3) for level in (1.0, 2.0)]
        found = [e for e in compare_endpoints(runs, 2, 0) if e.metric == "requests_per_second"]
        assert [(e.level and e.level.value, e.num_pairs) for e in found] == [(None, 6), (1.0, 3), (2.0, 3)]


def report_of(runs: list[LevelRun], **changes: Any) -> EndpointReport:
    options = LoadOptions(concurrency=(2,), requests=2, **changes)
    endpoints = tuple(
        Endpoint(f"http://h:{place}/v1", f"m|{place}", "chat", asks_usage=True, ignores_eos=place == 0)
        for place in range(1 + max(run.endpoint for run in runs))
    )
    return EndpointReport(
        created="2025-01-01T00:00:00+00:00",
        options=options,
        prompts="pack general/en",
        tokenizer=None,
        client={"aiohttp": "1"},
        endpoints=endpoints,
        runs=tuple(runs),
        results=level_results(runs, options),
        comparisons=compare_endpoints(runs, len(endpoints), 0),
        elapsed_s=1.0,
    )


REPORT = report_of(
    [run_of(0, 0, [OK, STALLED]), run_of(1, 0, [OK, OK]), run_of(0, 1, [OK, OK]), run_of(1, 1, [OK, OK])],
    goodput_ttft_ms=200.0,
)


class TestReport:
    def test_it_goes_to_json_and_back(self) -> None:
        assert from_plain(EndpointReport, json.loads(json_bytes(REPORT))) == REPORT

    def test_another_schema_is_refused(self) -> None:
        with pytest.raises(UserError, match="schema_version is 2"):
            from_plain(EndpointReport, {**to_plain(REPORT), "schema_version": 2})

    def test_it_counts_what_failed(self) -> None:
        assert (REPORT.num_failed, REPORT.num_requests) == (1, 8)

    def test_the_tables_say_what_happened(self) -> None:
        text = to_text(load_tables(REPORT))
        assert "3 ok, 1 stalled" in text
        assert "A, 2 at once: 1 stalled: no event for 60 s, after 0 events." in text
        assert "B against A" in text
        assert "B does not take ignore_eos" in text
        assert "A does not take" not in text
        assert "good/s" in text

    def test_the_tables_as_markdown_have_as_many_cells_in_every_row(self) -> None:
        for block in to_markdown(load_tables(REPORT)).split("\n\n"):
            rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
            assert len({row.count("|") for row in rows}) <= 1

    def test_what_a_reader_must_know(self) -> None:
        bundled = replace(OK, output_tokens=30)
        late = replace(OK, lateness_ms=80.0)
        unknown = replace(OK, output_tokens=None, tokens_from=None)
        counted = replace(OK, tokens_from="tokenizer")

        def text(*requests: RequestRecord, **changes: Any) -> str:
            report = report_of([run_of(0, 0, list(requests))])
            return to_text(load_tables(replace(report, **changes)))

        assert "an event with text holds up to 10.0 tokens on average" in text(bundled, bundled)
        assert "the client itself was the bottleneck" in text(late, late)
        assert "does not state how many tokens" in text(unknown, unknown)
        assert "tokens counted by t.json" in text(counted, counted, tokenizer="t.json")
        assert "was interrupted" in text(OK, OK, is_complete=False)
        assert "bottleneck" not in text(OK, OK)
        assert "prompts of about 256 tokens from pack general/en" in text(OK, OK)
        assert "prompts from mine.jsonl" in text(OK, OK, prompts="mine.jsonl")

    def test_an_endpoint_that_only_failed_has_its_row(self) -> None:
        report = report_of([run_of(0, 0, [STALLED] * 2), run_of(1, 0, [OK] * 2)])
        text = to_text(load_tables(report))
        assert "0 ok, 2 stalled" in text
        assert "No pair of runs is without failed requests." in text


def test_metrics_have_unique_names_that_read_a_summary() -> None:
    summary = run_of(0, 0, [OK] * 2).summary
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    values = {metric.name: metric.read(summary) for metric in METRICS}
    assert [name for name, value in values.items() if value is None] == ["goodput_per_second"]
    assert values["end_to_end_latency_p99_ms"] == 140


def test_statuses_are_those_that_the_page_explains() -> None:
    page = (Path(__file__).parents[2] / "docs" / "load-test.md").read_text(encoding="utf-8")
    for status in STATUSES:
        assert f"`{status}`" in page
