"""``overlap`` and ``sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import ConsoleProgress, stdout
from cusprun.cli.options import (
    DeviceName,
    ExpertFile,
    JsonFile,
    Model,
    Refit,
    RefitTarget,
    RuleName,
    Targets,
    Units,
    Weights,
    parse_weights,
    refuse_existing_json,
    refuse_same,
    split_list,
    write_json,
)
from cusprun.walk.device import DEFAULT_DEVICE


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
    report = run(stores, ratio=ratio, rule=rule, plot=plot, progress=ConsoleProgress())
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
    keep: Annotated[bool, typer.Option("--keep", help="Keep every expert in the folder.")] = False,
    device: DeviceName = DEFAULT_DEVICE,
) -> None:
    """Show how quality falls with size: score once, then make and measure an expert of each ratio."""
    from cusprun.cli.tables import sweep_tables
    from cusprun.pipeline.sweep import sweep as run

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
        keep=keep,
        device=device,
        progress=ConsoleProgress(),
    )
    console = stdout()
    for table in sweep_tables(report):
        console.print(table)
    typer.echo(f"wrote {out}")


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
