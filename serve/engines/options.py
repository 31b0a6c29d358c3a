"""Engine options as users write them after ``--``."""

from __future__ import annotations

from collections.abc import Sequence

from cusprun.errors import UserError


def drop_output(_piece: bytes) -> None:
    """Let what an engine prints go; its end is kept for its last words."""


def refuse_reserved(options: Sequence[str], reserved: Sequence[str], engine: str) -> None:
    """Raise ``UserError`` for an option that cusprun sets itself, abbreviated or not."""
    for word in options:
        name = word.partition("=")[0].replace("_", "-")
        # Parsers take any beginning of an option for the option.
        if name.startswith("--") and len(name) > 2 and any(full.startswith(name) for full in reserved):
            raise UserError(f"cusprun serve sets {engine}'s {name} itself; see cusprun serve --help")


def value_of(options: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the value of the last of ``names`` among options, None without one; "" when it has no value."""
    found = None
    for position, word in enumerate(options):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") in names:
            found = value if equals else "".join(options[position + 1 : position + 2])
    return found
