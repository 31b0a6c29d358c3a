"""The proof that artifacts compute the same as the folder they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.errors import ExportError, GateError, ModelError, UserError
from cusprun.pipeline.calibration import first_tokens, known_corpora
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert
from cusprun.resolve import StrPath, as_paths, resolve

if TYPE_CHECKING:
    from exporters.parity_records import ParityReport

PARITY_TOKENS = 4096
"""Tokens of documents that a proof runs over: a top-1 agreement of 99.5 % then rests on 20 tokens."""

_PROBES_PER_DOCUMENT = 20


@dataclass(frozen=True)
class ArtifactRuntime:
    """Where the runtime that proves a format lives."""

    module: str
    class_name: str

    def require(self) -> None:
        """Raise ``MissingDependencyError``, with the command that mends it, when the runtime is missing."""
        import_module(self.module).require()

    def open(self, path: Path, **options: Any) -> Any:
        """Load an artifact."""
        return getattr(import_module(self.module), self.class_name)(path, **options)


RUNTIMES: Mapping[str, ArtifactRuntime] = {
    "gguf": ArtifactRuntime("serve.runtimes.llamacpp", "LlamaCppRuntime"),
    "onnx": ArtifactRuntime("serve.runtimes.onnx_genai", "OnnxGenaiRuntime"),
    "vllm": ArtifactRuntime("serve.runtimes.vllm_server", "VllmRuntime"),
}
"""The runtime that proves each export format."""


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
        UserError: no artifact was given.
        GateError: an artifact is over a limit; the file stays as it is.
        ExportError: a format or precision that no limits are known for.
        ModelError: a model is missing or damaged.
        MissingDependencyError: a runtime is not installed.
    """
    paths = as_paths(artifacts)
    if not paths:
        raise UserError("no artifacts to verify were given; name at least one")
    for path in paths:
        kind_of(path)
    source = resolve(folder, progress).path
    return prove(
        source, paths, parity_documents(known_corpora(source, expert, progress)), progress, reject=False
    )


def kind_of(artifact: Path) -> tuple[str, str]:
    """Return the format and the precision of an artifact.

    Raises:
        ModelError: there is no such file, or it is damaged.
        ExportError: it is of no known format, or of a precision without limits.
    """
    from exporters.registry import FORMATS, kinds_of

    if not artifact.exists():
        raise ModelError(f"{artifact} does not exist; give an exported file or folder")
    kind = next(kinds_of(artifact), None)
    if kind is None:
        raise ExportError(
            f"{artifact} is of no known format ({', '.join(FORMATS)}); give what cusprun export wrote"
        )
    return kind


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
    from cusprun.checkpoint.index import open_checkpoint
    from exporters.parity import verify_artifact
    from exporters.parity_records import limits_for
    from exporters.registry import format_of
    from serve.runtimes.torch_runtime import TorchRuntime

    open_checkpoint(folder)  # says what is wrong with a folder better than stock code
    kinds = [kind_of(artifact) for artifact in artifacts]
    for name, _ in kinds:
        RUNTIMES[name].require()
    reference = TorchRuntime(folder)
    reports, failures = [], []
    try:
        chosen = [list(document) for document in documents] or _probe_documents(reference)
        for artifact, (name, quant) in zip(artifacts, kinds, strict=True):
            cache = limits_for(name, quant).kv_cache
            candidate = RUNTIMES[name].open(artifact, **({"kv_cache": cache} if cache else {}))
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
                        locate=partial(format_of(name).locate, folder, artifact, quant),
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


def parity_documents(corpora: Corpora | None) -> list[tuple[int, ...]]:
    """Return documents of token ids for a proof, none when only the shipped probes are there."""
    return [] if corpora is None else first_tokens(corpora.held_out or corpora.calibration, PARITY_TOKENS)


def _probe_documents(reference: Any) -> list[list[int]]:
    from exporters.parity import MAX_DOCUMENT_TOKENS
    from exporters.parity_text import probe_texts

    texts = probe_texts()
    return [
        reference.tokenize("\n".join(texts[start : start + _PROBES_PER_DOCUMENT]), True)[:MAX_DOCUMENT_TOKENS]
        for start in range(0, len(texts), _PROBES_PER_DOCUMENT)
    ]
