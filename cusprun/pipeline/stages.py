"""From a model and an expert to a smaller model: score, plan, prune."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import fresh_output
from cusprun.errors import CorpusError, PlanError, require_known
from cusprun.pipeline.opening import OpenModel, as_expert, corpora_of, open_model
from cusprun.pipeline.shared import (
    refuse_shared_neurons,
    require_same_wishes,
    tell_of_idle_gpus,
    written_together,
)
from cusprun.pipeline.wishes import DEFAULT_RATIO, PlanWishes, PruneWishes, stores_of, texts_of
from cusprun.pipeline.workspaces import require_pruning_memory, require_units, workspace_of
from cusprun.progress import SILENT, Progress
from cusprun.records import GRANULARITIES, Corpora, Expert, Manifest, NeuronManifest, Plan
from cusprun.resolve import StrPath, as_paths
from cusprun.walk.device import DEFAULT_DEVICE, DEFAULT_DTYPE, open_device
from cusprun.walk.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from cusprun.pruning.planner import Planner
    from cusprun.pruning.store import ImpactStore

log = logging.getLogger(__name__)


def score(
    model: StrPath,
    expert: StrPath | Expert,
    out: StrPath,
    *,
    granularity: str = "unit",
    device: str = DEFAULT_DEVICE,
    dtype: str = DEFAULT_DTYPE,
    ranks: Ranks = ALONE,
    memory: int | str | None = None,
    workdir: StrPath | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Score every FFN channel, query head, KV group and block on an expert's documents into a store ``out``.

    With ``granularity="neuron"`` the store holds single rows of Q, K and V, columns of O and FFN channels. A
    store of the same model and documents in the cache is copied, and nothing is computed again. ``device`` is
    ``cpu``, ``cuda``, ``cuda:N`` or ``auto``, which is CUDA where it works, and ``dtype`` what linear layers
    multiply in there, ``float32`` or ``bfloat16`` (see ``docs/devices.md``). ``memory``, bytes or a text like
    ``4GB``, is what the work may take beside files that the system holds in memory as long as it has room;
    batches are made to fit it. ``workdir`` is the folder for hidden states and unfinished work, from which
    the same call goes on after a crash: the cache when not given. ``ranks`` are processes that share the
    documents (:class:`cusprun.walk.shared_run.SharedRun`): each calls this, and the first writes.

    Raises:
        DeviceError: the device or dtype is unknown, or the device does not work or has too little memory.
        UserError: an unknown granularity, ranks that differ in what they are given, or a memory that is too
            little; the text says what would do.
        RankError: another rank failed or was lost.
        ConfigError: the expert file has faults.
        CorpusError: documents are missing or unreadable.
        ModelError: the model is missing, damaged or holds weights that are not finite.
        OutputError: ``out`` exists or cannot be written.
    """
    from cusprun.pipeline.neurons import scored_neurons
    from cusprun.pipeline.scores import copy_store

    require_known(granularity, GRANULARITIES, "granularity")
    require_units(memory, granularity)
    refuse_shared_neurons(granularity, ranks)
    where = open_device(device, ranks.local_rank, dtype)
    tell_of_idle_gpus(where, ranks)
    target = ranks.from_first(lambda: fresh_output(out))
    chosen = as_expert(expert)
    opened = open_model(model, progress, where, workspace_of(memory, ranks, workdir))
    require_same_wishes(opened, {"granularity": granularity})
    corpora = corpora_of(opened, chosen, progress)
    if granularity == "neuron":
        store = scored_neurons(opened, chosen, corpora, progress=progress)
    else:
        store = scored(opened, chosen, corpora, progress)
    ranks.from_first(lambda: copy_store(store, target, chosen.name))
    return target


