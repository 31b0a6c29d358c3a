"""What is asked of an engine, and what it gives once it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serve.front.backend import Backend

START_TIMEOUT_S = 900.0
DEFAULT_PARALLEL = 4


def nobody_waits(_seconds: float) -> None:
    """Take no notice of how long a start takes."""


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with.

    ``model`` is the name that clients use; ``context_tokens`` the longest prompt with its answer, for each of
    ``parallel`` requests that are worked on at once (the engine's own defaults when None); ``draft`` an
    artifact of the same format whose model drafts for this one; ``options`` the engine's own options as the
    user wrote them; ``echo`` gets what the engine prints; ``waiting`` is called about once a second while it
    starts, with the seconds that have passed.
    """

    artifact: Path
    model: str
    context_tokens: int | None = None
    parallel: int | None = None
    draft: Path | None = None
    num_threads: int | None = None
    options: tuple[str, ...] = ()
    trust_remote_code: bool = False
    start_timeout_s: float = START_TIMEOUT_S
    echo: Callable[[bytes], None] | None = None
    waiting: Callable[[float], None] = nobody_waits


@dataclass(frozen=True)
class Running:
    """An engine that answers: its backend, the context it has for each request, and how to end it."""

    name: str
    backend: Backend
    context_tokens: int | None
    close: Callable[[], None]


class EngineModule(Protocol):
    """What a module of the table in ``serve.engines.registry`` has."""

    def require(self) -> None:
        """Raise ``MissingDependencyError``, with the command that adds it, when the engine is missing."""
        ...

    def start(self, settings: EngineSettings) -> Running:
        """Start the engine and return when it answers.

        Raises:
            UserError: an option, the draft or the size cannot be.
            ModelError: the artifact cannot be served; the text ends with the engine's own reason.
        """
        ...
