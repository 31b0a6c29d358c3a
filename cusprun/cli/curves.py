"""``overlap`` and ``sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cusprun.cli.console import shown_progress, stdout
from cusprun.cli.options import (
    DeviceName,
    DtypeName,
    ExpertFile,
    JsonFile,
    Memory,
    Model,
    Refit,
    RefitTarget,
    RuleName,
    Targets,
    Units,
    Weights,
    WorkDir,
    parse_weights,
    refuse_existing_json,
    refuse_same,
    split_list,
    write_json,
)
from cusprun.walk.device import DEFAULT_DEVICE, DEFAULT_DTYPE

if TYPE_CHECKING:
    from cusprun.pipeline.frontier import SpeedOptions


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("overlap")(overlap)
    app.command("sweep")(sweep)


def overlap(
    stores: Annotated[
        list[str],
        typer.Argument(metavar="STORE...", help="Stores of scores of one model.", show_default=False),
    ],
    ratio: Annotated[float, typer.Option(help="Share of units to call irrelevant, between 0 and 1.")] = 0.25,
    rule: Annotated[str, typer.Option(help="How impacts become a choice.")] = "paper",
    json: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the overlap of each layer: FILE.png or FILE.svg.", show_default=False),
    ] = None,
) -> None:
    """Show how much the irrelevant units of languages, domains and tasks are the same, against chance."""
    from cusprun.cli.tables import overlap_tables
    from cusprun.pipeline.overlap import overlap as run

    refuse_existing_json(json)
    refuse_same(json, plot)
    report = run(stores, ratio=ratio, rule=rule, plot=plot, progress=shown_progress())
    write_json(report, json)
    console = stdout()
    for table in overlap_tables(report):
        console.print(table)


def sweep(
    model: Model,
    expert: ExpertFile,
    ratios: Annotated[
        list[str],
        typer.Option(
            metavar="RATIO",
            help="Shares of the blocks' attention and FFN parameters that go; repeat or separate by commas.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write the curve to, or to continue.", show_default=False)
    ],
    rule: RuleName = None,
    targets: Targets = None,
    units: Units = None,
    refit: Refit = True,
    weight: Weights = None,
    refit_target: RefitTarget = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT:PRECISION",
            help="Also export the original and every expert, like gguf:q4_k_m, onnx:int4 or vllm:bfloat16, "
            "and measure size, speed and quality of each; repeat or separate by commas.",
            show_default=False,
        ),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure the speed of exports.")] = True,
    time_limit: Annotated[
        float | None,
        typer.Option(help="Seconds for the speed of one export; 60 unless given.", show_default=False),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep every expert and export in the folder.")] = False,
    device: DeviceName = DEFAULT_DEVICE,
    dtype: DtypeName = DEFAULT_DTYPE,
    memory: Memory = None,
    workdir: WorkDir = None,
) -> None:
    """Show how quality falls with size, and with --export which sizes and precisions are worth their cost."""
    from cusprun.cli.tables import sweep_tables
    from cusprun.errors import MeasurementError
    from cusprun.pipeline.sweep import sweep as run

    exports = split_list(export)
    options = speed_options(exports, speed, time_limit)
    report = run(
        model,
        expert,
        parse_ratios(ratios),
        out,
        rule=rule,
        targets=split_list(targets),
        units=split_list(units),
        refit=refit,
        dimension_weights=parse_weights(weight),
        refit_target=refit_target,
        exports=exports,
        speed=options,
        keep=keep,
        device=device,
        dtype=dtype,
        memory=memory,
        workdir=workdir,
        progress=shown_progress(),
    )
    console = stdout()
    for table in sweep_tables(report):
        console.print(table)
    typer.echo(f"wrote {out}")
    if report.failures:
        names = ", ".join(point.name for point in report.failures)
        raise MeasurementError(
            f"{len(report.failures)} of {len(report.frontier)} exports failed ({names}), the others are "
            f"measured; {out / 'sweep.md'} says why, and the same command tries these again"
        )


def speed_options(exports: Sequence[str], speed: bool, time_limit: float | None) -> SpeedOptions | None:
    """Return how speeds are to be measured, None for not; ``UserError`` for a limit of nothing."""
    from cusprun.errors import UserError
    from cusprun.pipeline.frontier import SpeedOptions

    if time_limit is not None and not (exports and speed):
        what = "the speed is not to be measured" if exports else "none are asked for"
        raise UserError(f"--time-limit is for the speed of exports, and {what}; leave it out")
    if not speed:
        return None
    return SpeedOptions() if time_limit is None else SpeedOptions(time_limit_s=time_limit)


def parse_ratios(values: list[str]) -> tuple[float, ...]:
    """Return the numbers of a repeatable option that may also hold comma lists; ``UserError`` for others."""
    from cusprun.errors import UserError

    found = []
    for text in split_list(values):
        try:
            found.append(float(text))
        except ValueError:
            raise UserError(f"the ratio {text!r} is not a number; write for example 0.1,0.2,0.3") from None
    return tuple(found)