def plan(
    model: StrPath,
    scores: StrPath | Sequence[StrPath],
    *,
    ratio: float | None = None,
    target_params: int | None = None,
    target_bytes: int | None = None,
    targets: Sequence[str] = (),
    units: Sequence[str] = (),
    rule: str | None = None,
    out: StrPath | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Choose the shape and the units that survive, from one store of scores or several.

    One budget may be given: ``ratio`` is the share of the decoder blocks' attention and FFN parameters that
    goes (0.25 when no budget is given), ``target_params`` the most parameters of the expert,
    ``target_bytes`` the most bytes of its file in the one gguf target. ``targets`` are what it is to run in,
    like ``gguf:q8_0`` or ``vllm:tp2``; ``units`` the kinds that may go, of ``ffn_channel``, ``query_head``,
    ``kv_group`` (these three unless given) and ``block``; ``rule`` is one of ``cusprun.pruning.rules.RULES``.
    With ``out`` the plan is also written as JSON, which may be edited and given to :func:`prune`.

    Raises:
        PlanError: the budget is out of range or no legal shape keeps it, or the scores are another model's.
        CorpusError: the scored documents are too few for the rule, or cannot separate any units.
        StoreError: a store is missing, damaged, given twice or made with other tokens.
        OutputError: ``out`` exists or cannot be written.
        UserError: a rule, target or kind of unit is unknown, or several budgets are given.
    """
    from cusprun.checkpoint.output import atomic_file
    from cusprun.codec import json_bytes
    from cusprun.pruning.store import open_store

    target = None if out is None else fresh_output(out)
    wishes = PlanWishes(
        ratio=ratio,
        rule=rule,
        targets=texts_of(targets, "targets"),
        units=texts_of(units, "units"),
        target_params=target_params,
        target_bytes=target_bytes,
    )
    wishes.check()
    store = open_store(as_paths(scores))
    opened = open_model(model, progress)
    made = _planner(opened, store, wishes).plan(wishes.budget(opened.index))
    if target is not None:
        with atomic_file(target) as partial:
            partial.write_bytes(json_bytes(made))
    return made


def prune(
    model: StrPath,
    expert: StrPath | Expert,
    out: StrPath,
    *,
    ratio: float | None = None,
    target_params: int | None = None,
    target_bytes: int | None = None,
    max_loss: float | None = None,
    scores: StrPath | Sequence[StrPath] | None = None,
    plan: StrPath | Plan | None = None,
    rule: str | None = None,
    targets: Sequence[str] = (),
    units: Sequence[str] = (),
    granularity: str = "unit",
    refit: bool = True,
    dimension_weights: Mapping[str, float] | None = None,
    refit_target: str | None = None,
    shard_bytes: int | None = None,
    device: str = DEFAULT_DEVICE,
    dtype: str = DEFAULT_DTYPE,
    ranks: Ranks = ALONE,
    memory: int | str | None = None,
    workdir: StrPath | None = None,
    progress: Progress = SILENT,
) -> Manifest | NeuronManifest:
    """Write the smaller model that an expert needs as a Hugging Face folder; return its manifest.

    Scores and plans itself when given neither ``scores`` nor ``plan``. The budget, ``rule``, ``targets`` and
    ``units`` are those of :func:`plan`; ``max_loss`` is one budget more: the largest cut whose perplexity on
    the held-out documents is at most that share above the original's, found by making and measuring up to
    seven experts. A ``plan`` brings its own budget, rule, targets and units; edited, it is applied as it
    stands, else the rule ``surgeon`` lets the refit choose its FFN channels again.
    ``refit`` makes good for what went, by least squares or, with the rule ``variance+bias``, by biases;
    ``dimension_weights`` says how much the documents of a dimension count in the least squares (1 each), and
    ``refit_target`` what they aim at: ``output`` (the default), ``residual`` or ``auto`` (see
    ``docs/method.md``). With
    ``granularity="neuron"`` single neurons of every matrix are zeroed by the rule (``paper`` unless given) in
    ``ratio``, and every shape stays. ``shard_bytes`` bounds a weight file (2 GB). ``device``, ``dtype``,
    ``memory``, ``workdir`` and ``ranks`` are those of :func:`score`.

    However it is interrupted, called again it goes on from the last finished layer, and writes the same bytes
    as without an interruption; but for ``created`` and ``seconds`` of the manifest, where the environment
    does not set ``SOURCE_DATE_EPOCH`` (see :mod:`cusprun.clock`).

    Raises:
        DeviceError: the device or dtype is unknown, or the device does not work or has too little memory.
        ConfigError: the expert file has faults.
        CorpusError: documents are missing, unreadable or too few for the rule, or none is held out to
            measure ``max_loss`` on.
        ModelError: the model is missing, damaged or holds weights that are not finite.
        PlanError: no legal shape keeps the budget, the plan is malformed or another model's, or the refit
            target is not for the family.
        StoreError: a store is missing, damaged, given twice or made with other tokens.
        OutputError: ``out`` exists, cannot be written or does not fit on the disk.
        UserError: a rule, target, kind of unit or dimension is unknown, wishes contradict one another, or
            the memory is too little; the text says what would do.
        RankError: another rank failed or was lost.
    """
    refuse_shared_neurons(granularity, ranks)
    target = ranks.from_first(lambda: fresh_output(out))
    wishes = PruneWishes(
        ratio=ratio,
        rule=rule,
        targets=texts_of(targets, "targets"),
        units=texts_of(units, "units"),
        target_params=target_params,
        target_bytes=target_bytes,
        max_loss=max_loss,
        refit=refit,
        granularity=granularity,
        dimension_weights=dict(dimension_weights or {}),
        refit_target=refit_target,
        shard_bytes=shard_bytes,
        stores=stores_of(scores),
        plan=plan,
    )
    wishes.check()
    require_units(memory, granularity)
    where = open_device(device, ranks.local_rank, dtype)
    tell_of_idle_gpus(where, ranks)
    chosen = as_expert(expert)
    wishes.check_dimensions(chosen)
    opened = open_model(model, progress, where, workspace_of(memory, ranks, workdir))
    require_same_wishes(opened, wishes)
    corpora = corpora_of(opened, chosen, progress)
    if granularity == "neuron":
        from cusprun.pipeline.neurons import prune_neurons
        from cusprun.pruning.rules import DEFAULT_NEURON_RULE

        share, judged = wishes.ratio or DEFAULT_RATIO, rule or DEFAULT_NEURON_RULE
        return prune_neurons(opened, chosen, corpora, target, ratio=share, rule=judged, progress=progress)
    return prune_opened(opened, chosen, corpora, target, wishes, progress)


def prune_opened(
    opened: OpenModel,
    expert: Expert,
    corpora: Corpora,
    out: Path,
    wishes: PruneWishes,
    progress: Progress = SILENT,
) -> Manifest:
    """Do the work of :func:`prune` on a model and corpora that are open."""
    from cusprun.pipeline.search import KnownLosses, largest_within_loss

    seconds: dict[str, float] = {}
    if wishes.plan is not None:
        given = wishes.plan
        made = opened.workspace.ranks.from_first(lambda: _given_plan(given, opened, wishes.refit))
        wishes.check_family(opened.index.family, made.rule)
        require_pruning_memory(opened, corpora, wishes.settings(made.rule, opened.index.family))
    else:
        wishes.check_family(opened.index.family, wishes.chosen_rule)
        settings = wishes.settings(wishes.chosen_rule, opened.index.family)
        require_pruning_memory(opened, corpora, settings)
        if wishes.max_loss is not None and not corpora.held_out:
            raise CorpusError(
                f"no document of {expert.name!r} is held out to measure a loss on; give it more documents "
                "or a larger 'held_out'"
            )
        started = time.monotonic()
        stores = wishes.stores or (scored(opened, expert, corpora, progress),)
        seconds["score"] = time.monotonic() - started
        started = time.monotonic()
        ranks = opened.workspace.ranks
        if wishes.max_loss is not None:
            limit, known = wishes.max_loss, KnownLosses.of(opened, corpora, settings)
            return written_together(
                ranks,
                lambda write: largest_within_loss(
                    _planner_of(opened, corpora, stores, wishes), limit, out, write, known
                ),
                lambda made, folder: _write(opened, expert, corpora, folder, made, wishes, seconds, progress),
            )
        made = ranks.from_first(
            lambda: _planner_of(opened, corpora, stores, wishes).plan(wishes.budget(opened.index))
        )
        seconds["plan"] = time.monotonic() - started
    return _write(opened, expert, corpora, out, made, wishes, seconds, progress)


def _write(
    opened: OpenModel,
    expert: Expert,
    corpora: Corpora,
    out: Path,
    made: Plan,
    wishes: PruneWishes,
    seconds: Mapping[str, float],
    progress: Progress,
) -> Manifest:
    """Write the expert of one plan."""
    from cusprun.checkpoint.writer import DEFAULT_SHARD_BYTES
    from cusprun.corpus import corpus_hash
    from cusprun.pruning.folder import Provenance, write_expert
    from cusprun.pruning.plan_check import EDITED
    from cusprun.pruning.planner import plan_sentence

    settings = wishes.settings(made.rule, opened.index.family, edited=made.budget == EDITED)
    if settings.mode == "refit":
        _tell_few_tokens(corpora, made.after.intermediate_size, expert, wishes.dimension_weights)
    log.info("%s", plan_sentence(made))
    return write_expert(
        opened.index,
        made,
        out,
        corpora=corpora,
        provenance=Provenance(
            source=opened.source,
            model_hash=opened.model_hash,
            corpus_hash=corpus_hash(corpora),
            expert=expert,
            seconds=seconds,
        ),
        settings=settings,
        measure=bool(corpora.held_out),
        max_shard_bytes=wishes.shard_bytes or DEFAULT_SHARD_BYTES,
        device=opened.device,
        workspace=opened.workspace,
        progress=progress,
    )


def scored(opened: OpenModel, expert: Expert, corpora: Corpora, progress: Progress) -> Path:
    """Return the store of a model and corpora in the cache, made unless it is there and sound."""
    from cusprun.pipeline.scores import cached_store
    from cusprun.pruning.score import score_model

    def score_into(path: Path, corpus_hash: str) -> None:
        score_model(
            opened.index,
            corpora,
            path,
            model_hash=opened.model_hash,
            corpus_hash=corpus_hash,
            expert_name=expert.name,
            device=opened.device,
            workspace=opened.workspace,
            progress=progress,
        )

    return cached_store(opened, corpora, "unit", score_into)


def _planner(opened: OpenModel, store: ImpactStore, wishes: PlanWishes) -> Planner:
    from cusprun.pruning.planner import Planner

    return Planner.of(
        opened.index,
        store,
        model_hash=opened.model_hash,
        rule=wishes.chosen_rule,
        targets=wishes.targets,
        units=wishes.units,
        refit=wishes.refit,
    )


def _planner_of(opened: OpenModel, corpora: Corpora, stores: Sequence[Path], wishes: PruneWishes) -> Planner:
    """Return the planner on the scores that were given or made, which are those of the documents."""
    from cusprun.pruning.store import open_store

    store = open_store(stores)
    if wishes.stores:
        store.require_tokens((*corpora.calibration, *corpora.held_out, *corpora.general))
    return _planner(opened, store, wishes)


def _given_plan(plan: StrPath | Plan, opened: OpenModel, refit: bool) -> Plan:
    from cusprun.codec import load_json
    from cusprun.pruning.plan_check import checked_plan

    made = plan if isinstance(plan, Plan) else load_json(Plan, Path(plan), PlanError)
    return checked_plan(made, opened.index, opened.model_hash, refit=refit)


def _tell_few_tokens(corpora: Corpora, unknowns: int, expert: Expert, weights: Mapping[str, float]) -> None:
    """Say when the least squares have fewer tokens that weigh than unknowns.

    They have a solution all the same, which the ridge holds near the original weights; a document set apart
    decides whether it is better than these.
    """
    tokens = sum(
        len(document.token_ids)
        for document in corpora.calibration
        if weights.get(document.dimension, 1.0) > 0
    )
    if tokens < unknowns:
        weighing = " with a weight above 0" if tokens < corpora.calibration_tokens else ""
        log.info(
            "note: the corpora of %r have %d calibration tokens%s, fewer than the %d FFN channels of a block "
            "that the refit solves for; more documents make a better expert",
            expert.name,
            tokens,
            weighing,
            unknowns,
        )
