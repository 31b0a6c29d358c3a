"""``export`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import shown_progress, stdout
from cusprun.cli.options import DeviceName, OptionalExpertFile
from cusprun.walk.device import DEFAULT_DEVICE


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("export")(export)
    app.command("verify")(verify)


def export(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Model to export: folder, hub id, GGUF file or package:NAME.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="File (gguf) or folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="Format: gguf, onnx or vllm.")] = "gguf",
    quant: Annotated[
        str | None,
        typer.Option(
            help="Precision. gguf: f32, f16 (default), bf16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs and so on; "
            "onnx: fp32, fp16, int8, int4 (default); vllm: float32, float16, bfloat16 (default), fp8, int8, "
            "int4.",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="An option of the format, such as imatrix=false (see docs/gguf.md, onnx.md, vllm.md).",
            show_default=False,
        ),
    ] = None,
    prove: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove that it computes the same.")
    ] = True,
    expert: Annotated[
        Path | None,
        typer.Option(
            "--expert",
            help="Calibrate quantisation on this expert's documents, and prove on its held-out ones.",
            show_default=False,
        ),
    ] = None,
    device: DeviceName = DEFAULT_DEVICE,
) -> None:
    """Write a model for a runtime, and prove that it computes the same."""
    from cusprun.pipeline.artifacts import export as run
    from exporters.registry import format_of

    options = format_of(to).parse_options(option or ())
    path = run(
        folder,
        out,
        to=to,
        quant=quant,
        options=options,
        verify=prove,
        expert=expert,
        device=device,
        progress=shown_progress(),
    )
    typer.echo(f"wrote {path}")
    if prove:
        typer.echo(f"it computes the same as {folder}: {path}.parity.json")
    else:
        typer.echo("it is not proven: --no-verify; `cusprun verify` proves it later")


def verify(
    folder: Annotated[
        str,
        typer.Argument(metavar="DIR", help="Model that the artifacts were made from.", show_default=False),
    ],
    artifacts: Annotated[
        list[Path],
        typer.Argument(metavar="ARTIFACT...", help="Exported files and folders.", show_default=False),
    ],
    expert: OptionalExpertFile = None,
) -> None:
    """Prove that exported files compute the same as the model they were made from."""
    from cusprun.cli.tables import parity_table
    from cusprun.pipeline.proof import verify as run

    stdout().print(parity_table(run(folder, artifacts, expert=expert, progress=shown_progress())))
