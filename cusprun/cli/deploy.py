"""``deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import shown_progress
from cusprun.cli.options import parse_size


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("deploy")(deploy)


def deploy(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT", help="GGUF file, ONNX folder or folder for vLLM.", show_default=False
        ),
    ],
    to: Annotated[
        str,
        typer.Option(help="Target: bundle, ollama, docker, kubernetes or systemd.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that the server may use, like 2GB; what fits is chosen.", show_default=False
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that a prompt and its answer may have together.", show_default=False),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(help="Requests that are worked on at once.", show_default=False)
    ] = None,
    platform: Annotated[
        str | None,
        typer.Option(
            help="bundle: linux-x86_64, linux-aarch64, macos-arm64 or windows-x86_64; this machine's unless "
            "given.",
            show_default=False,
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="What cusprun bench or run measured of the artifact, as JSON; planned otherwise.",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="An option of the target (see docs/deploy.md).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write what puts an artifact on the machine that it is for."""
    from cusprun.pipeline.deploy import deploy as run
    from deploy.targets import parse_options

    path = run(
        artifact,
        to,
        out,
        memory=parse_size(memory),
        context=context,
        parallel=parallel,
        platform=platform,
        results=results,
        options=parse_options(option or ()),
        progress=shown_progress(),
    )
    typer.echo(f"wrote {path}: {path / 'README.md'} says how to start it")
