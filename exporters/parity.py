"""The parity gate: does an artifact compute the same as the checkpoint it was made from?"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.checkpoint.output import remove
from cusprun.codec import dump_json
from cusprun.errors import CusprunError, ExportError, GateError
from cusprun.progress import SILENT, Progress
from exporters.parity_logits import LogitRuntime, LogProbRuntime, compare_logits, logit_failures
from exporters.parity_records import Limits, ParityReport, limits_for
from exporters.parity_text import compare_texts, probe_texts, text_failures

MAX_DOCUMENT_TOKENS = 512  # two float64 tables of 64 rows and both logits: 0.5 GB at 128,000 tokens
_HASH_CHUNK_BYTES = 1 << 22


class Named(Protocol):
    """Something with a name and a version."""

    @property
    def name(self) -> str: ...


class Sized(Protocol):
    """A runtime that may take short texts only."""

    @property
    def max_tokens(self) -> int | None: ...


class Reference(LogitRuntime, Named, Protocol):
    """What the gate needs of the runtime of the checkpoint."""


class LogitCandidate(LogitRuntime, Named, Sized, Protocol):
    """A runtime of an artifact that gives logits; every one in this process does."""


class LogProbCandidate(LogProbRuntime, Named, Sized, Protocol):
    """A runtime of an artifact that gives the likeliest tokens only, as servers do."""


def compare(
    reference: Reference,
    candidate: LogitCandidate | LogProbCandidate,
    texts: Sequence[str],
    token_documents: Sequence[Sequence[int]],
    limits: Limits,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compare two runtimes on texts and on documents of token ids.

    Documents are cut to 512 tokens each, or to what the candidate takes.

    Raises:
        ExportError: there are no documents, so nothing could be proven.
    """
    longest = min(MAX_DOCUMENT_TOKENS, candidate.max_tokens or MAX_DOCUMENT_TOKENS)
    documents = [list(document[:longest]) for document in token_documents if len(document) > 1]
    if not documents:
        raise ExportError("parity needs at least one document of two tokens; give held-out documents")
    text = compare_texts(reference, candidate, texts)
    logits = compare_logits(reference, candidate, documents, longest, progress)
    failures = (*text_failures(text), *logit_failures(logits, limits))
    return ParityReport(
        verdict="fail" if failures else "pass",
        failures=failures,
        reference=reference.name,
        candidate=candidate.name,
        limits=limits,
        text=text,
        logits=logits,
    )


def verify_artifact(
    reference: Reference,
    candidate: LogitCandidate | LogProbCandidate,
    *,
    folder: Path,
    artifact: Path,
    format_name: str,
    quant: str,
    token_documents: Sequence[Sequence[int]],
    texts: Sequence[str] | None = None,
    reject: bool = True,
    locate: Callable[[], str | None] | None = None,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compare an artifact with its folder, write ``<artifact>.parity.json``, and refuse it when it fails.

    ``reference`` runs ``folder``, ``candidate`` runs ``artifact`` with the KV cache that
    ``limits_for(format_name, quant)`` names; ``texts`` default to the probe strings of the package. With
    ``reject``, an artifact that fails is renamed to ``<artifact>.rejected``: right for one that was just made
    from ``folder``, wrong for a file of the user's, who may have named the wrong folder. ``locate`` is asked
    which tensor differs first when the artifact fails, and for the precisions whose limits say so always.

    Raises:
        GateError: the artifact is over a limit.
        ExportError: there are no limits for the format and precision, or no documents.
    """
    index = open_checkpoint(folder)
    limits = limits_for(format_name, quant, index.family.activation)
    report = compare(
        reference, candidate, probe_texts() if texts is None else texts, token_documents, limits, progress
    )
    report = dataclasses.replace(
        report,
        format=format_name,
        quant=quant,
        artifact=artifact.name,
        reference_sha256=model_hash(index),
        artifact_sha256=sha256_of(artifact),
    )
    if locate is not None and (report.failures or limits.compares_weights):
        report = _with_difference(report, locate)
    report_path = artifact.with_name(f"{artifact.name}.parity.json")
    dump_json(report, report_path)
    if report.failures:
        advice = "give the folder that it was made from, or export it again"
        if reject:
            rejected = artifact.with_name(f"{artifact.name}.rejected")
            remove(rejected)  # of an earlier try; a folder cannot take the place of another one
            artifact.rename(rejected)
            advice = f"it was renamed to {rejected.name}"
        found = f" ({report.first_difference})" if report.first_difference else ""
        raise GateError(
            f"{artifact} does not compute the same as {folder}: {'; '.join(report.failures)}{found}; "
            f"{advice}, see {report_path}"
        )
    return report


def _with_difference(report: ParityReport, locate: Callable[[], str | None]) -> ParityReport:
    """Add where the weights differ, which fails an artifact even if no text has met the difference.

    An artifact too damaged to be read has said so by failing.
    """
    try:
        difference = locate()
    except (CusprunError, OSError, ValueError, KeyError) as error:
        difference = f"its weights cannot be compared: {error}" if report.failures else None
    if difference is None:
        return report
    failures = report.failures or ("its weights are not those of the checkpoint",)
    return dataclasses.replace(report, verdict="fail", failures=failures, first_difference=difference)


def sha256_of(artifact: Path) -> str:
    """Return the SHA-256 of a file, or over names and contents of all files of a folder."""
    digest = hashlib.sha256()
    files = [artifact] if artifact.is_file() else sorted(p for p in artifact.rglob("*") if p.is_file())
    for file in files:
        if file != artifact:
            digest.update(f"{file.relative_to(artifact).as_posix()}|{file.stat().st_size}|".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
