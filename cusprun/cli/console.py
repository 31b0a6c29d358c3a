"""What people see while they wait: progress bars on a terminal, single lines elsewhere; messages."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cusprun.cli.json_lines import JsonHandler, JsonProgress, is_chosen, write_event
from cusprun.progress import Advance, Progress

if TYPE_CHECKING:
    from rich.console import Console

SHORT_S = 2.0
"""A stage that takes less leaves no line behind."""

_LINE_EVERY_S = 15.0
_WIDTH_OF_FILES = 120
_MIN_SHARE_FOR_ESTIMATE = 0.05


def stdout() -> Console:
    """Return the console for results; as wide as a table needs when it is no terminal."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:  # rich ends the process with exit code 1
            raise BrokenPipeError

    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    return Piped(width=width, highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    """Return the console for everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def quieten(debug: bool, log_json: bool = False) -> None:
    """Silence the chatter of the libraries below (not with ``debug``) and show our own messages.

    With ``log_json`` these are lines of JSON, and so is what :func:`shown_progress` shows. The environment is
    what reaches libraries that are not imported yet; values the user set are kept.
    """
    handler: logging.Handler = JsonHandler() if log_json else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("cusprun", "exporters", "serve"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if debug:
        return
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def show_error(text: str, exit_code: int) -> None:
    """Say why a command failed, the way that messages are shown."""
    if is_chosen():
        write_event("error", text=text, exit_code=exit_code)
    else:
        print(f"error: {text}", file=sys.stderr)  # noqa: T201


def shown_progress() -> Progress:
    """Return the listener that shows stages the way that messages are shown."""
    return JsonProgress() if is_chosen() else ConsoleProgress()


class ConsoleProgress:
    """Stages as bars with share, rate and time left, or as lines when standard error is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or stderr()

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "") -> Iterator[Advance]:
        """Show one stage; it leaves one line when it took a while."""
        started = time.monotonic()
        shown = self._bar if self._console.is_terminal else self._lines
        with shown(name, total, unit) as advance:
            yield advance
        took = time.monotonic() - started
        if took >= SHORT_S:
            self._console.print(f"{name}: done in {duration(took)}", markup=False)

    @contextmanager
    def _bar(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(name, total=total, rate="")

            def advance(done: int) -> None:
                bars.advance(task, done)
                speed = bars.tasks[0].speed
                if unit and speed:
                    bars.update(task, rate=f"{speed:.3g} {unit}/s")

            yield advance

    @contextmanager
    def _lines(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        started = said = time.monotonic()
        done_so_far = 0

        def advance(done: int) -> None:
            nonlocal said, done_so_far
            done_so_far += done
            moment = time.monotonic()
            # The first line early, so that a log shows at once what is going on.
            if moment - said >= (_LINE_EVERY_S if said > started else SHORT_S) and 0 < done_so_far < total:
                said = moment
                share = done_so_far / total
                text = f"{name}: {share:.0%} of {total:,} {_several(unit)}".rstrip()
                # Before that, start-up costs make the estimate useless.
                if share >= _MIN_SHARE_FOR_ESTIMATE:
                    text += f", {duration((moment - started) * (1 - share) / share)} left"
                self._console.print(text, markup=False)

        yield advance


def _several(unit: str) -> str:
    """Return the plural of a unit of a stage; signs such as MiB have none."""
    if not unit.islower():
        return unit
    return f"{unit}es" if unit.endswith("ch") else f"{unit}s"


def duration(seconds: float) -> str:
    """Return a time for people, such as ``8.4 s`` or ``3 min 20 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
