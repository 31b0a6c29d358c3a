"""Reading the results that a report is made from: found, recognised by what is in them, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.codec import from_plain
from cusprun.errors import UserError
from cusprun.pipeline.reporting.kinds import KINDS, ResultKind
from serve.report.view import Unread

_VERSION = "schema_version"
_RESULTS = "results.json"
_MANIFESTS = ("expert/cusprun.json", "cusprun.json")
_SINGLE = ("bench.json", "eval.json", "sweep.json")
_PROOFS = "*.parity.json"


@dataclass(frozen=True)
class Result:
    """One record that was read; ``name`` is the file's, without the user's folders."""

    kind: ResultKind
    name: str
    record: Any


class _UnreadableError(Exception):
    """A file, or a part of one, that this version cannot read; the text says why and what to do."""


def read_results(paths: Sequence[Path]) -> tuple[tuple[Result, ...], tuple[Unread, ...]]:
    """Read result files and folders of results; equal records are kept once.

    What is damaged or of another schema version is returned apart, so that it takes nothing else with it.

    Raises:
        UserError: a path does not exist, a folder holds no results, a file is of no known kind, or nothing
            at all could be read.
    """
    found: list[Result] = []
    unread: list[Unread] = []
    files: dict[Path, str] = {}
    for path in paths:
        for name, file in _files(path):
            files.setdefault(file, name)
    for file, name in files.items():
        try:
            for result in _read(name, file, unread):
                if not any(result.record == other.record for other in found):
                    found.append(result)
        except _UnreadableError as fault:
            unread.append(Unread(name, str(fault)))
    if not found:
        reasons = "; ".join(f"{one.name} could not be read: {one.reason}" for one in unread)
        raise UserError(reasons or "no results were given; name a result file or the folder of a run")
    return tuple(found), tuple(unread)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the result files at a path, each with the name that the report calls it by."""
    if path.is_file():
        yield path.name, path.resolve()
        return
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a result file, or the folder of a run or a sweep")
    folder = path.resolve()
    names = [_RESULTS] if (folder / _RESULTS).is_file() else [*_SINGLE]
    proofs = sorted(folder.glob(_PROOFS)) if names[0] != _RESULTS else []
    files = [folder / name for name in (*names, *_MANIFESTS) if (folder / name).is_file()] + proofs
    if not files:
        known = ", ".join((_RESULTS, *_SINGLE, *_MANIFESTS))
        raise UserError(f"{path} holds no results ({known}); give a result file, or the folder of a run")
    yield from ((f"{folder.name}/{file.relative_to(folder)}", file) for file in files)


def _read(name: str, file: Path, unread: list[Unread]) -> Iterator[Result]:
    plain = _json_of(file)
    kind = _kind_of(plain)
    if kind is None:
        _refuse_if_later(plain)
        raise UserError(
            f"{file} is of no kind that a report shows ({', '.join(KINDS)}); give what cusprun run, bench, "
            "eval, sweep or overlap wrote"
        )
    yield from _results(kind, name, plain, unread)


def _json_of(file: Path) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number in JSON")

    def number(text: str) -> float:
        return value if math.isfinite(value := float(text)) else refuse(text)

    try:
        text = file.read_text(encoding="utf-8-sig")
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except OSError as fault:  # its own text names the user's folder
        raise _UnreadableError(f"it cannot be read ({fault.strerror}); check the file") from None
    except (ValueError, RecursionError) as fault:
        raise _UnreadableError(f"it cannot be read as JSON ({fault}); make it again") from None


def _kind_of(plain: Any) -> ResultKind | None:
    keys = plain.keys() if isinstance(plain, dict) else frozenset()
    return next((kind for kind in KINDS.values() if kind.keys <= keys), None)


def _results(kind: ResultKind, name: str, plain: Mapping[str, Any], unread: list[Unread]) -> Iterator[Result]:
    """Yield a record, and those of its parts; parts of another version are set aside and told."""
    _require_version(kind, plain)
    kept = dict(plain)
    for key, part_name in kind.parts.items():
        kept[key] = _readable_part(KINDS[part_name], plain.get(key), _part_of(key, name), unread)
        if kept[key] is None and key not in plain:
            del kept[key]
    try:
        record = from_plain(kind.record_type(), kept)
    except UserError as fault:
        raise _UnreadableError(f"it is damaged ({fault}); make it again") from None
    _require_showable(kind, record)
    yield Result(kind, name, record)
    for key, part_name in kind.parts.items():
        value = getattr(record, key)
        for part in value if isinstance(value, tuple) else (value,):
            if part is None:
                continue
            try:
                _require_showable(KINDS[part_name], part)
            except _UnreadableError as fault:
                unread.append(Unread(_part_of(key, name), str(fault)))
            else:
                yield Result(KINDS[part_name], name, part)


def _part_of(key: str, name: str) -> str:
    return f"the part {key!r} of {name}"


def _require_showable(kind: ResultKind, record: Any) -> None:
    """Refuse a record that says nothing a report could show, as one without a model or with a width of 0."""
    try:
        for _ in kind.shown([record]):
            pass
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as fault:
        raise _UnreadableError(
            f"what it says does not fit together ({type(fault).__name__}: {fault}); make it again"
        ) from None


def _readable_part(kind: ResultKind, value: Any, where: str, unread: list[Unread]) -> Any:
    """Return a part as it is, or what is left of it beside other versions: None, or fewer of a list."""
    entries = value if isinstance(value, list) else [value]
    kept = []
    for entry in entries:
        try:
            if isinstance(entry, dict):
                _require_version(kind, entry)
        except _UnreadableError as fault:
            unread.append(Unread(where, str(fault)))
        else:
            kept.append(entry)
    if isinstance(value, list):
        return kept
    return kept[0] if kept else None


def _known_version(kind: ResultKind) -> int:
    known: int = getattr(kind.record_type(), _VERSION)  # the default of the field
    return known


def _require_version(kind: ResultKind, plain: Mapping[str, Any]) -> None:
    known = _known_version(kind)
    found = plain.get(_VERSION, known)
    if found != known:
        raise _UnreadableError(
            f"it is of schema version {found!r:.20}, and this cusprun reads version {known} of a "
            f"{kind.name}; make it again, or use the cusprun that made it"
        )


def _refuse_if_later(plain: Any) -> None:
    """Refuse what has a schema version beyond all known ones: its kind cannot be told by its keys."""
    found = plain.get(_VERSION) if isinstance(plain, dict) else None
    latest = max(map(_known_version, KINDS.values()))
    if type(found) is int and found > latest:
        raise _UnreadableError(
            f"it is of schema version {found}, and this cusprun reads up to version {latest}; make it again, "
            "or use the cusprun that made it"
        )
