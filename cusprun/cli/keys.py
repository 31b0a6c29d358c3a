"""API keys: where commands find them, and how they are kept out of the list of processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

KEY_VARIABLE = "CUSPRUN_API_KEY"


def hide_keys(keys: Sequence[str]) -> None:
    """Start this program over with the keys in its environment, which other users of the machine cannot read.

    Command lines are shown to all of them. Does nothing where the command line is not this process's own. The
    interpreter's own options, and how the program was named, stay: ``-m`` alone would import from the current
    folder.
    """
    words = sys.orig_argv[1:]
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            kept += [word, *rest]
        elif word == "--api-key":
            next(rest, None)
        elif not word.startswith("--api-key="):
            kept.append(word)
    if len(kept) == len(words) or not hasattr(os, "execve"):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *kept], {**os.environ, KEY_VARIABLE: "\n".join(keys)})
