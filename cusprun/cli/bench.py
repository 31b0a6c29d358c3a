"""``bench``: two models side by side, or endpoints under load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cusprun.cli import load_test as load
from cusprun.cli.console import shown_progress, stdout
from cusprun.cli.options import JsonFile, parse_counts, refuse_existing_json, split_list, write_json
from cusprun.errors import MeasurementError, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from serve.bench.records import BenchReport

_DEFAULT_TOKENS = "128,512"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("bench")(bench)


def bench(
    before: Annotated[
        str | None, typer.Option(help="Folder, hub id, GGUF file or artifact.", show_default=False)
    ] = None,
    after: Annotated[str | None, typer.Option(help="The same, of the expert.", show_default=False)] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            help="llamacpp (default), onnx, vllm, torch; repeat or separate by commas.", show_default=False
        ),
    ] = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[FORMAT:]PRECISION",
            help="Precision that models are exported in first, such as q8_0 or onnx:int4 (the defaults).",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="Prompt lengths; 128,512 by default.", show_default=False),
    ] = None,
    context_depth: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Tokens in the cache where decoding is measured; 128,512 by default.",
            show_default=False,
        ),
    ] = None,
    decode_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens decoded one by one at each depth; 64 by default.", show_default=False),
    ] = None,
    pairs: Annotated[
        int | None,
        typer.Option(help="Runs of each model; as many as are needed by default.", show_default=False),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            help="Measure until the ratios of speeds are known within this share; 0.02 by default.",
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds of a runtime after which no further pair is begun; by default 120 (llamacpp) to "
            "1200 (vllm).",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads; the physical cores by default.", show_default=False)
    ] = None,
    endpoint: load.Endpoints = None,
    concurrency: load.Concurrency = None,
    rate: load.Rate = None,
    requests: load.Requests = None,
    output_tokens: load.OutputTokens = None,
    rounds: load.Rounds = None,
    warmup: load.Warmup = None,
    prompts: load.PromptFile = None,
    tokenizer: load.TokenizerPath = None,
    model: load.ModelName = None,
    chat: load.Route = None,
    api_key: load.ApiKey = None,
    stall: load.Stall = None,
    request_limit: load.RequestLimit = None,
    goodput_ttft_ms: load.GoodputTtft = None,
    goodput_tpot_ms: load.GoodputTpot = None,
    json: JsonFile = None,
) -> None:
    """Measure two models side by side, or put load on endpoints: latency, speed, memory, energy."""
    of_models = {
        "before": before, "after": after, "runtime": runtime, "quant": quant, "context_depth": context_depth,
        "decode_tokens": decode_tokens, "pairs": pairs, "precision": precision, "time_limit": time_limit,
        "threads": threads,
    }  # fmt: skip
    of_endpoints = {
        "concurrency": concurrency, "rate": rate, "requests": requests, "output_tokens": output_tokens,
        "rounds": rounds, "warmup": warmup, "prompts": prompts, "tokenizer": tokenizer, "model": model,
        "chat": chat, "api_key": api_key, "stall": stall, "request_limit": request_limit,
        "goodput_ttft_ms": goodput_ttft_ms, "goodput_tpot_ms": goodput_tpot_ms,
    }  # fmt: skip
    if endpoint:
        _refuse(of_models, "measures two models, and --endpoint is given; leave one of them out")
        count = None if prompt_tokens is None else _one_count(prompt_tokens)
        load.run_load_test(endpoint, prompt_tokens=count, json=json, **of_endpoints)  # type: ignore[arg-type]
        return
    _refuse(of_endpoints, "is for a load test; name the --endpoint")
    if before is None or after is None:
        raise UserError("bench wants two models, --before and --after, or an --endpoint to load")
    _bench_models(prompt_tokens, json, **of_models)


def _refuse(options: Mapping[str, Any], reason: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} {reason}")


def _one_count(text: str) -> int:
    counts = parse_counts(text, "--prompt-tokens")
    if len(counts) != 1:
        raise UserError(f"--prompt-tokens must be one number for a load test, not {text!r}")
    return counts[0]


def _bench_models(prompt_tokens: str | None, json: Path | None, **given: Any) -> None:
    """Measure, write, show; what was not given has its default."""
    from cusprun.cli.tables import bench_tables
    from cusprun.pipeline.bench import DEFAULT_RUNTIMES, parse_quants
    from cusprun.pipeline.bench import bench as run
    from serve.bench.records import BenchOptions

    refuse_existing_json(json)
    default = BenchOptions()
    options = BenchOptions(
        prompt_lengths=parse_counts(prompt_tokens or _DEFAULT_TOKENS, "--prompt-tokens"),
        context_depths=parse_counts(given["context_depth"] or _DEFAULT_TOKENS, "--context-depth"),
        num_decode_tokens=_or(given["decode_tokens"], default.num_decode_tokens),
        num_pairs=given["pairs"],
        precision=_or(given["precision"], default.precision),
        time_limit_s=given["time_limit"],
        num_threads=given["threads"],
    )
    report = run(
        given["before"],
        given["after"],
        runtimes=split_list(given["runtime"]) or DEFAULT_RUNTIMES,
        quants=parse_quants(split_list(given["quant"])),
        options=options,
        progress=shown_progress(),
    )
    write_json(report, json)
    console = stdout()
    for table in bench_tables(report):
        console.print(table)
    require_all_measured(report)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def require_all_measured(report: BenchReport) -> None:
    """Raise ``MeasurementError`` when a runtime was not measured to the end; the tables have said why."""
    kinds = {
        "not measured": [suite.runtime for suite in report.suites if suite.failure is not None],
        "not measured to the end": [suite.runtime for suite in report.suites if suite.given_up],
    }
    failed = "; ".join(f"{words}: {', '.join(names)}" for words, names in kinds.items() if names)
    if failed:
        raise MeasurementError(f"{failed}; the notes say why")
