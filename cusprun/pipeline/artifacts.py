"""Artifacts: written from a folder, proven equal to it, and measured against each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.cache import cached, fresh_output, key_of
from cusprun.errors import (
    CusprunError,
    ExportError,
    GateError,
    MissingDependencyError,
    ModelError,
    require_known,
)
from cusprun.progress import SILENT, Progress
from cusprun.records import Expert, Manifest, TokenizedDocument
from cusprun.resolve import StrPath, as_paths, locate, resolve
from cusprun.version import __version__

if TYPE_CHECKING:
    from exporters.parity_records import ParityReport
    from serve.bench.records import BenchOptions, BenchReport

log = logging.getLogger(__name__)

DEFAULT_FORMAT = "gguf"
DEFAULT_QUANT = "f16"
BENCH_QUANT = "q8_0"
"""What a folder is exported to when it is to be measured: what people run, 8 bits."""

PARITY_TOKENS = 4096
"""Tokens of documents that a proof runs over: a top-1 agreement of 99.5 % then rests on 20 tokens."""

_PROBES_PER_DOCUMENT = 20
_MANIFEST_NAME = "cusprun.json"


@dataclass(frozen=True)
class ArtifactRuntime:
    """Where the runtime that proves a format lives, and what installs it."""

    module: str
    class_name: str
    library: str
    command: str

    def require(self) -> None:
        """Raise ``MissingDependencyError`` when the runtime's library is not installed."""
        if find_spec(self.library) is None:
            raise MissingDependencyError(
                f"{self.library} is not installed, so nothing could be proven or measured; run: "
                f"{self.command} (or export without a proof: --no-verify)"
            )

    def open(self, path: Path, **options: Any) -> Any:
        """Load an artifact."""
        from importlib import import_module

        return getattr(import_module(self.module), self.class_name)(path, **options)


RUNTIMES: Mapping[str, ArtifactRuntime] = {
    "gguf": ArtifactRuntime(
        "serve.runtimes.llamacpp", "LlamaCppRuntime", "llama_cpp", "pip install 'cusprun[llamacpp]'"
    ),
}
"""The runtime that proves each export format."""


