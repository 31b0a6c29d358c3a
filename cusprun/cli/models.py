"""``import-gguf``, ``inspect`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import shown_progress, stdout
from cusprun.cli.options import JsonFlag, Model, print_json


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("import-gguf")(import_gguf)
    app.command("inspect")(inspect)
    app.command("doctor")(doctor)


def import_gguf(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="GGUF file or package:NAME.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
) -> None:
    """Turn a GGUF file into a Hugging Face folder."""
    from cusprun.pipeline.models import import_gguf as run

    out = run(file, folder, dtype=dtype, progress=shown_progress())
    typer.echo(f"wrote {out}")


def inspect(path: Model, json: JsonFlag = False) -> None:
    """Show what a model is made of: parameters, bytes and shapes by part."""
    from cusprun.cli.tables import inspection_tables
    from cusprun.pipeline.models import inspect as run

    found = run(path, progress=shown_progress())
    if json:
        print_json(found)
        return
    console = stdout()
    for table in inspection_tables(found):
        console.print(table)


def doctor(json: JsonFlag = False) -> None:
    """Show what is installed, which runtimes work here, and the command that adds a missing one."""
    from cusprun.cli.tables import doctor_tables
    from cusprun.diagnosis import doctor as run

    report = run(progress=shown_progress())
    if json:
        print_json(report)
    else:
        console = stdout()
        for table in doctor_tables(report):
            console.print(table)
    if report.problems:
        raise typer.Exit(3)
