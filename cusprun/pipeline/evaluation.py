"""Quality of models, side by side, on documents that none of them was calibrated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.codec import key_of
from cusprun.errors import CorpusError, ModelError, UserError, require_kind
from cusprun.pipeline.workspaces import require_measuring_memory, require_whole_model, workspace_of
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert, TokenizedDocument
from cusprun.resolve import StrPath
from cusprun.version import __version__
from cusprun.walk.device import DEFAULT_DEVICE, open_device

if TYPE_CHECKING:
    from cusprun.pipeline.opening import OpenModel
    from cusprun.quality.likelihood import DocumentLikelihood
    from cusprun.quality.report import EvalReport, ModelQuality
    from cusprun.quality.tasks import Task

HELD_OUT, GENERAL = "held_out", "general"


def evaluate(
    models: StrPath | Sequence[StrPath],
    expert: StrPath | Expert,
    tasks: StrPath | None = None,
    *,
    batch_size: int | None = None,
    device: str = DEFAULT_DEVICE,
    memory: int | str | None = None,
    workdir: StrPath | None = None,
    progress: Progress = SILENT,
) -> EvalReport:
    """Measure perplexity on an expert's held-out documents and on its general text, in float32; and tasks.

    With several models, the first is the reference: the others also get the ratio of perplexities, the mean
    KL divergence and the top-1 agreement. All have bootstrap 95 % intervals over documents.

    ``tasks`` is a file of tasks, as told at :func:`cusprun.quality.tasks.load_tasks`, that lm-eval runs on
    each model in the type of its weights, ``batch_size`` prompts at a time (8); the others also get the
    difference of their scores and the reference's. ``device``, ``memory`` and ``workdir`` are those of
    :func:`cusprun.score`; tasks hold a whole model.

    Raises:
        DeviceError: the device is unknown, does not work or has too little memory.
        ConfigError: the expert file or the tasks file has faults.
        CorpusError: documents are missing, or none is held out.
        MissingDependencyError: there are tasks, and lm-eval is not installed.
        ModelError: a model is missing or damaged, or reads the documents as other tokens than the first.
        UserError: a task does not fit a model's context, there is a batch size and no task, or the memory is
            too little.
    """
    from cusprun.corpus import build_corpora
    from cusprun.pipeline.opening import as_expert, open_model

    names = [models] if not isinstance(models, Sequence) or isinstance(models, str) else list(models)
    if not names:
        raise UserError("no model was given; name at least one")
    _check_batch_size(batch_size, tasks)
    where = open_device(device)
    chosen = as_expert(expert)
    wanted = () if tasks is None else _ready_tasks(Path(tasks))
    workspace = workspace_of(memory, workdir=workdir)
    opened = [open_model(name, progress, where, workspace) for name in names]
    _require_room(opened, wanted)
    corpora = build_corpora(chosen, opened[0].index.folder, progress)
    sets = measured_sets(corpora, chosen)
    for other in opened[1:]:
        if measured_sets(build_corpora(chosen, other.index.folder, progress), chosen) != sets:
            raise ModelError(
                f"{other.source} reads the documents as other tokens than {opened[0].source}, so their "
                "perplexities cannot be compared; evaluate them one by one"
            )
    report = measure(opened, chosen, sets, progress)
    return measure_tasks(report, opened, wanted, batch_size, progress) if wanted else report


def _check_batch_size(batch_size: int | None, tasks: StrPath | None) -> None:
    if batch_size is None:
        return
    require_kind(batch_size, int, "the batch size")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}")
    if tasks is None:
        raise UserError("the batch size is that of tasks, and none were given; name tasks, or leave it out")


def _ready_tasks(path: Path) -> tuple[Task, ...]:
    from cusprun.quality.task_run import require_lm_eval
    from cusprun.quality.tasks import load_tasks

    require_lm_eval()
    return load_tasks(path)


def _require_room(opened: Sequence[OpenModel], tasks: Sequence[Task]) -> None:
    from cusprun.quality.task_run import require_room

    for model in opened if tasks else ():
        require_whole_model(model, "tasks")
        require_room(model.index.folder, context_length(model), tasks)


def context_length(model: OpenModel) -> int | None:
    """Return how many tokens a model reads at most, where its config says so."""
    value = model.index.config.get("max_position_embeddings")
    return value if isinstance(value, int) else None


def measure_tasks(
    report: EvalReport,
    opened: Sequence[OpenModel],
    tasks: Sequence[Task],
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> EvalReport:
    """Return a report of open models with their scores on tasks; the first is the reference."""
    from cusprun.quality.report import task_quality
    from cusprun.quality.task_run import DEFAULT_BATCH_SIZE, score_tasks

    rows: list[ModelQuality] = []
    reference: Mapping[str, Sequence[float]] = {}
    for model, row in zip(opened, report.models, strict=True):
        scores = score_tasks(
            model.index.folder,
            context_length(model),
            tasks,
            batch_size=batch_size or DEFAULT_BATCH_SIZE,
            device=model.device,
            progress=progress,
        )
        qualities = tuple(
            task_quality(
                task.spec.name, task.spec.metric, scores[task.spec.name], reference.get(task.spec.name)
            )
            for task in tasks
        )
        rows.append(replace(row, tasks=qualities))
        reference = reference or scores
    return replace(report, models=tuple(rows))


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
    require_measuring_memory(opened, documents)
    measured = [
        measure_likelihood(
            model.index,
            documents,
            reference,
            key=key_of(model.model_hash, opened[0].model_hash, len(opened) > 1),
            device=model.device,
            workspace=model.workspace,
            progress=progress,
        )
        for model in (opened[1:] or opened)
    ]
    # A comparison runs the reference anyway, so its own row needs no pass of its own.
    first = measured[0] if reference is None else [_reference_part(found) for found in measured[0]]
    base = by_set(sets, first)
    rows = [{name: corpus_quality(found) for name, found in base.items()}]
    for likelihoods in measured if reference is not None else ():
        groups = by_set(sets, likelihoods)
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


def by_set(
    sets: Mapping[str, tuple[TokenizedDocument, ...]], likelihoods: Sequence[DocumentLikelihood]
) -> dict[str, Sequence[DocumentLikelihood]]:
    """Return the likelihoods of each of ``sets``; they are of its documents, set after set."""
    found, start = {}, 0
    for name, group in sets.items():
        found[name] = likelihoods[start : start + len(group)]
        start += len(group)
    return found
