"""The error tree: every failure a user can cause or meet is one typed, one-sentence error.

The exit codes are the contract of the command line: 2 for the user's fault, 3 for a failed
measurement or gate, 1 for ours.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class CusprunError(Exception):
    """Base of all errors raised on purpose; its text says what is wrong, where, and what to do."""

    exit_code = 1


class UserError(CusprunError):
    """The input, the options or the machine cannot do what was asked."""

    exit_code = 2


class ConfigError(UserError):
    """An expert, recipe or option file is not valid; ``faults`` holds every fault found."""

    def __init__(self, where: str, faults: Iterable[str]) -> None:
        self.where = where
        self.faults = tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{where} is not valid; mend this and run again:\n{lines}")


class CorpusError(UserError):
    """A corpus is missing, empty, unreadable or too small."""


class ModelError(UserError):
    """A model folder or file is missing, damaged or unsafe to read."""


class UnsupportedModelError(ModelError):
    """The model is sound, but of a family or shape that cannot be handled."""


class PlanError(UserError):
    """A plan is impossible, malformed or made for another model."""


class StoreError(UserError):
    """An impact store is damaged or was made from another model or corpus."""


class OutputError(UserError):
    """The output path exists, cannot be written or does not fit on the disk."""


class ExportError(UserError):
    """The model cannot be written in the wanted format."""


class DeviceError(UserError):
    """A device is unknown, not there, does not work, or has too little memory."""


class MissingDependencyError(UserError):
    """An optional runtime is not installed; the text gives the command that adds it."""


class ServingError(CusprunError):
    """A server ended otherwise than asked: its engine failed, or answers were cut off."""

    exit_code = 3


class RankError(CusprunError):
    """Another process of a shared run failed or was lost; ``exit_code`` is that of its own failure."""

    def __init__(self, text: str, exit_code: int = 3) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class MeasurementError(CusprunError):
    """A measurement did not finish."""

    exit_code = 3


class GateError(CusprunError):
    """A proof failed: an artifact does not compute the same as its checkpoint."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    folded = {entry.casefold(): entry for entry in known}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def reason_of(error: BaseException) -> str:
    """Return what an exception of another library says, in one line: its first, and what that introduces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    reason = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and lines[1:] else lines[0]
    return reason.rstrip(".")


def require_known(name: str, known: Iterable[str], what: str, error: type[UserError] = UserError) -> None:
    """Raise ``error`` when ``name`` is not among ``known``, listing them and the nearest one.

    Of more than 40 only the eight nearest are listed, so that the sentence stays one.
    """
    require_kind(name, str, f"the {what}", error)
    names = sorted(known)
    if name in names:
        return
    listed = f"known: {', '.join(names)}"
    if len(names) > _MOST_LISTED:
        near = difflib.get_close_matches(name, names, n=_NEAREST_LISTED, cutoff=0.0)
        listed = f"of {len(names)} known ones the nearest: {', '.join(near)}"
    raise error(f"unknown {what} {name!r}{nearest(name, names)} ({listed})")


_MOST_LISTED = 40
_NEAREST_LISTED = 8


_KINDS: Mapping[type, tuple[type, str, str]] = {
    bool: (bool, "True or False", "True or False"),
    int: (numbers.Integral, "a whole number", "whole numbers"),
    float: (numbers.Real, "a number", "numbers"),
    str: (str, "text", "texts"),
}
"""What a value of a type is an instance of (of other libraries too), and what one and several are called."""


def require_kind(value: object, kind: type, what: str, error: type[UserError] = UserError) -> None:
    """Raise ``error`` when a value is no ``kind`` (a key of ``_KINDS``); a truth value is no number."""
    wanted, name, _ = _KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise error(f"{what} must be {name}, not {value!r:.60}")


def require_list(values: Iterable[T], kind: type, what: str) -> tuple[T, ...]:
    """Return values given from Python; raises ``UserError`` for what is no list, or the like, of ``kind``."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{what} must be a list of {_KINDS[kind][2]}, not {values!r:.60}")
    found = tuple(values)
    for value in found:
        require_kind(value, kind, f"each of {what}")
    return found
