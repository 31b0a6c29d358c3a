"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from cusprun.errors import ModelError, UserError

_GGUF_MAGIC = b"GGUF"


def path_text(path: object) -> str:
    """Return what a user gave for a path as text.

    Raises:
        UserError: it is no path, or empty, or not UTF-8, which the libraries that read weights and tokenizers
            cannot take.
    """
    text = _checked_text(path)
    if not text:
        raise UserError("a path must be text or a Path, not ''")
    return text


def _checked_text(path: object) -> str:
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str):
        raise UserError(f"a path must be text or a Path, not {path!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"the path {text!a} is not UTF-8 text; rename it") from None
    return text


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` expanded; a home that nobody has stays as it is written, as in a shell.

    Raises:
        UserError: it is no path, or not UTF-8.
    """
    _checked_text(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def num_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def is_gguf(path: Path) -> bool:
    """Tell whether a file is GGUF, by its name or its first bytes.

    Raises:
        ModelError: it cannot be read.
    """
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); check the file") from None
