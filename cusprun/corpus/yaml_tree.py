"""Strict YAML: every fault of a file is found in one reading, each with its line.

A file is read into a tree of nodes that know their lines; the caller takes the keys it knows, with their
types, and ``finish`` reports what is missing, mistyped, doubled or unknown, all at once::

    root = read_yaml(path)
    seed = root.take("seed", int, 0)
    output = root.require("output", str, "")
    for item in root.items("sources"):
        section = item.section()
    root.finish()

Until ``finish`` has returned, a taken value may be the default that stands in for a faulty one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cusprun.errors import ConfigError, nearest

T = TypeVar("T")
D = TypeVar("D")

Check = Callable[[Any], str]
"""Returns what is wrong with a value ("must be above 0, not -1"), or an empty string."""

_KIND_NAMES: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


_POWER_OF_TEN = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
"""Numbers like 1e-9, which YAML 1.1 reads as text unless they have both a point and a sign."""


@dataclass(frozen=True)
class _Scalar:
    """``plain`` tells that it is not in quotes."""

    line: int
    value: Any
    plain: bool = False


@dataclass(frozen=True)
class _List:
    line: int
    items: tuple[_Node, ...]


@dataclass(frozen=True)
class _Mapping:
    line: int
    entries: tuple[tuple[str, int, _Node], ...]


_Node = _Scalar | _List | _Mapping

_UNREADABLE = object()
"""Stands for a scalar whose fault is reported already."""


@dataclass
class _Reading:
    """What the sections of one file share: its name, its faults as (line, text), and each other."""

    where: str
    faults: list[tuple[int, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def add(self, line: int, text: str) -> None:
        self.faults.append((line, text))

    def raise_faults(self) -> None:
        if self.faults:
            texts = [f"{self.where}:{line}: {text}" for line, text in sorted(self.faults)]
            raise ConfigError(self.where, dict.fromkeys(texts))


class Value:
    """One value of the file, whatever its type."""

    def __init__(self, node: _Node, name: str, reading: _Reading) -> None:
        self._node = node
        self._reading = reading
        self.name = name
        self.line = node.line

    @property
    def is_text(self) -> bool:
        """Whether the value is a text."""
        return isinstance(self._node, _Scalar) and isinstance(self._node.value, str)

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return isinstance(self._node, _List)

    @property
    def is_mapping(self) -> bool:
        """Whether the value is a mapping."""
        return isinstance(self._node, _Mapping)

    def fault(self, text: str) -> None:
        """Note a fault at the line of this value."""
        self._reading.add(self.line, text)

    def scalar(self, kind: type[T], default: D, check: Check | None = None) -> T | D:
        """Return the value when it is of ``kind`` (``str``, ``int``, ``float``, ``bool``), else note a fault.

        A fault returns ``default``.
        """
        if self._unreadable:
            return default
        value = self._node.value if isinstance(self._node, _Scalar) else None
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
            value = float(value)
        if kind is float and self._is_power_of_ten:
            value = float(str(value))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            quotes = "; put it in quotes" if kind is str and value is not None else ""
            self.fault(f"{self.name!r} must be {_KIND_NAMES[kind]}, not {self._described()}{quotes}")
            return default
        wrong = check(value) if check else ""
        if wrong:
            self.fault(f"{self.name!r} {wrong}")
            return default
        return value

    def items(self) -> list[Value]:
        """Return the items of a list; note a fault and return none when it is not a list."""
        if not isinstance(self._node, _List):
            self._mistyped(f"{self.name!r} must be a list, not {self._described()}")
            return []
        return [Value(item, f"{self.name}[{i}]", self._reading) for i, item in enumerate(self._node.items)]

    def section(self) -> Section:
        """Return the value as a mapping; note a fault and return an empty one when it is not a mapping."""
        if not isinstance(self._node, _Mapping):
            self._mistyped(f"{self.name!r} must be a mapping of keys to values, not {self._described()}")
            return Section(_Mapping(self.line, ()), self.name, self._reading, broken=True)
        return Section(self._node, self.name, self._reading)

    @property
    def _is_power_of_ten(self) -> bool:
        node = self._node
        return isinstance(node, _Scalar) and node.plain and bool(_POWER_OF_TEN.fullmatch(str(node.value)))

    @property
    def _unreadable(self) -> bool:
        return isinstance(self._node, _Scalar) and self._node.value is _UNREADABLE

    def _mistyped(self, text: str) -> None:
        if not self._unreadable:
            self.fault(text)

    def _described(self) -> str:
        if isinstance(self._node, _Scalar):
            return "nothing" if self._node.value is None else f"{self._node.value!r:.60}"
        return "a list" if isinstance(self._node, _List) else "a mapping"


class Section:
    """A mapping of the file; a key is known once it was asked for."""

    def __init__(self, node: _Mapping, name: str, reading: _Reading, broken: bool = False) -> None:
        self._reading = reading
        self._broken = broken
        self._known: list[str] = []
        self._missing: list[tuple[tuple[str, ...], str]] = []
        self._entries: dict[str, tuple[int, Value]] = {}
        self.name = name
        self.line = node.line
        reading.sections.append(self)
        for key, line, child in node.entries:
            if key in self._entries:
                reading.add(line, f"the key {key!r} stands twice, first in line {self._entries[key][0]}")
            else:
                self._entries[key] = (line, Value(child, key, reading))

    def has(self, key: str) -> bool:
        """Whether ``key`` is there; makes it known."""
        if key not in self._known:
            self._known.append(key)
        return key in self._entries

    def value(self, key: str) -> Value | None:
        """Return the value under ``key`` whatever its type, or ``None``."""
        return self._entries[key][1] if self.has(key) else None

    def take(self, key: str, kind: type[T], default: D, check: Check | None = None) -> T | D:
        """Return the scalar under ``key``, or ``default`` when it is absent or faulty."""
        value = self.value(key)
        return default if value is None else value.scalar(kind, default, check)

    def require(self, key: str, kind: type[T], placeholder: D, check: Check | None = None) -> T | D:
        """Like ``take``, but an absent key is a fault."""
        self.require_one((key,))
        return self.take(key, kind, placeholder, check)

    def require_one(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Return those of ``keys`` that are there; none, or more than one, is a fault."""
        names = tuple(keys)
        present = tuple(key for key in names if self.has(key))
        if len(present) > 1:
            self.fault(present[1], f"only one of {_listed(names)} may be given, not {_listed(present)}")
        if not present:
            wanted = repr(names[0]) if len(names) == 1 else f"one of {_listed(names)}"
            self._missing.append(
                (names, f"{wanted} is missing" + (f" in {self.name!r}" if self.name else ""))
            )
        return present

    def section(self, key: str) -> Section | None:
        """Return the mapping under ``key``, or ``None`` when it is absent."""
        value = self.value(key)
        return None if value is None else value.section()

    def items(self, key: str) -> list[Value]:
        """Return the items of the list under ``key``, none when it is absent."""
        value = self.value(key)
        return [] if value is None else value.items()

    def fault(self, key: str | None, text: str) -> None:
        """Note a fault at the line of ``key``, or of the section when it is ``None`` or absent."""
        self._reading.add(self._entries[key][0] if key in self._entries else self.line, text)

    def finish(self) -> None:
        """Report missing and unknown keys of every section that was read from this file.

        Raises:
            ConfigError: the file has faults; all of them, in the order of their lines.
        """
        for section in self._reading.sections:
            section._report_keys()
        self._reading.sections.clear()
        self._reading.raise_faults()

    def _report_keys(self) -> None:
        hints = []
        for key, (line, _) in self._entries.items():
            if key not in self._known:
                hint = nearest(key, [name for name in self._known if name not in self._entries])
                hints.append(hint)
                known = "" if hint else f" (known: {', '.join(self._known)})"
                self._reading.add(line, f"unknown key {key!r}{hint}{known}")
        for names, text in self._missing:
            # A misspelt key is one fault, not two.
            misspelt = any(repr(name) in hint for name in names for hint in hints)
            if not self._broken and not misspelt:
                self._reading.add(self.line, text)


