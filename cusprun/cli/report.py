"""``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import shown_progress


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("report")(report)


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...",
            help="The folder of a run or a sweep, or JSON files that run, bench, eval, verify, sweep or "
            "overlap wrote.",
            show_default=False,
        ),
    ],
    out: Annotated[
        list[Path],
        typer.Option(help="FILE.html, FILE.md or FILE.json; repeat for several.", show_default=False),
    ],
) -> None:
    """Write one self-contained file that says whether to ship the expert, and why."""
    from cusprun.errors import MeasurementError
    from cusprun.pipeline.report import report as run

    try:
        run(results, out, progress=shown_progress())
    except MeasurementError:
        _tell(out)
        raise
    _tell(out)


def _tell(out: list[Path]) -> None:
    for path in out:
        typer.echo(f"wrote {path}")
