"""The parity gate: does an artifact compute the same as the checkpoint it was made from?"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.codec import dump_json
from cusprun.errors import ExportError, GateError
from cusprun.progress import SILENT, Progress
from exporters.parity_records import Limits, LogitParity, ParityReport, limits_for
from exporters.parity_text import TextRuntime, compare_texts, probe_texts, text_failures

MAX_DOCUMENT_TOKENS = 512  # two float64 tables of 64 rows and both logits: 0.5 GB at 128,000 tokens
_ROWS = 64
_GREEDY_DOCUMENTS = 4
_GREEDY_PROMPT_TOKENS = 32
_GREEDY_NEW_TOKENS = 24
_HASH_CHUNK_BYTES = 1 << 22


class ParityRuntime(TextRuntime, Protocol):
    """What the gate needs of a runtime; every runtime of ``serve.runtimes`` has it."""

    @property
    def name(self) -> str: ...
    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]: ...
    def generate(self, token_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]: ...


@dataclasses.dataclass
class _Sums:
    """Running totals over tokens, so that no more than one document's logits are held."""

    tokens: int = 0
    kl: float = 0.0
    max_kl: float = 0.0
    agreeing: int = 0
    max_difference: float = 0.0
    predicted: int = 0
    nll_reference: float = 0.0
    nll_candidate: float = 0.0


