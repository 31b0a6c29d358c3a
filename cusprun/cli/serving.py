"""``serve``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cusprun.cli.console import shown_progress
from cusprun.cli.keys import KEY_VARIABLE, hide_keys
from cusprun.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": False})(serve)


def serve(
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="ARTIFACT",
            help="GGUF file, ONNX folder, model folder or hub id.",
            show_default=False,
        ),
    ] = None,
    engine_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ENGINE OPTIONS]", help="The engine's own options.", show_default=False),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="vllm, llamacpp, transformers or onnx; by default what suits the artifact.",
            show_default=False,
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Smaller artifact, such as the expert of this one, that guesses tokens ahead for it.",
            show_default=False,
        ),
    ] = None,
    before: Annotated[
        str | None,
        typer.Option(
            help="Instead of ARTIFACT: serve this beside --after, with a page that asks both.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[str | None, typer.Option(help="Serve this beside --before.", show_default=False)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"Key that clients must send; ${KEY_VARIABLE} and --api-key-file leave no trace.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys, one a line.", show_default=False)
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Serve other machines without a key.")] = False,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that a prompt and its answer may have together.", show_default=False),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(help="Requests that are worked on at once.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.", show_default=False)] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name that clients call the model; the file's or folder's unless given.", show_default=False
        ),
    ] = None,
    drain: Annotated[float, typer.Option(help="Seconds that answers may go on after SIGTERM.")] = 30.0,
    engine_log: Annotated[bool, typer.Option(help="Show what the engine prints.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Let the engine run code from the model folder.")
    ] = False,
) -> None:
    """Serve an artifact behind OpenAI's interface, on the engine that suits it."""
    from cusprun.pipeline.serving import ServeOptions
    from cusprun.pipeline.serving import serve as run
    from cusprun.pipeline.side_by_side import serve_side_by_side

    options = ServeOptions(
        host=host,
        port=port,
        keys=_keys(api_key, api_key_file),
        insecure=insecure,
        context_tokens=context,
        parallel=parallel,
        num_threads=threads,
        model=name,
        engine_options=tuple(engine_options or ()),
        trust_remote_code=trust_remote_code,
        drain_s=drain,
        show_engine_log=engine_log,
    )
    if api_key is not None:
        hide_keys(options.keys)
    if before is None and after is None:
        if artifact is None:
            raise UserError("nothing to serve was named; give an artifact, or --before and --after")
        run(artifact, options, engine=engine, draft=draft, ready=typer.echo, progress=shown_progress())
        return
    if before is None or after is None or draft is not None or name is not None:
        raise UserError("--before and --after go together, and without --draft and --name")
    if artifact is not None and not artifact.startswith("-"):
        raise UserError(f"--before and --after name what is served; leave out {artifact!r}")
    # With both, the first of the engine's options stands where an artifact would.
    options = replace(options, engine_options=(*filter(None, [artifact]), *options.engine_options))
    serve_side_by_side(before, after, options, engine=engine, ready=typer.echo, progress=shown_progress())


def _keys(given: str | None, file: Path | None) -> tuple[str, ...]:
    """Return the keys; the environment's is taken out of it, so that no engine inherits it."""
    stated = os.environ.pop(KEY_VARIABLE, "")
    keys = [*([] if given is None else [given]), *stated.splitlines()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"the key file {file} cannot be read ({reason}); check the path") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"the key file {file} holds no key; write one a line")
        keys += found
    return tuple(dict.fromkeys(keys))
