"""Quality of models, side by side, on documents that none of them was calibrated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from cusprun.errors import CorpusError, ModelError, UserError
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert, TokenizedDocument
from cusprun.resolve import StrPath
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.pipeline.stages import OpenModel
    from cusprun.quality.likelihood import DocumentLikelihood
    from cusprun.quality.report import EvalReport

HELD_OUT, GENERAL = "held_out", "general"


def evaluate(
    models: StrPath | Sequence[StrPath], expert: StrPath | Expert, *, progress: Progress = SILENT
) -> EvalReport:
    """Measure perplexity on an expert's held-out documents and on its general text, in float32.

    With several models, the first is the reference: the others also get the ratio of perplexities, the mean
    KL divergence and the top-1 agreement. All have bootstrap 95 % intervals over documents.

    Raises:
        ConfigError: the expert file has faults.
        CorpusError: documents are missing, or none is held out.
        ModelError: a model is missing or damaged, or reads the documents as other tokens than the first.
    """
    from cusprun.corpus import build_corpora
    from cusprun.pipeline.stages import as_expert, open_model

    names = [models] if not isinstance(models, Sequence) or isinstance(models, str) else list(models)
    if not names:
        raise UserError("no model was given; name at least one")
    chosen = as_expert(expert)
    opened = [open_model(name, progress) for name in names]
    corpora = build_corpora(chosen, opened[0].index.folder, progress)
    sets = measured_sets(corpora, chosen)
    for other in opened[1:]:
        if measured_sets(build_corpora(chosen, other.index.folder, progress), chosen) != sets:
            raise ModelError(
                f"{other.source} reads the documents as other tokens than {opened[0].source}, so their "
                "perplexities cannot be compared; evaluate them one by one"
            )
    return measure(opened, chosen, sets, progress)


def measured_sets(corpora: Corpora, expert: Expert) -> dict[str, tuple[TokenizedDocument, ...]]:
    """Return the sets of documents that an expert is measured on, by name.

    Raises:
        CorpusError: no document is held out.
    """
    if not corpora.held_out:
        raise CorpusError(
            f"no document of {expert.name!r} is held out; give it more documents or a larger 'held_out'"
        )
    sets = {HELD_OUT: corpora.held_out}
    return {**sets, GENERAL: corpora.general} if corpora.general else sets


def measure(
    opened: Sequence[OpenModel],
    expert: Expert,
    sets: Mapping[str, tuple[TokenizedDocument, ...]],
    progress: Progress = SILENT,
) -> EvalReport:
    """Measure open models on sets of documents; the first is the reference."""
    from cusprun.quality.likelihood import measure_likelihood
    from cusprun.quality.report import EvalReport, ModelQuality, corpus_quality

    documents = [document for group in sets.values() for document in group]
    reference = opened[0].index if len(opened) > 1 else None
    measured = [
        measure_likelihood(model.index, documents, reference, progress=progress)
        for model in (opened[1:] or opened)
    ]
    # A comparison runs the reference anyway, so its own row needs no pass of its own.
    first = measured[0] if reference is None else [_reference_part(found) for found in measured[0]]
    base = _by_set(sets, first)
    rows = [{name: corpus_quality(found) for name, found in base.items()}]
    for likelihoods in measured if reference is not None else ():
        groups = _by_set(sets, likelihoods)
        rows.append({name: corpus_quality(found, base[name]) for name, found in groups.items()})
    return EvalReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cusprun_version=__version__,
        expert=expert.name,
        models=tuple(
            ModelQuality(model.source, model.model_hash, model.index.num_parameters, row)
            for model, row in zip(opened, rows, strict=True)
        ),
    )


def _reference_part(found: DocumentLikelihood) -> DocumentLikelihood:
    return replace(
        found,
        negative_log_likelihood=found.reference_negative_log_likelihood,
        kl_divergence=0.0,
        top1_agreements=0,
        reference_negative_log_likelihood=0.0,
    )


def _by_set(
    sets: Mapping[str, tuple[TokenizedDocument, ...]], likelihoods: Sequence[DocumentLikelihood]
) -> dict[str, Sequence[DocumentLikelihood]]:
    found, start = {}, 0
    for name, group in sets.items():
        found[name] = likelihoods[start : start + len(group)]
        start += len(group)
    return found
