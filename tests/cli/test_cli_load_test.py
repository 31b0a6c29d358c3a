"""``bench --endpoint`` as a command runs it: tables, the report's file, exit codes, the key."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import typer
from http_endpoint import KEY, http_endpoint

from cusprun.cli import load_test as command
from cusprun.cli.load_test import run_load_test
from cusprun.codec import load_json
from cusprun.errors import MeasurementError, OutputError, UserError
from serve.bench.endpoint.records import EndpointReport, LoadOptions

QUICK: dict[str, Any] = {"concurrency": ["1,2"], "requests": 2, "output_tokens": 5, "warmup": 0}


def test_tables_are_printed_and_the_report_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSPRUN_API_KEY", f"{KEY}\nother")
    path = tmp_path / "report.json"
    with http_endpoint() as endpoint:
        run_load_test([endpoint.url], **QUICK, json=path)
        assert {headers["Authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}
        with pytest.raises(OutputError, match="exists already"):
            run_load_test([endpoint.url], **QUICK, json=path)
    shown = capsys.readouterr()
    assert "good at http://127.0.0.1" in shown.out
    assert "2 ok" in shown.out
    report = load_json(EndpointReport, path)
    assert report.num_failed == 0
    assert KEY not in shown.out + shown.err + path.read_text(encoding="utf-8")


def test_a_failure_is_exit_code_3_after_everything_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    with (
        http_endpoint() as endpoint,
        pytest.raises(MeasurementError, match="4 of 4 requests failed") as failure,
    ):
        run_load_test([endpoint.url], **QUICK, model="zero_usage", json=path)
    assert failure.value.exit_code == 3
    assert "2 wrong_usage" in capsys.readouterr().out
    assert json.loads(path.read_text(encoding="utf-8"))["runs"][0]["summary"]["failures"] == {
        "wrong_usage": 2
    }


def test_an_interrupt_is_passed_on_after_everything_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from cusprun.pipeline import load_test as pipeline

    whole = pipeline.load_test
    monkeypatch.setattr(
        pipeline, "load_test", lambda *given, **named: replace(whole(*given, **named), is_complete=False)
    )
    path = tmp_path / "report.json"
    with http_endpoint() as endpoint, pytest.raises(KeyboardInterrupt):
        run_load_test([endpoint.url], **QUICK, json=path)
    assert not load_json(EndpointReport, path).is_complete


def test_a_key_of_the_command_line_is_hidden_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[tuple[str, ...]] = []
    monkeypatch.setattr(command, "hide_keys", hidden.append)
    with pytest.raises(UserError, match="no http or https URL"):
        run_load_test(["ftp://h"], api_key=KEY)
    assert hidden == [(KEY,)]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"concurrency": ["1,x"]}, "--concurrency takes whole numbers like 1,2,4, not 'x'"),
        ({"rate": ["fast"]}, "--rate takes numbers like 1,2,4, not 'fast'"),
        ({"rate": ["1"], "concurrency": ["1"]}, "cannot both be given"),
        ({"chat": False, "requests": 0}, "requests must be at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        run_load_test(["http://127.0.0.1:1"], **options)


def test_every_option_of_the_command_line_reaches_the_report(tmp_path: Path) -> None:
    app = typer.Typer()

    @app.command()
    def bench(
        endpoint: command.Endpoints = None,
        concurrency: command.Concurrency = None,
        rate: command.Rate = None,
        requests: command.Requests = None,
        prompt_tokens: int | None = None,
        output_tokens: command.OutputTokens = None,
        rounds: command.Rounds = None,
        warmup: command.Warmup = None,
        prompts: command.PromptFile = None,
        tokenizer: command.TokenizerPath = None,
        model: command.ModelName = None,
        chat: command.Route = None,
        api_key: command.ApiKey = None,
        stall: command.Stall = None,
        request_limit: command.RequestLimit = None,
        goodput_ttft_ms: command.GoodputTtft = None,
        goodput_tpot_ms: command.GoodputTpot = None,
        seed: int | None = None,
        json: Path | None = None,
    ) -> None:
        given = locals()
        run_load_test(
            **{name: value for name, value in given.items() if name not in ("endpoint", "app")},
            endpoints=endpoint or (),
        )

    prompts, report = tmp_path / "mine.jsonl", tmp_path / "report.json"
    prompts.write_text('{"prompt": "Why?"}\n', encoding="utf-8")
    with http_endpoint() as endpoint:
        words = [
            "--endpoint", endpoint.url, "--rate", "200,300", "--rate", "400", "--requests", "2",
            "--output-tokens", "3", "--rounds", "2", "--warmup", "1",
            "--model", "good", "--completions", "--stall", "20", "--request-limit", "30",
            "--goodput-ttft-ms", "5000", "--goodput-tpot-ms", "4000", "--seed", "5", "--json", str(report),
        ]  # fmt: skip
        call = typer.main.get_command(app).main
        made, given = ["--prompt-tokens", "9"], ["--prompts", str(prompts)]
        with pytest.raises(UserError, match="--prompts gives some"):
            call([*words, *made, *given], standalone_mode=False)
        call([*words, *given], standalone_mode=False)
        assert load_json(EndpointReport, report).prompts == "mine.jsonl"
        assert {body["prompt"] for body in endpoint.bodies[-8:]} == {"Why?"}
        report.unlink()
        call([*words, *made], standalone_mode=False)
    options = load_json(EndpointReport, report).options
    assert options == LoadOptions(
        rates=(200.0, 300.0, 400.0), requests=2, prompt_tokens=9, output_tokens=3, rounds=2, warmup=1,
        route="completions", model="good", stall_s=20.0, request_limit_s=30.0, goodput_ttft_ms=5000.0,
        goodput_tpot_ms=4000.0, seed=5,
    )  # fmt: skip