def compare(
    reference: ParityRuntime,
    candidate: ParityRuntime,
    texts: Sequence[str],
    token_documents: Sequence[Sequence[int]],
    limits: Limits,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compare two runtimes on texts and on documents of token ids (cut to 512 tokens each).

    Raises:
        ExportError: there are no documents, so nothing could be proven.
    """
    documents = [list(document[:MAX_DOCUMENT_TOKENS]) for document in token_documents if len(document) > 1]
    if not documents:
        raise ExportError("parity needs at least one document of two tokens; give held-out documents")
    text = compare_texts(reference, candidate, texts)
    logits = _compare_logits(reference, candidate, documents, progress)
    failures = (*text_failures(text), *_logit_failures(logits, limits))
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
    reference: ParityRuntime,
    candidate: ParityRuntime,
    *,
    folder: Path,
    artifact: Path,
    format_name: str,
    quant: str,
    token_documents: Sequence[Sequence[int]],
    texts: Sequence[str] | None = None,
    reject: bool = True,
    progress: Progress = SILENT,
) -> ParityReport:
    """Compare an artifact with its folder, write ``<artifact>.parity.json``, and refuse it when it fails.

    ``reference`` runs ``folder``, ``candidate`` runs ``artifact`` with the KV cache that
    ``limits_for(format_name, quant)`` names; ``texts`` default to the probe strings of the package. With
    ``reject``, an artifact that fails is renamed to ``<artifact>.rejected``: right for one that was just made
    from ``folder``, wrong for a file of the user's, who may have named the wrong folder.

    Raises:
        GateError: the artifact is over a limit.
        ExportError: there are no limits for the format and precision, or no documents.
    """
    report = compare(
        reference,
        candidate,
        probe_texts() if texts is None else texts,
        token_documents,
        limits_for(format_name, quant),
        progress,
    )
    report = dataclasses.replace(
        report,
        format=format_name,
        quant=quant,
        artifact=artifact.name,
        reference_sha256=model_hash(open_checkpoint(folder)),
        artifact_sha256=sha256_of(artifact),
    )
    report_path = artifact.with_name(f"{artifact.name}.parity.json")
    dump_json(report, report_path)
    if report.failures:
        advice = "give the folder that it was made from, or export it again"
        if reject:
            rejected = artifact.with_name(f"{artifact.name}.rejected")
            artifact.replace(rejected)
            advice = f"it was renamed to {rejected.name}"
        raise GateError(
            f"{artifact} does not compute the same as {folder}: {'; '.join(report.failures)}; "
            f"{advice}, see {report_path}"
        )
    return report


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


def _compare_logits(
    reference: ParityRuntime, candidate: ParityRuntime, documents: Sequence[list[int]], progress: Progress
) -> LogitParity:
    sums = _Sums()
    shares: list[float] = []
    with progress.stage("verifying", len(documents), "document") as advance:
        for number, document in enumerate(documents):
            _add_document(sums, reference.logits(document), candidate.logits(document), document)
            if number < _GREEDY_DOCUMENTS:
                shares.append(_greedy_share(reference, candidate, document[:_GREEDY_PROMPT_TOKENS]))
            advance(1)
    return LogitParity(
        documents=len(documents),
        tokens=sums.tokens,
        mean_kl=_finite(sums.kl / sums.tokens),
        max_kl=_finite(sums.max_kl),
        top1_agreement=sums.agreeing / sums.tokens,
        max_abs_logit_difference=_finite(sums.max_difference),
        perplexity_reference=_finite(_perplexity(sums.nll_reference, sums.predicted)),
        perplexity_candidate=_finite(_perplexity(sums.nll_candidate, sums.predicted)),
        greedy_agreement=float(np.mean(shares)),
    )


def _add_document(
    sums: _Sums, wanted: NDArray[np.float32], found: NDArray[np.float32], document: Sequence[int]
) -> None:
    """Add one document, in float64: in float32 the KL of near equal distributions drowns in rounding."""
    if wanted.shape != found.shape:
        raise GateError(
            f"the artifact gives logits of shape {found.shape} where the checkpoint gives {wanted.shape}; "
            "export it again"
        )
    next_ids = np.asarray(document[1:])
    for start in range(0, len(document), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, log_q = _log_softmax(wanted[rows]), _log_softmax(found[rows])
        kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
        sums.tokens += len(kl)
        sums.kl += float(kl.sum())
        sums.max_kl = _larger(sums.max_kl, float(kl.max()))
        sums.max_difference = _larger(sums.max_difference, float(np.abs(wanted[rows] - found[rows]).max()))
        sums.agreeing += int(np.sum(wanted[rows].argmax(axis=1) == found[rows].argmax(axis=1)))
        ids = next_ids[rows]
        positions = np.arange(len(ids))
        sums.predicted += len(ids)
        sums.nll_reference -= float(log_p[positions, ids].sum())
        sums.nll_candidate -= float(log_q[positions, ids].sum())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _larger(first: float, second: float) -> float:
    """Maximum in which NaN wins, so that a broken logit cannot hide behind a sound one."""
    return math.nan if math.isnan(first) or math.isnan(second) else max(first, second)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(nll: float, predicted: int) -> float:
    mean = nll / predicted
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) overflows a float64


def _greedy_share(reference: ParityRuntime, candidate: ParityRuntime, prompt: list[int]) -> float:
    wanted = list(reference.generate(prompt, _GREEDY_NEW_TOKENS))
    found = list(candidate.generate(prompt, _GREEDY_NEW_TOKENS))
    if wanted == found:
        return 1.0
    common = 0
    while common < min(len(wanted), len(found)) and wanted[common] == found[common]:
        common += 1
    return common / max(len(wanted), len(found))


def _logit_failures(parity: LogitParity, limits: Limits) -> Iterator[str]:
    ratio = None
    if parity.perplexity_candidate is not None and parity.perplexity_reference is not None:
        ratio = parity.perplexity_candidate / parity.perplexity_reference
    for what, value, limit in (
        ("the largest logit difference", parity.max_abs_logit_difference, limits.max_abs_logit_difference),
        ("the mean KL in nats per token", parity.mean_kl, limits.mean_kl_max),
        ("the perplexity ratio", ratio, limits.perplexity_ratio_max),
    ):
        if value is None:
            yield f"{what} is not finite"
        elif limit is not None and value > limit:
            yield f"{what} is {value:.3g}, over the limit of {limit:g}"
    least = limits.top1_agreement_min
    if least is not None and parity.top1_agreement < least:
        yield (
            f"the most likely token agrees on {parity.top1_agreement:.2%} of tokens, "
            f"under the limit of {least:.2%}"
        )
