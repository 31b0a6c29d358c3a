"""The corpora that ship with the package, as ``packs/<kind>/<name>.jsonl``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING

from cusprun.corpus.readers import Row, json_rows
from cusprun.errors import CorpusError, require_known

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # moved there in 3.11

_SUFFIX = ".jsonl"


def _root() -> Traversable:
    return resources.files("cusprun.corpus").joinpath("packs")


def pack_names() -> tuple[str, ...]:
    """Return the names of the packs, like ``lang/en``, sorted."""
    return tuple(
        sorted(
            f"{kind.name}/{entry.name.removesuffix(_SUFFIX)}"
            for kind in _root().iterdir()
            if kind.is_dir()
            for entry in kind.iterdir()
            if entry.name.endswith(_SUFFIX)
        )
    )


def read_pack(name: str) -> Iterator[Row]:
    """Yield the rows of a pack; each has a ``text`` or a ``messages`` field.

    Raises:
        CorpusError: there is no such pack; the text names the nearest.
    """
    require_known(name, pack_names(), "pack", CorpusError)
    return _rows(name)


def _rows(name: str) -> Iterator[Row]:
    with _root().joinpath(*f"{name}{_SUFFIX}".split("/")).open("rb") as lines:
        yield from json_rows(lines, f"pack {name}")
