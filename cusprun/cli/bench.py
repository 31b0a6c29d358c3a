"""``bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cusprun.cli.console import ConsoleProgress, stdout
from cusprun.cli.options import JsonFile, parse_counts, refuse_existing_json, split_list, write_json

if TYPE_CHECKING:
    from serve.bench.records import BenchReport


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("bench")(bench)


def bench(
    before: Annotated[str, typer.Option(help="Folder, hub id, GGUF file or artifact.", show_default=False)],
    after: Annotated[str, typer.Option(help="The same, of the expert.", show_default=False)],
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
    prompt_tokens: Annotated[str, typer.Option(metavar="N[,N...]", help="Prompt lengths.")] = "128,512",
    context_depth: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Tokens in the cache where decoding is measured.")
    ] = "128,512",
    decode_tokens: Annotated[int, typer.Option(help="Tokens decoded one by one at each depth.")] = 64,
    pairs: Annotated[
        int | None,
        typer.Option(help="Runs of each model; as many as are needed by default.", show_default=False),
    ] = None,
    precision: Annotated[
        float, typer.Option(help="Measure until the ratios of speeds are known within this share.")
    ] = 0.02,
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
    json: JsonFile = None,
) -> None:
    """Measure two models side by side: latency, speed, memory, energy, and what the machine allows."""
    from cusprun.cli.tables import bench_tables
    from cusprun.pipeline.bench import DEFAULT_RUNTIMES, parse_quants
    from cusprun.pipeline.bench import bench as run
    from serve.bench.records import BenchOptions

    refuse_existing_json(json)
    options = BenchOptions(
        prompt_lengths=parse_counts(prompt_tokens, "--prompt-tokens"),
        context_depths=parse_counts(context_depth, "--context-depth"),
        num_decode_tokens=decode_tokens,
        num_pairs=pairs,
        precision=precision,
        time_limit_s=time_limit,
        num_threads=threads,
    )
    report = run(
        before,
        after,
        runtimes=split_list(runtime) or DEFAULT_RUNTIMES,
        quants=parse_quants(split_list(quant)),
        options=options,
        progress=ConsoleProgress(),
    )
    write_json(report, json)
    console = stdout()
    for table in bench_tables(report):
        console.print(table)
    require_all_measured(report)


def require_all_measured(report: BenchReport) -> None:
    """Raise ``MeasurementError`` when a runtime could not be measured; the tables have said why."""
    from cusprun.errors import MeasurementError

    failed = ", ".join(suite.runtime for suite in report.suites if suite.failure is not None)
    if failed:
        raise MeasurementError(f"not measured: {failed}; the notes say why")
