"""``score``, ``plan``, ``prune`` and ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import ConsoleProgress, stdout
from cusprun.cli.options import (
    ExpertFile,
    JsonFile,
    Model,
    RuleName,
    Targets,
    parse_size,
    refuse_existing_json,
    split_list,
    write_json,
)

_RATIO_HELP = "Share of the decoder blocks' attention and FFN parameters that goes, above 0 and at most 0.9."
ScorePaths = Annotated[
    list[str] | None,
    typer.Option(
        "--scores", metavar="STORE", help="Store of scores; repeat to join several.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("score")(score)
    app.command("plan")(plan)
    app.command("prune")(prune)
    app.command("eval")(evaluate)


def score(
    model: Model,
    expert: ExpertFile,
    out: Annotated[Path, typer.Option(help="Store to write.", show_default=False)],
) -> None:
    """Score every unit of a model on an expert's documents."""
    from cusprun.pipeline.stages import score as run

    typer.echo(f"wrote {run(model, expert, out, progress=ConsoleProgress())}")


def plan(
    model: Model,
    scores: ScorePaths = None,
    ratio: Annotated[float, typer.Option(help=_RATIO_HELP)] = 0.25,
    targets: Targets = None,
    rule: RuleName = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the plan to this JSON file, to edit or apply.", show_default=False),
    ] = None,
) -> None:
    """Choose from scores what survives, and say why."""
    from cusprun.cli.tables import plan_tables
    from cusprun.pipeline.stages import plan as run

    made = run(
        model,
        split_list(scores),
        ratio=ratio,
        targets=split_list(targets),
        rule=rule,
        out=out,
        progress=ConsoleProgress(),
    )
    console = stdout()
    for table in plan_tables(made):
        console.print(table)
    if out is not None:
        typer.echo(f"wrote {out}")


def prune(
    model: Model,
    expert: ExpertFile,
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    ratio: Annotated[
        float | None, typer.Option(help=f"{_RATIO_HELP} Default 0.25.", show_default=False)
    ] = None,
    scores: ScorePaths = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Apply this plan instead of making one.", show_default=False),
    ] = None,
    rule: RuleName = None,
    targets: Targets = None,
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="Refit by least squares.")] = True,
    shard_size: Annotated[
        str | None, typer.Option(help="Most bytes in one weight file, like 2GB.", show_default=False)
    ] = None,
) -> None:
    """Write the smaller model that an expert needs; scores and plans itself unless given both."""
    from cusprun.cli.tables import manifest_tables
    from cusprun.pipeline.stages import prune as run

    manifest = run(
        model,
        expert,
        out,
        ratio=ratio,
        scores=split_list(scores) or None,
        plan=plan_file,
        rule=rule,
        targets=split_list(targets),
        refit=refit,
        shard_bytes=parse_size(shard_size),
        progress=ConsoleProgress(),
    )
    console = stdout()
    for table in manifest_tables(manifest):
        console.print(table)
    typer.echo(f"wrote {out}")


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models; the first is the reference.", show_default=False),
    ],
    expert: ExpertFile,
    json: JsonFile = None,
) -> None:
    """Measure perplexity on an expert's held-out documents and on general text, and agreement."""
    from cusprun.cli.tables import quality_tables
    from cusprun.pipeline.evaluation import evaluate as run

    refuse_existing_json(json)
    report = run(models, expert, progress=ConsoleProgress())
    write_json(report, json)
    console = stdout()
    for table in quality_tables(report):
        console.print(table)
