"""Deployment: the files that put an artifact on the machine it is for."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import file_sha256, fresh_output
from cusprun.checkpoint.output import atomic_folder, require_space
from cusprun.errors import ExportError, ModelError, UserError
from cusprun.pipeline.deploy_facts import format_of_artifact, gather
from cusprun.pipeline.deploy_sizing import Request
from cusprun.progress import SILENT, Progress
from cusprun.resolve import StrPath, locate

if TYPE_CHECKING:
    from deploy.facts import Facts
    from deploy.render import File

log = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
SUMS_NAME = "SHA256SUMS"
_EPOCH_VARIABLE = "SOURCE_DATE_EPOCH"
_EARLIEST_S = 315_532_800  # 1980-01-01, the first date that a zip archive can hold
_PLATFORM = "platform"
_ORIGINAL = "original"


def deploy(
    artifact: StrPath,
    to: str,
    out: StrPath,
    *,
    memory: int | None = None,
    context: int | None = None,
    parallel: int | None = None,
    platform: str | None = None,
    results: StrPath | None = None,
    options: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write a folder that puts an artifact to work, and return its path.

    ``to`` is ``bundle`` (a machine without a network), ``ollama``, ``docker``, ``kubernetes`` or ``systemd``.
    Context and cache are chosen so that the server fits into ``memory`` bytes; ``context`` tokens and
    ``parallel`` requests at once are kept where given. ``results`` is a benchmark of the artifact, whose peak
    is what resources rest on; without one they are planned from the artifact's headers. ``platform`` and
    ``options`` are the target's own. The folder holds checksums, a manifest and a README. The same input
    gives the same bytes; the files have the time ``$SOURCE_DATE_EPOCH`` or that of 1980-01-01.

    Raises:
        UserError: the target or an option is unknown, or the memory is too little.
        ExportError: the target does not serve the artifact's format.
        ModelError: the artifact is missing or damaged.
        OutputError: ``out`` exists, cannot be written or does not fit on the disk.
        MissingDependencyError: a package that serves the artifact is not installed.
    """
    from deploy.targets import complete_options, load, target_of

    target = target_of(to)
    given = dict(options or {})
    if platform is not None and given.setdefault(_PLATFORM, platform) != platform:
        raise UserError(f"the platforms {platform!r} and {given[_PLATFORM]!r} are asked for; give one")
    wanted = complete_options(target, given)
    folder = fresh_output(out)
    modified_s = _modified_s()
    source = locate(artifact, progress).path
    format_name = format_of_artifact(source)
    if format_name not in target.formats:
        raise ExportError(
            f"the target {to} serves no {format_name} artifacts ({source}); export the model to "
            f"{' or '.join(sorted(target.formats))}"
        )
    beside_bytes = target.beside_bytes.get(format_name, 0)
    request = Request(memory, context, parallel, None if results is None else Path(results), beside_bytes)
    facts = gather(source, format_name, request, progress=progress)
    if wanted.get(_ORIGINAL) is not None:
        path = Path(str(wanted[_ORIGINAL])).expanduser()
        facts = replace(facts, original=_original(path, facts, beside_bytes, progress))
    module = load(target)
    module.check(facts, wanted)
    require_space(folder, facts.artifact_bytes + (facts.original.artifact_bytes if facts.original else 0))
    root = source.absolute() if facts.artifact_is_folder else source.absolute().parent
    with atomic_folder(folder) as partial:
        write_files(partial, module.files(facts, wanted), facts, root, modified_s)
    return folder


def _original(path: Path, facts: Facts, beside_bytes: int, progress: Progress) -> Facts:
    """Return the facts of an artifact to be served beside, with the same context, requests and threads.

    Raises:
        ExportError: it is of another format.
    """
    found = format_of_artifact(path)
    if found != facts.format:
        raise ExportError(
            f"the original {path} is of the format {found} and the expert of {facts.format}; export the "
            f"original to {facts.format} as well"
        )
    sizing = facts.sizing
    request = Request(None, sizing.context_tokens, sizing.parallel, None, beside_bytes)
    original = gather(path, found, request, progress=progress)
    return replace(original, sizing=replace(original.sizing, num_threads=sizing.num_threads))


def write_files(
    folder: Path, files: Iterable[File], facts: Facts, root: Path, modified_s: int
) -> Mapping[str, str]:
    """Write files, the manifest and the checksums into a folder; return the checksums by path.

    ``root`` is where the artifact's own files lie, ``modified_s`` the time that everything gets.
    """
    from cusprun.codec import json_bytes
    from deploy.render import File

    sums: dict[str, str] = {}
    manifest = File(MANIFEST_NAME, json_bytes(_sorted(facts)))
    for file in chain(files, [manifest]):
        sums[file.path] = _write(folder, file, root)
        if isinstance(file.content, Path):
            name = file.content.as_posix()
            if facts.sha256.get(name, sums[file.path]) != sums[file.path]:
                raise ModelError(f"{root / name} was changed meanwhile; deploy it again")
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items()))
    _write(folder, File(SUMS_NAME, lines.encode()), root)
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):
        if path.is_dir():
            path.chmod(0o755)
        os.utime(path, (modified_s, modified_s))
    return sums


def _write(folder: Path, file: File, root: Path) -> str:
    """Write one file and return its SHA-256."""
    target = folder / file.path
    assert target.resolve().is_relative_to(folder.resolve()), file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    assert not target.exists(), f"{file.path} is written twice"
    if isinstance(file.content, bytes):
        target.write_bytes(file.content)
    else:
        # A copy: a hard link would share its time and its contents with the artifact, which stays as it is.
        shutil.copyfile(root / file.content, target)
    target.chmod(0o755 if file.executable else 0o644)
    return file_sha256(target)


def _sorted(facts: Facts) -> object:
    """Return the facts with their keys in order."""
    from cusprun.codec import to_plain

    def ordered(value: object) -> object:
        if isinstance(value, dict):
            return {key: ordered(value[key]) for key in sorted(value)}
        return [ordered(item) for item in value] if isinstance(value, list) else value

    return ordered(to_plain(facts))


def _modified_s() -> int:
    stated = os.environ.get(_EPOCH_VARIABLE, "")
    if not stated:
        return _EARLIEST_S
    if not stated.isdecimal() or len(stated) > 12:
        raise UserError(f"{_EPOCH_VARIABLE} must be seconds since 1970, not {stated!r:.60}; unset it")
    return int(stated)
