"""Progress and messages as lines of JSON on standard error, for machines (``cusprun --log-json ...``).

Each line is one object. ``schema_version`` is 1; fields may be added within a version. ``time`` is UTC in ISO
8601, ``event`` one of:

==================  =========================================================================
``stage_started``   ``stage`` (its name), ``total`` (how much there is to do), ``unit`` (of what)
``stage_progress``  ``stage``, ``total``, ``unit``, ``done``, ``seconds`` (since it started),
                    ``rate_per_s`` (units), ``seconds_left`` (null before anything is done); at
                    most one a second
``stage_finished``  ``stage``, ``seconds``
``stage_failed``    ``stage``, ``seconds``; what went wrong follows as ``error``
``message``         ``level`` (``info``, ``warning``, ``error``), ``text``
``error``           ``text``, ``exit_code``; the last line of a command that failed
==================  =========================================================================
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone

from cusprun.progress import Advance

SCHEMA_VERSION = 1
_EVERY_S = 1.0
_ROOM = "cusprun"


def write_event(event: str, **fields: object) -> None:
    """Write one line."""
    moment = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = {"schema_version": SCHEMA_VERSION, "time": moment, "event": event, **fields}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)  # noqa: T201


class JsonHandler(logging.Handler):
    """Writes messages as lines of JSON."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        write_event("message", level=record.levelname.lower(), text=record.getMessage())


def is_chosen() -> bool:
    """Tell whether messages of this process are written as JSON, and progress with them."""
    return any(isinstance(handler, JsonHandler) for handler in logging.getLogger(_ROOM).handlers)


class JsonProgress:
    """Stages as lines of JSON."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "") -> Iterator[Advance]:
        """Write that a stage starts, how far it is, and how it ends."""
        started = said = time.monotonic()
        done = 0
        about = {"stage": name, "total": total, "unit": unit}

        def advance(more: int) -> None:
            nonlocal done, said
            done += more
            moment = time.monotonic()
            if moment - said < _EVERY_S and done < total:
                return
            said = moment
            seconds = moment - started
            rate = done / seconds if seconds > 0 else 0.0
            left = round((total - done) / rate, 3) if rate > 0 else None
            pace = {"seconds": round(seconds, 3), "rate_per_s": round(rate, 6), "seconds_left": left}
            write_event("stage_progress", **about, done=done, **pace)

        write_event("stage_started", **about)
        try:
            yield advance
        except BaseException:
            write_event("stage_failed", stage=name, seconds=round(time.monotonic() - started, 3))
            raise
        write_event("stage_finished", stage=name, seconds=round(time.monotonic() - started, 3))
