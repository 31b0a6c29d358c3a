"""Frozen dataclasses to JSON and back, strictly: unknown, missing and mistyped keys are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cusprun.errors import UserError, nearest

T = TypeVar("T")

_VERSION_KEY = "schema_version"


_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")  # a range written by hand must not fill the memory


class Indices(tuple[int, ...]):
    """Sorted, distinct, non-negative integers; written in JSON as ranges, like ``"0-3 7 9-12"``."""

    __slots__ = ()

    def __new__(cls, values: Iterable[int] = ()) -> Indices:
        """Sort and deduplicate ``values``."""
        return super().__new__(cls, sorted({int(value) for value in values}))

    def to_text(self) -> str:
        """Return the ranges as text."""
        parts: list[str] = []
        start = previous = None
        for value in (*self, None):
            if start is not None and value is not None and previous is not None and value == previous + 1:
                previous = value
                continue
            if start is not None:
                parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = previous = value
        return " ".join(parts)

    @classmethod
    def from_text(cls, text: Any) -> Indices:
        """Parse ranges; raises ``ValueError`` on anything else."""
        if not isinstance(text, str):
            raise ValueError(f"indices must be text like '0-3 7', not {text!r:.40}")
        values: list[int] = []
        for part in text.replace(",", " ").split():
            match = _RANGE.fullmatch(part)
            if not match:
                raise ValueError(f"{part[:40]!r} is not a number or a range like '4-9'")
            start, stop = int(match[1]), int(match[2] or match[1])
            if stop < start:
                raise ValueError(f"the range {part!r} runs backwards")
            values.extend(range(start, stop + 1))
        if len(set(values)) != len(values):
            raise ValueError("an index stands twice")
        return cls(values)


def to_plain(value: Any) -> Any:
    """Turn a record into dictionaries, lists and scalars that JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Indices):
        return value.to_text()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_plain(kind: Any, plain: Any, where: str = "") -> Any:
    """Build a value of type ``kind`` from plain data; ``where`` names the place for error texts.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return plain
    if dataclasses.is_dataclass(kind):
        return _record_from(kind, plain, where)
    if kind is Indices:
        return _indices_from(plain, where)
    if origin in (typing.Union, types.UnionType):
        if plain is None and type(None) in arguments:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return from_plain(inner, plain, where)
    if origin is tuple:
        if not isinstance(plain, list):
            raise UserError(f"{where} must be a list, not {plain!r:.60}")
        return tuple(from_plain(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(plain))
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        if not isinstance(plain, dict):
            raise UserError(f"{where} must be a mapping, not {plain!r:.60}")
        return {key: from_plain(arguments[1], item, f"{where}.{key}") for key, item in plain.items()}
    return _scalar_from(kind, plain, where)


def _indices_from(plain: Any, where: str) -> Indices:
    try:
        return Indices.from_text(plain)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _scalar_from(kind: Any, plain: Any, where: str) -> Any:
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool) and abs(plain) < 2**1000:
        return float(plain)
    if not isinstance(plain, kind) or (isinstance(plain, bool) and kind is not bool):
        raise UserError(f"{where} must be of type {kind.__name__}, not {plain!r:.60}")
    return plain


def _record_from(kind: Any, plain: Any, where: str) -> Any:
    if not isinstance(plain, dict):
        raise UserError(f"{where or kind.__name__} must be a mapping, not {plain!r:.60}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in plain:
        if key not in fields:
            raise UserError(f"unknown key {prefix + str(key)!r}{nearest(str(key), fields)}")
    values = {}
    for name, field in fields.items():
        if name in plain:
            values[name] = from_plain(hints[name], plain[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"missing key {prefix + name!r}")
    version = fields.get(_VERSION_KEY)
    if version is not None and values.get(_VERSION_KEY, version.default) != version.default:
        raise UserError(
            f"{prefix}{_VERSION_KEY} is {values[_VERSION_KEY]}, and this cusprun reads {version.default}; "
            "make it again, or use the cusprun that made it"
        )
    return kind(**values)


def key_of(*inputs: object) -> str:
    """Return 32 hex digits that stand for some inputs (anything that JSON can hold)."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def json_bytes(record: Any) -> bytes:
    """Return a record as indented UTF-8 JSON."""
    text = json.dumps(to_plain(record), ensure_ascii=False, indent=2, allow_nan=False)
    # JSON can spell half of a surrogate pair, as Python escapes it: what was read so is written so.
    return f"{text}\n".encode("utf-8", "backslashreplace")


def dump_json(record: Any, path: Path) -> None:
    """Write a record as indented UTF-8 JSON, committed by rename."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(json_bytes(record))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def load_json(kind: type[T], path: Path, error: type[UserError] = UserError) -> T:
    """Read a record of type ``kind`` from a JSON file.

    Raises:
        error: the file is missing, is not JSON or does not describe such a record.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise error(f"{path} does not exist; check the path") from None
    except (OSError, ValueError, RecursionError) as fault:
        raise error(f"{path} cannot be read as JSON ({fault}); make it again") from None
    try:
        record: T = from_plain(kind, plain)
    except UserError as fault:
        hint = _part_hint(kind, plain)
        raise error(f"{path}{hint}" if hint else f"{path}: {fault}") from None
    return record


def _part_hint(kind: Any, plain: Any) -> str:
    """Return what to do when only a part of what was read is such a record, as of a manifest its plan."""
    part = kind.__name__.lower()
    try:
        from_plain(kind, plain.get(part) if isinstance(plain, dict) else None)
    except UserError:
        return ""
    return f" is not a {part} but holds one; write its {part!r} part to a file of its own and give that"
