"""Values on their way between processes: JSON for what is small, tensors beside it; nothing is executed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cusprun.codec import Indices

_OURS = "cusprun."
"""Only records of this package are made from what arrives."""


def packed(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    """Return a value as JSON and the tensors that it holds, in the order that :func:`unpacked` wants them.

    Raises:
        TypeError: the value holds something of another kind.
    """
    tensors: list[torch.Tensor] = []
    tree = _tree(value, tensors)
    header = {"tree": tree, "tensors": [[str(t.dtype).removeprefix("torch."), [*t.shape]] for t in tensors]}
    return json.dumps(header, ensure_ascii=True).encode(), tensors


def _tree(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return plain data: scalars as they are, everything else as a list that begins with its kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ["tensor", len(tensors) - 1]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ["record", _name_of(type(value)), _fields(value, tensors)]
    if isinstance(value, Path):
        return ["path", str(value)]
    if isinstance(value, Indices):
        return ["indices", value.to_text()]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", [_tree(item, tensors) for item in value]]
    if isinstance(value, Mapping):
        return ["dict", [[_tree(key, tensors), _tree(item, tensors)] for key, item in value.items()]]
    raise TypeError(f"a {type(value).__name__} cannot be sent to other processes")


def _name_of(kind: type) -> str:
    if not kind.__module__.startswith(_OURS):
        raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be sent to other processes")
    return f"{kind.__module__}:{kind.__qualname__}"


def _fields(value: Any, tensors: list[torch.Tensor]) -> dict[str, Any]:
    return {field.name: _tree(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}


def unpacked(header: bytes, receive: Callable[[torch.Tensor], None]) -> Any:
    """Return the value of :func:`packed`; ``receive`` fills each of its tensors, in their order."""
    plain = json.loads(header)
    tensors = []
    for dtype, shape in plain["tensors"]:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        receive(tensor)
        tensors.append(tensor)
    return _value(plain["tree"], tensors)


def _value(tree: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, inner = tree[0], tree[1]
    if kind == "record":
        return _record(inner, {name: _value(item, tensors) for name, item in tree[2].items()})
    makers: Mapping[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[inner],
        "path": lambda: Path(inner),
        "indices": lambda: Indices.from_text(inner),
        "list": lambda: [_value(item, tensors) for item in inner],
        "tuple": lambda: tuple(_value(item, tensors) for item in inner),
        "dict": lambda: {_value(key, tensors): _value(item, tensors) for key, item in inner},
    }
    return makers[kind]()


def _record(name: str, fields: Mapping[str, Any]) -> Any:
    """Return a dataclass of this package; ``ValueError`` for any other name."""
    module, _, path = name.partition(":")
    kind: Any = None
    if module.startswith(_OURS):
        kind = import_module(module)
        for part in path.split("."):
            kind = getattr(kind, part, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"{name!r:.80} is no record of this package")
    return kind(**fields)