def _listed(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def read_yaml(path: Path) -> Section:
    """Read a YAML file whose top is a mapping.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8, not YAML, or not a mapping.
    """
    import yaml

    where = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(where, [f"{where} cannot be read ({error.strerror}); check the path"]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(where, [f"{where}:{line}: not UTF-8 text; save the file as UTF-8"]) from None
    except RecursionError:
        raise ConfigError(where, [f"{where}:1: nested too deeply"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(where, [f"{where}:{mark.line + 1 if mark else 1}: {error.problem}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(where, [f"{where}:1: {' '.join(str(error).split())}"]) from None
    reading = _Reading(where)
    node = _convert(tree, reading, {}) if tree is not None else _Scalar(1, None)
    if not isinstance(node, _Mapping):
        reading.add(
            node.line, "the file must be a mapping of keys to values" + ("" if tree else "; it is empty")
        )
        reading.raise_faults()
    assert isinstance(node, _Mapping)
    return Section(node, "", reading)


def _convert(node: Any, reading: _Reading, seen: dict[int, _Node | None]) -> _Node:
    """Turn a PyYAML node into ours; ``seen`` keeps aliases shared, its ``None`` marks open ancestors."""
    import yaml

    line = node.start_mark.line + 1
    if id(node) in seen:
        known = seen[id(node)]
        if known is None:
            reading.add(line, "an alias refers to a part that it stands in")
        return known or _Scalar(line, _UNREADABLE)
    seen[id(node)] = None
    result: _Node
    if isinstance(node, yaml.ScalarNode):
        result = _Scalar(line, _scalar(node, line, reading), plain=node.style is None)
    if isinstance(node, yaml.SequenceNode):
        result = _List(line, tuple(_convert(item, reading, seen) for item in node.value))
    if isinstance(node, yaml.MappingNode):
        entries = []
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                entries.append((key.value, key.start_mark.line + 1, _convert(value, reading, seen)))
            else:
                reading.add(key.start_mark.line + 1, "a key must be plain text")
        result = _Mapping(line, tuple(entries))
    seen[id(node)] = result
    return result


def _scalar(node: Any, line: int, reading: _Reading) -> Any:
    import yaml

    try:
        value = yaml.constructor.SafeConstructor().construct_object(node)
        if isinstance(value, str):
            value.encode()  # "\ud800" is half a character, which no file can be written with
        return value
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        reading.add(line, f"{node.value!r} cannot be read ({problem}); put it in quotes if it is text")
        return _UNREADABLE
