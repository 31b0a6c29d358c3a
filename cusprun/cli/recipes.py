"""``run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import shown_progress, stdout
from cusprun.cli.options import JsonFlag, Memory, WorkDir, print_json


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("run")(run_recipe)


def run_recipe(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
    device: Annotated[
        str | None,
        typer.Option(help="Where models run, instead of the recipe's 'device'.", show_default=False),
    ] = None,
    memory: Memory = None,
    workdir: WorkDir = None,
    json: JsonFlag = False,
) -> None:
    """Run a recipe: from a model to a measured expert, with one table at the end."""
    from cusprun.cli.bench import require_all_measured
    from cusprun.cli.tables import row_table
    from cusprun.pipeline.run import run

    report = run(recipe, device=device, memory=memory, workdir=workdir, progress=shown_progress())
    if json:
        print_json(report)
    else:
        stdout().print(row_table(report.table, title=f"{report.source} → {report.expert}"))
    if report.bench is not None:
        require_all_measured(report.bench)