def export(
    folder: StrPath,
    out: StrPath,
    *,
    to: str = DEFAULT_FORMAT,
    quant: str = DEFAULT_QUANT,
    verify: bool = True,
    expert: StrPath | Expert | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Write a model as an artifact for a runtime, prove that it computes the same, and return its path.

    ``quant`` is ``f32``, ``f16``, ``bf16`` or ``q8_0``. The proof (see :func:`verify`) leaves
    ``<out>.parity.json``; an artifact that fails it is renamed to ``<out>.rejected``.

    Raises:
        ExportError: the format or precision is unknown, or the model cannot be written in it.
        ModelError: the model is missing, damaged or holds weights that are not finite.
        OutputError: ``out`` exists, cannot be written or does not fit on the disk.
        MissingDependencyError: the runtime that the proof needs is not installed.
        GateError: the artifact does not compute the same.
    """
    from cusprun.checkpoint.index import open_checkpoint
    from exporters.registry import format_of

    target = fresh_output(out)
    chosen = format_of(to)
    require_known(quant, chosen.quants, f"{to} precision", ExportError)
    if verify:
        RUNTIMES[to].require()
    source = resolve(folder, progress).path
    for loss in chosen.check(open_checkpoint(source), quant):
        log.info("note: %s", loss)
    chosen.export(source, target, quant=quant, progress=progress)
    if verify:
        try:
            prove(source, [target], parity_documents(source, expert, progress), progress)
        except BaseException:
            # Interrupted or refused: an unproven file must not look like a proven one, or block the next try.
            target.unlink(missing_ok=True)
            raise
    return target


def verify(
    folder: StrPath,
    artifacts: StrPath | Sequence[StrPath],
    *,
    expert: StrPath | Expert | None = None,
    progress: Progress = SILENT,
) -> tuple[ParityReport, ...]:
    """Prove that artifacts compute the same as the folder they were made from.

    Compared are the token ids of texts in many scripts, chat prompts, special tokens, and the logits over
    documents: the held-out ones of ``expert``, or of the expert that the folder's ``cusprun.json`` names when
    it is made of packs alone, or else the shipped probe texts. Every artifact gets a ``.parity.json``.

    Raises:
        GateError: an artifact is over a limit; the file stays as it is.
        ExportError: a format or precision that no limits are known for.
        ModelError: a model is missing or damaged.
        MissingDependencyError: a runtime is not installed.
    """
    paths = as_paths(artifacts)
    for path in paths:
        kind_of(path)
    source = resolve(folder, progress).path
    return prove(source, paths, parity_documents(source, expert, progress), progress, reject=False)


def kind_of(artifact: Path) -> tuple[str, str]:
    """Return the format and the precision of an artifact.

    Raises:
        ModelError: there is no such file, or it is damaged.
        ExportError: it is of no known format, or of a precision without limits.
    """
    from cusprun.checkpoint.gguf_header import read_gguf
    from exporters.gguf_tensors import QUANTS
    from exporters.registry import FORMATS

    if not artifact.exists():
        raise ModelError(f"{artifact} does not exist; give an exported file")
    formats = {entry.suffix: name for name, entry in FORMATS.items()}
    if artifact.suffix not in formats:
        raise ExportError(f"{artifact} is of no known format; give a file that ends in {', '.join(formats)}")
    file_type = read_gguf(artifact).metadata.get("general.file_type")
    quants = {int(number): name for name, (_, number) in QUANTS.items()}
    if file_type not in quants:
        raise ExportError(
            f"{artifact} has the GGUF file type {file_type}, for which there are no limits "
            f"(known: {', '.join(sorted(quants.values()))}); export it again with one of these"
        )
    return formats[artifact.suffix], quants[file_type]


def prove(
    folder: Path,
    artifacts: Sequence[Path],
    documents: Sequence[Sequence[int]],
    progress: Progress,
    *,
    reject: bool = True,
) -> tuple[ParityReport, ...]:
    """Compare artifacts with the folder; with no ``documents``, on the shipped probe texts.

    All are compared before the first failure is raised; with ``reject`` those that fail are renamed.
    """
    from exporters.parity import verify_artifact
    from exporters.parity_records import limits_for
    from serve.runtimes.torch_runtime import TorchRuntime

    kinds = [kind_of(artifact) for artifact in artifacts]
    for name, _ in kinds:
        RUNTIMES[name].require()
    reference = TorchRuntime(folder)
    reports, failures = [], []
    try:
        chosen = [list(document) for document in documents] or _probe_documents(reference)
        for artifact, (name, quant) in zip(artifacts, kinds, strict=True):
            candidate = RUNTIMES[name].open(artifact, kv_cache=limits_for(name, quant).kv_cache)
            try:
                reports.append(
                    verify_artifact(
                        reference,
                        candidate,
                        folder=folder,
                        artifact=artifact,
                        format_name=name,
                        quant=quant,
                        token_documents=chosen,
                        reject=reject,
                        progress=progress,
                    )
                )
            except GateError as error:
                failures.append(str(error))
            finally:
                candidate.close()
    finally:
        reference.close()
    if failures:
        raise GateError(" ".join(failures))
    return tuple(reports)


def parity_documents(
    folder: Path, expert: StrPath | Expert | None, progress: Progress
) -> list[tuple[int, ...]]:
    """Return documents of token ids for a proof, or none when only the shipped probes are there."""
    from cusprun.corpus import build_corpora
    from cusprun.pipeline.stages import as_expert

    if expert is not None:
        corpora = build_corpora(as_expert(expert), folder, progress)
        return first_tokens(corpora.held_out or corpora.calibration)
    known = _expert_of(folder)
    if known is None:
        return []
    try:
        return first_tokens(build_corpora(known, folder, progress).held_out)
    except CusprunError:
        return []


def first_tokens(documents: Sequence[TokenizedDocument], limit: int = PARITY_TOKENS) -> list[tuple[int, ...]]:
    """Return the first documents that together have at least ``limit`` tokens."""
    taken: list[tuple[int, ...]] = []
    for document in documents:
        if sum(map(len, taken)) >= limit:
            break
        taken.append(document.token_ids)
    return taken


def _expert_of(folder: Path) -> Expert | None:
    """Return the expert of a folder's manifest when its sources, packs alone, are surely there."""
    from cusprun.codec import load_json

    try:
        expert = load_json(Manifest, folder / _MANIFEST_NAME).expert
    except CusprunError:
        return None
    sources = [source for group in (*expert.dimensions.values(), expert.general) for source in group]
    return expert if all(source.pack for source in sources) else None


def _probe_documents(reference: Any) -> list[list[int]]:
    from exporters.parity import MAX_DOCUMENT_TOKENS
    from exporters.parity_text import probe_texts

    texts = probe_texts()
    return [
        reference.tokenize("\n".join(texts[start : start + _PROBES_PER_DOCUMENT]), True)[:MAX_DOCUMENT_TOKENS]
        for start in range(0, len(texts), _PROBES_PER_DOCUMENT)
    ]


def bench(
    before: StrPath,
    after: StrPath,
    *,
    quant: str = BENCH_QUANT,
    options: BenchOptions | None = None,
    progress: Progress = SILENT,
) -> BenchReport:
    """Measure two models against each other in llama.cpp: load time, latency, speed and peak memory.

    GGUF files are measured as they are; anything else is exported to ``quant`` first, once, into the cache.

    Raises:
        ConfigError: an option cannot be.
        ModelError: a model is missing or damaged.
        MissingDependencyError: llama-cpp-python is not installed.
        MeasurementError: the benchmark could not be finished.
    """
    from serve.bench.orchestrate import bench as run_bench

    RUNTIMES["gguf"].require()
    paths = [_measurable(model, quant, progress) for model in (before, after)]
    return run_bench(paths[0], paths[1], options, progress)


def _measurable(model: StrPath, quant: str, progress: Progress) -> Path:
    from cusprun.checkpoint.index import model_hash, open_checkpoint
    from exporters.registry import format_of

    located = locate(model, progress)
    if located.path.is_file():
        return located.path
    gguf_format = format_of("gguf")
    require_known(quant, gguf_format.quants, "gguf precision", ExportError)
    key = key_of("gguf", model_hash(open_checkpoint(located.path)), quant, __version__)
    return cached(
        "artifacts",
        f"{located.path.name}-{quant}-{key}.gguf",
        lambda path: gguf_format.export(located.path, path, quant=quant, progress=progress),
    )[0]
