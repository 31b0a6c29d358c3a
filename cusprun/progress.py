"""How long stages report that they are alive, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
"""Called with the number of units done since the last call."""


class Progress(Protocol):
    """A listener for stages; ``with progress.stage("scoring", 120, "layer") as advance: ...``."""

    def stage(self, name: str, total: int, unit: str = "") -> AbstractContextManager[Advance]:
        """Open a stage of ``total`` units and return the function that advances it."""
        ...


class Silent:
    """The listener that says nothing; the default of every library function."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "") -> Iterator[Advance]:  # noqa: ARG002
        """Accept a stage and ignore it."""
        yield lambda _done: None


SILENT = Silent()
