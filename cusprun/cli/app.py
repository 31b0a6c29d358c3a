"""The command ``cusprun``: its commands, and how every failure becomes one line and an exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Annotated, Any, NoReturn

import typer

from cusprun.cli import artifacts, bench, curves, deploy, experts, models, recipes, report, serving
from cusprun.cli.console import quieten, show_error
from cusprun.cli.shared import Ended, SharedProcess
from cusprun.errors import CusprunError

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
_DEBUG_VARIABLE = "CUSPRUN_DEBUG"
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
_PATH_ERRORS = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR})

app = typer.Typer(
    name="cusprun",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for room in (models, experts, curves, artifacts, bench, recipes, report, serving, deploy):
    room.register(app)


class _Terminated(BaseException):
    """SIGTERM, raised in the main thread so that half-written output is removed on the way out."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from cusprun.version import __version__

        typer.echo(f"cusprun {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the chatter of libraries.")
    ] = False,
    _log_json: Annotated[
        bool, typer.Option("--log-json", help="Write progress and messages as lines of JSON.")
    ] = False,
) -> None:
    """Turn a general language model into a smaller expert for one language, domain and task.

    A MODEL is a local Hugging Face folder, a hub id like owner/name, a GGUF file, or package:NAME for the one
    GGUF file inside an installed Python package.
    """
    if isinstance(context.obj, SharedProcess):
        context.obj.admit(context.invoked_subcommand)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    # A stream that the shell closed (`>&-`) is None, which the libraries that print do not expect.
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a letter of a table is no reason to lose the table.
        sys.stdout.reconfigure(errors="replace")
    given = sys.argv[1:] if arguments is None else arguments
    process = SharedProcess(os.environ, given)
    process.silence(_is_debugged(given))
    process.leave(run(given, process))


def run(arguments: Sequence[str], process: SharedProcess | None = None) -> int:
    """Run the command line, in ``process`` if there is one; returns the exit code."""
    debug = _is_debugged(arguments)
    quieten(debug, "--log-json" in _general(arguments))
    own = process or SharedProcess(os.environ, arguments)
    with _terminated_gently(is_last=process is not None and not own.is_alone):
        ended = own.end(_run(arguments, debug, own))
        if ended.text and not own.has_spoken:
            show_error(ended.text, ended.exit_code)
        return ended.exit_code


def _is_debugged(arguments: Sequence[str]) -> bool:
    return os.environ.get(_DEBUG_VARIABLE, "") not in ("", "0") or "--debug" in _general(arguments)


def _general(arguments: Sequence[str]) -> list[str]:
    """Return the options before the command's name."""
    return [*takewhile(lambda word: word.startswith("-"), arguments)]


def _run(arguments: Sequence[str], debug: bool, process: SharedProcess) -> Ended:
    try:
        outcome = typer.main.get_command(app).main(
            args=list(arguments), prog_name="cusprun", standalone_mode=False, obj=process
        )
        if outcome == EXIT_INTERRUPTED:  # typer's own word for Ctrl-C; others may be in any collective
            return _interrupted()
        process.finish()
    except CusprunError as error:
        return _failed(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except _Terminated:
        return Ended(EXIT_TERMINATED, "terminated; nothing half-written was left behind", told_to_end=True)
    except BrokenPipeError:
        # Whoever read the output has seen enough; without this, the flush at exit complains once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Ended(0)
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            where = f"{error.filename}: " if error.filename else ""
            return _failed(f"{where}{error.strerror}; free some space or choose another place", 2, debug)
        if error.errno in _PATH_ERRORS:
            return _failed(f"the path {error.filename!s:.80}: {error.strerror}; check it", 2, debug)
        return _unexpected(error, debug)
    except Exception as error:
        return _refused(error, debug) if hasattr(error, "format_message") else _unexpected(error, debug)
    return Ended(int(outcome or 0))


@contextmanager
def _terminated_gently(*, is_last: bool) -> Iterator[None]:
    """Make SIGTERM an exception for as long as a command runs; only a main thread may.

    With ``is_last`` the process ends with this command, and a signal that came, or is ignored, stays so.
    """

    def on_terminate(_number: int, _frame: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: a second would break the first's work
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        if not is_last or signal.getsignal(signal.SIGTERM) is on_terminate:
            signal.signal(signal.SIGTERM, previous)


def _interrupted() -> Ended:
    return Ended(
        EXIT_INTERRUPTED,
        "interrupted; nothing half-written was left behind, and the same command goes on from what is "
        "finished",
    )


def _refused(error: Any, debug: bool) -> Ended:
    """Report options and commands that do not exist; the parser's own texts suggest the nearest."""
    context = getattr(error, "ctx", None)
    hint = f" (see: {context.command_path} --help)" if context is not None else ""
    return _failed(error.format_message().rstrip(".") + hint, error.exit_code, debug)


def _unexpected(error: Exception, debug: bool) -> Ended:
    kind, text = type(error).__name__, " ".join(str(error).split())
    what = f"{kind}: {text}" if text else kind
    return _failed(
        f"unexpected {what}; please report this with the traceback that `cusprun --debug ...` shows", 1, debug
    )


def _failed(text: str, code: int, debug: bool) -> Ended:
    if debug:
        traceback.print_exc()
    return Ended(code, text)
