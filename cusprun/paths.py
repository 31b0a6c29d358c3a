"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from cusprun.errors import ModelError, UserError

_GGUF_MAGIC = b"GGUF"


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` expanded; a home that nobody has stays as it is written, as in a shell.

    Raises:
        UserError: the path is not UTF-8, which the libraries that read weights and tokenizers cannot take.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the path {os.fspath(path)!a} is not UTF-8 text; rename it") from None
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


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
