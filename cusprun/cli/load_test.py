"""``bench --endpoint``: what the command does when endpoints are given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cusprun.cli.console import shown_progress, stdout
from cusprun.cli.keys import KEY_VARIABLE, hide_keys
from cusprun.cli.options import refuse_existing_json, split_list, write_json
from cusprun.errors import MeasurementError, UserError

if TYPE_CHECKING:
    from serve.bench.endpoint.records import EndpointReport
    from serve.bench.endpoint.table import LoadTable


Endpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Load this OpenAI-compatible endpoint instead; repeat to compare others with the first.",
        show_default=False,
    ),
]
Concurrency = Annotated[
    list[str] | None,
    typer.Option(help="Endpoint: requests under way at once, like 1,2,4,8 (default).", show_default=False),
]
Rate = Annotated[
    list[str] | None,
    typer.Option(help="Endpoint: requests begun per second, like 0.5,1,2.", show_default=False),
]
Requests = Annotated[
    int | None, typer.Option(help="Endpoint: requests of each level; 32 by default.", show_default=False)
]
OutputTokens = Annotated[
    int | None,
    typer.Option(help="Endpoint: most tokens of an answer; 128 by default.", show_default=False),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        help="Endpoint: how often all levels are run; 1 by default, 3 for several endpoints.",
        show_default=False,
    ),
]
Warmup = Annotated[
    int | None,
    typer.Option(help="Endpoint: requests before, which do not count; 4 by default.", show_default=False),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE.jsonl",
        help="Endpoint: send these, one object with a prompt or text a line.",
        show_default=False,
    ),
]
TokenizerPath = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="DIR|FILE",
        help="Endpoint: its tokenizer.json, for exact prompts and for tokens that it does not count.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Endpoint: its model; the first it lists by default.", show_default=False),
]
Route = Annotated[
    bool | None,
    typer.Option(
        "--chat/--completions", help="Endpoint: route; the chat where it works.", show_default=False
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(help=f"Endpoint: its key; ${KEY_VARIABLE} leaves no trace.", show_default=False),
]
Stall = Annotated[
    float | None,
    typer.Option(
        help="Endpoint: seconds without an event that end a request; 60 by default.", show_default=False
    ),
]
RequestLimit = Annotated[
    float | None,
    typer.Option(help="Endpoint: seconds that a request may take; 600 by default.", show_default=False),
]
GoodputTtft = Annotated[
    float | None,
    typer.Option(
        "--goodput-ttft-ms",
        help="Endpoint: a request is good with a time to first token of at most this.",
        show_default=False,
    ),
]
GoodputTpot = Annotated[
    float | None,
    typer.Option(
        "--goodput-tpot-ms",
        help="Endpoint: a request is good with a time per output token of at most this.",
        show_default=False,
    ),
]


def run_load_test(
    endpoints: Sequence[str],
    *,
    concurrency: Sequence[str] | None = None,
    rate: Sequence[str] | None = None,
    requests: int | None = None,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    rounds: int | None = None,
    warmup: int | None = None,
    prompts: Path | None = None,
    tokenizer: Path | None = None,
    model: str | None = None,
    chat: bool | None = None,
    api_key: str | None = None,
    stall: float | None = None,
    request_limit: float | None = None,
    goodput_ttft_ms: float | None = None,
    goodput_tpot_ms: float | None = None,
    seed: int | None = None,
    json: Path | None = None,
) -> None:
    """Load endpoints, print the tables and write the report; ``None`` stands for an option's default.

    Raises:
        MeasurementError: a request failed; the report was written and printed before.
        KeyboardInterrupt: the load test was interrupted; what had ended was written and printed before.
    """
    from cusprun.pipeline.load_test import load_test
    from serve.bench.endpoint.records import CHAT, COMPLETIONS, LoadOptions
    from serve.bench.endpoint.table import load_tables

    key = _key(api_key)
    if api_key is not None and key is not None:
        hide_keys((key,))
    refuse_existing_json(json)
    if prompts is not None and prompt_tokens is not None:
        raise UserError(
            "--prompt-tokens is for prompts that are made, and --prompts gives some; leave one out"
        )
    given: dict[str, Any] = {
        "concurrency": _numbers(concurrency, int, "concurrency"),
        "rates": _numbers(rate, float, "rate"),
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "rounds": rounds,
        "warmup": warmup,
        "stall_s": stall,
        "request_limit_s": request_limit,
        "route": None if chat is None else CHAT if chat else COMPLETIONS,
        "model": model,
        "goodput_ttft_ms": goodput_ttft_ms,
        "goodput_tpot_ms": goodput_tpot_ms,
        "seed": seed,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    options = replace(LoadOptions(), **changes)
    report = load_test(
        endpoints, options, shown_progress(), api_key=key, prompts=prompts, tokenizer=tokenizer
    )
    write_json(report, json)
    _show(load_tables(report))
    _raise_unless_sound(report)


def _key(given: str | None) -> str | None:
    """Return the key of the option, else the first of the environment."""
    stated = os.environ.get(KEY_VARIABLE, "").splitlines()
    return given if given is not None else next(iter(stated), None)


def _numbers(texts: Sequence[str] | None, kind: type, name: str) -> tuple[int | float, ...] | None:
    """Return the numbers of an option that may be repeated and hold comma lists; None where there is none."""
    found = []
    for text in split_list(texts):
        try:
            found.append(kind(text))
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise UserError(f"--{name} takes {what} like 1,2,4, not {text!r:.40}") from None
    return tuple(found) or None


def _show(tables: Sequence[LoadTable]) -> None:
    from rich.text import Text

    from cusprun.cli.tables import make_table

    console = stdout()
    for table in tables:
        console.print(make_table(table.title, table.columns, table.rows))
        for note in table.notes:
            console.print(Text(note))


def _raise_unless_sound(report: EndpointReport) -> None:
    if not report.is_complete:
        raise KeyboardInterrupt
    if report.num_failed:
        raise MeasurementError(
            f"{report.num_failed} of {report.num_requests} requests failed; the rows say how, and "
            "--json keeps each of them"
        )
