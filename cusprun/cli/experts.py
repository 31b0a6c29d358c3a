"""``score``, ``plan``, ``prune`` and ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import shown_progress, stdout
from cusprun.cli.estimates import refuse_several, refuse_unknowable, show_estimate
from cusprun.cli.options import (
    DeviceName,
    DtypeName,
    ExpertFile,
    JsonFile,
    Memory,
    Model,
    Processes,
    Ratio,
    Refit,
    RefitTarget,
    RuleName,
    TargetBytes,
    TargetParams,
    Targets,
    Units,
    Weights,
    WorkDir,
    parse_count,
    parse_share,
    parse_size,
    parse_weights,
    refuse_existing_json,
    split_list,
    write_json,
)
from cusprun.cli.several import share_work
from cusprun.cli.shared import ranks_of
from cusprun.errors import UserError
from cusprun.walk.device import DEFAULT_DEVICE, DEFAULT_DTYPE

ScorePaths = Annotated[
    list[str] | None,
    typer.Option(
        "--scores",
        metavar="STORE",
        help="Store that `cusprun score` wrote; repeat or separate by commas to join several.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("score")(score)
    app.command("plan")(plan)
    app.command("prune")(prune)
    app.command("eval")(evaluate)


def score(
    context: typer.Context,
    model: Model,
    expert: ExpertFile,
    out: Annotated[Path, typer.Option(help="Store to write.", show_default=False)],
    granularity: Annotated[
        str, typer.Option(help="unit (FFN channels, heads, blocks) or neuron (rows and columns).")
    ] = "unit",
    device: DeviceName = DEFAULT_DEVICE,
    dtype: DtypeName = DEFAULT_DTYPE,
    memory: Memory = None,
    workdir: WorkDir = None,
    processes: Processes = 1,
) -> None:
    """Score every unit of a model, or every single neuron, on an expert's documents."""
    from cusprun.pipeline.stages import score as run

    share_work(context, processes)
    made = run(
        model,
        expert,
        out,
        granularity=granularity,
        device=device,
        dtype=dtype,
        memory=memory,
        workdir=workdir,
        ranks=ranks_of(context),
        progress=shown_progress(),
    )
    typer.echo(f"wrote {made}")


def plan(
    model: Model,
    scores: ScorePaths = None,
    ratio: Ratio = None,
    target_params: TargetParams = None,
    target_bytes: TargetBytes = None,
    targets: Targets = None,
    units: Units = None,
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
        target_params=parse_count(target_params),
        target_bytes=parse_size(target_bytes),
        targets=split_list(targets),
        units=split_list(units),
        rule=rule,
        out=out,
        progress=shown_progress(),
    )
    console = stdout()
    for table in plan_tables(made):
        console.print(table)
    if out is not None:
        typer.echo(f"wrote {out}")


def prune(
    context: typer.Context,
    model: Model,
    expert: ExpertFile,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)] = None,
    ratio: Ratio = None,
    target_params: TargetParams = None,
    target_bytes: TargetBytes = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="Budget: the largest cut whose perplexity on held-out documents is at most this above the "
            "original's, like 5%; makes and measures up to seven experts.",
            show_default=False,
        ),
    ] = None,
    scores: ScorePaths = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Apply this plan instead of making one.", show_default=False),
    ] = None,
    rule: RuleName = None,
    targets: Targets = None,
    units: Units = None,
    granularity: Annotated[
        str,
        typer.Option(help="unit removes whole units; neuron zeroes single neurons and keeps every shape."),
    ] = "unit",
    refit: Refit = True,
    weight: Weights = None,
    refit_target: RefitTarget = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Most bytes in one weight file, like 2GB.", show_default=False)
    ] = None,
    device: DeviceName = DEFAULT_DEVICE,
    dtype: DtypeName = DEFAULT_DTYPE,
    memory: Memory = None,
    workdir: WorkDir = None,
    processes: Processes = 1,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Say what it will take of time, memory and disk; write nothing."),
    ] = False,
    json: JsonFile = None,
) -> None:
    """Write the smaller model that an expert needs; scores and plans itself unless given both."""
    from cusprun.cli.tables import manifest_tables, neuron_tables
    from cusprun.pipeline.stages import prune as run
    from cusprun.records import Manifest

    if estimate:
        refuse_several(ranks_of(context))
        refuse_unknowable(
            {
                "--target-bytes": target_bytes,
                "--max-loss": max_loss,
                "--scores": scores,
                "--plan": plan_file,
                "--shard-size": shard_size,
                "--granularity": None if granularity == "unit" else granularity,
                "--processes": None if processes == 1 else processes,
            }
        )
        show_estimate(
            model,
            expert,
            json=json,
            ratio=ratio,
            target_params=parse_count(target_params),
            rule=rule,
            targets=split_list(targets),
            units=split_list(units),
            refit=refit,
            dimension_weights=parse_weights(weight),
            refit_target=refit_target,
            device=device,
            dtype=dtype,
            memory=memory,
            workdir=workdir,
        )
        return
    share_work(context, processes)
    if out is None:
        raise UserError("prune writes a folder; name it with --out")
    if json is not None:
        raise UserError("--json is for --estimate; what was pruned is told by cusprun.json in the folder")
    manifest = run(
        model,
        expert,
        out,
        ratio=ratio,
        target_params=parse_count(target_params),
        target_bytes=parse_size(target_bytes),
        max_loss=parse_share(max_loss),
        scores=split_list(scores) if scores else None,
        plan=plan_file,
        rule=rule,
        targets=split_list(targets),
        units=split_list(units),
        granularity=granularity,
        refit=refit,
        dimension_weights=parse_weights(weight),
        refit_target=refit_target,
        shard_bytes=parse_size(shard_size),
        device=device,
        dtype=dtype,
        memory=memory,
        workdir=workdir,
        ranks=ranks_of(context),
        progress=shown_progress(),
    )
    console = stdout()
    shown = manifest_tables(manifest) if isinstance(manifest, Manifest) else neuron_tables(manifest)
    for table in shown:
        console.print(table)
    typer.echo(f"wrote {out}")


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models; the first is the reference.", show_default=False),
    ],
    expert: ExpertFile,
    tasks: Annotated[
        Path | None,
        typer.Option("--tasks", help="Tasks to score too: TASKS.yaml, or one .jsonl.", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts that a task runs at one time. Default 8.", show_default=False)
    ] = None,
    device: DeviceName = DEFAULT_DEVICE,
    memory: Memory = None,
    workdir: WorkDir = None,
    json: JsonFile = None,
) -> None:
    """Measure perplexity on an expert's held-out documents and on general text, agreement, and tasks."""
    from cusprun.cli.tables import quality_tables
    from cusprun.pipeline.evaluation import evaluate as run

    refuse_existing_json(json)
    report = run(
        models,
        expert,
        tasks,
        batch_size=batch_size,
        device=device,
        memory=memory,
        workdir=workdir,
        progress=shown_progress(),
    )
    write_json(report, json)
    console = stdout()
    for table in quality_tables(report):
        console.print(table)
