"""The command line: thin commands over the public functions; nothing heavy is imported for ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]

_EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; Ctrl-C while it is being loaded is one line too."""
    try:
        from cusprun.cli.app import main as run

        run(arguments)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(_EXIT_INTERRUPTED)
