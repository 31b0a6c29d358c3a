"""From a model and an expert to a smaller model: score, plan, prune."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import fresh_output
from cusprun.errors import CorpusError, PlanError, StoreError, UserError, require_known
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert, Manifest, Plan
from cusprun.resolve import StrPath, as_paths, resolve
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.checkpoint.index import CheckpointIndex

log = logging.getLogger(__name__)

DEFAULT_RATIO = 0.25
"""Share of the decoder blocks' attention and FFN parameters that goes when nothing else is said."""

_STORE_SPARE_BYTES = 1_000_000


@dataclass(frozen=True)
class OpenModel:
    """A model that was found and checked; ``source`` is what reports call it."""

    index: CheckpointIndex
    model_hash: str
    source: str


def open_model(model: StrPath, progress: Progress = SILENT) -> OpenModel:
    """Resolve a model, check its headers and hash its weights."""
    from cusprun.checkpoint.index import model_hash, open_checkpoint
    from cusprun.walk.shell import load_config

    located = resolve(model, progress)
    index = open_checkpoint(located.path)
    load_config(index)  # first, or the tokenizer, which reads the config too, is blamed for its faults
    with progress.stage("hashing the model", 1) as advance:
        digest = model_hash(index)
        advance(1)
    return OpenModel(index, digest, located.source)


def as_expert(expert: StrPath | Expert) -> Expert:
    """Return an expert as it is, or read it from a YAML file."""
    from cusprun.corpus import load_expert

    return expert if isinstance(expert, Expert) else load_expert(Path(expert))


def score(model: StrPath, expert: StrPath | Expert, out: StrPath, *, progress: Progress = SILENT) -> Path:
    """Score every FFN channel, query head and KV group on an expert's documents; write a store to ``out``.

    A store of the same model and documents in the cache is copied, and nothing is computed again.

    Raises:
        ConfigError: the expert file has faults.
        CorpusError: documents are missing or unreadable.
        ModelError: the model is missing, damaged or holds weights that are not finite.
        OutputError: ``out`` exists or cannot be written.
    """
    from cusprun.checkpoint.output import atomic_folder
    from cusprun.corpus import build_corpora

    target = fresh_output(out)
    chosen = as_expert(expert)
    opened = open_model(model, progress)
    store = scored(opened, chosen, build_corpora(chosen, opened.index.folder, progress), progress)
    with atomic_folder(target) as folder:
        shutil.copytree(store, folder, dirs_exist_ok=True)
    return target


def plan(
    model: StrPath,
    scores: StrPath | Sequence[StrPath],
    *,
    ratio: float = DEFAULT_RATIO,
    targets: Sequence[str] = (),
    rule: str | None = None,
    out: StrPath | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Choose the shape and the units that survive, from one store of scores or several.

    ``ratio`` is the share of the decoder blocks' attention and FFN parameters that goes; ``targets`` are what
    the expert is to run in, like ``gguf:q8_0`` or ``vllm:tp2``; ``rule`` is ``mean`` or ``paper``. With
    ``out`` the plan is also written as JSON, which may be edited and given to :func:`prune`.

    Raises:
        PlanError: the ratio is outside (0, 0.9] or cannot be reached, or the scores are another model's.
        StoreError: a store is missing or damaged.
        OutputError: ``out`` exists or cannot be written.
        UserError: a rule or target is unknown.
    """
    from cusprun.checkpoint.output import atomic_file
    from cusprun.codec import json_bytes
    from cusprun.pruning.planner import make_plan
    from cusprun.pruning.store import open_store

    target = None if out is None else fresh_output(out)
    rule = _check_wishes(ratio, rule, targets)
    store = open_store(as_paths(scores))
    opened = open_model(model, progress)
    made = make_plan(
        opened.index, store, model_hash=opened.model_hash, ratio=ratio, rule=rule, targets=tuple(targets)
    )
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
    scores: StrPath | Sequence[StrPath] | None = None,
    plan: StrPath | Plan | None = None,
    rule: str | None = None,
    targets: Sequence[str] = (),
    refit: bool = True,
    shard_bytes: int | None = None,
    progress: Progress = SILENT,
) -> Manifest:
    """Write the smaller model that an expert needs as a Hugging Face folder; return its manifest.

    Scores and plans itself when given neither ``scores`` nor ``plan``; ``ratio`` is 0.25 unless given,
    ``rule`` is ``mean``. A ``plan`` brings its own ratio, rule and targets. ``refit`` re-solves the last
    projections by least squares. ``shard_bytes`` bounds a weight file (5 GB). Interrupted and called again,
    it continues from the scores.

    Raises:
        ConfigError: the expert file has faults.
        CorpusError: documents are missing, unreadable or too few for the refit.
        ModelError: the model is missing, damaged or holds weights that are not finite.
        PlanError: the ratio cannot be reached, or the plan is malformed or another model's.
        OutputError: ``out`` exists, cannot be written or does not fit on the disk.
    """
    from cusprun.corpus import build_corpora

    target = fresh_output(out)
    _refuse_conflict(plan, ratio=ratio, rule=rule, targets=tuple(targets) or None, scores=scores)
    wishes = PruneWishes(
        ratio=DEFAULT_RATIO if ratio is None else ratio,
        rule=rule,
        targets=tuple(targets),
        refit=refit,
        shard_bytes=shard_bytes,
        stores=() if scores is None else tuple(as_paths(scores)),
        plan=plan,
    )
    wishes.check()
    chosen = as_expert(expert)
    opened = open_model(model, progress)
    corpora = build_corpora(chosen, opened.index.folder, progress)
    return prune_opened(opened, chosen, corpora, target, wishes, progress)


@dataclass(frozen=True)
class PruneWishes:
    """What :func:`prune` was asked for; an empty ``stores`` and no ``plan`` mean: score and plan."""

    ratio: float = DEFAULT_RATIO
    rule: str | None = None
    targets: tuple[str, ...] = ()
    refit: bool = True
    shard_bytes: int | None = None
    stores: tuple[Path, ...] = ()
    plan: StrPath | Plan | None = None

    def check(self) -> None:
        """Refuse what cannot be before any work is done."""
        _check_wishes(self.ratio, self.rule, self.targets)
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise UserError(f"the shard size must be at least 1 byte, not {self.shard_bytes}")


def prune_opened(
    opened: OpenModel,
    expert: Expert,
    corpora: Corpora,
    out: Path,
    wishes: PruneWishes,
    progress: Progress = SILENT,
) -> Manifest:
    """Do the work of :func:`prune` on a model and corpora that are open."""
    from cusprun.checkpoint.writer import DEFAULT_SHARD_BYTES
    from cusprun.corpus import corpus_hash
    from cusprun.pruning.folder import Provenance, write_expert

    seconds: dict[str, float] = {}
    if wishes.plan is None:
        started = time.monotonic()
        stores = wishes.stores or (scored(opened, expert, corpora, progress),)
        seconds["score"] = time.monotonic() - started
        made = _planned(opened, stores, wishes, seconds)
    else:
        made = _given_plan(wishes.plan, opened)
    if wishes.refit:
        _require_tokens(corpora, made, expert)
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
        refit=wishes.refit,
        measure=bool(corpora.held_out),
        max_shard_bytes=wishes.shard_bytes or DEFAULT_SHARD_BYTES,
        progress=progress,
    )


def plan_sentence(plan: Plan) -> str:
    """Say in one line what a plan removes."""
    before, after = plan.before, plan.after
    return (
        f"plan: FFN width {before.intermediate_size} to {after.intermediate_size}, "
        f"KV heads {before.num_key_value_heads} to {after.num_key_value_heads}, "
        f"query heads {before.num_attention_heads} to {after.num_attention_heads}; "
        f"{plan.block_ratio:.1%} of block parameters, {plan.total_ratio:.1%} of all"
    )


def scored(opened: OpenModel, expert: Expert, corpora: Corpora, progress: Progress) -> Path:
    """Return the store of a model and corpora in the cache, made unless it is there and sound."""
    from cusprun.cache import cache_folder, cached, key_of
    from cusprun.checkpoint.output import require_space
    from cusprun.corpus import corpus_hash
    from cusprun.pruning.score import score_model
    from cusprun.pruning.store import open_store, unit_counts

    digest = corpus_hash(corpora)
    name = key_of("score", opened.model_hash, digest, __version__)

    def make(path: Path) -> None:
        shape = opened.index.shape
        values = (sum(unit_counts(shape).values()) + 1) * shape.num_hidden_layers
        require_space(path, 4 * values * len(corpora.calibration) + _STORE_SPARE_BYTES)
        score_model(
            opened.index,
            corpora,
            path,
            model_hash=opened.model_hash,
            corpus_hash=digest,
            expert_name=expert.name,
            progress=progress,
        )

    store, found = cached("scores", name, make)
    if found:
        try:
            open_store(store)
        except StoreError:
            log.info("the finished scores in %s are damaged; scoring again", cache_folder())
            shutil.rmtree(store, ignore_errors=True)
            return cached("scores", name, make)[0]
        log.info("found finished scores of this model and these documents; not scoring again")
    return store


def _planned(
    opened: OpenModel, stores: Sequence[Path], wishes: PruneWishes, seconds: dict[str, float]
) -> Plan:
    from cusprun.pruning.planner import make_plan
    from cusprun.pruning.rules import DEFAULT_RULE
    from cusprun.pruning.store import open_store

    started = time.monotonic()
    made = make_plan(
        opened.index,
        open_store(stores),
        model_hash=opened.model_hash,
        ratio=wishes.ratio,
        rule=wishes.rule or DEFAULT_RULE,
        targets=wishes.targets,
    )
    seconds["plan"] = time.monotonic() - started
    return made


def _given_plan(plan: StrPath | Plan, opened: OpenModel) -> Plan:
    from cusprun.codec import load_json
    from cusprun.pruning.planner import checked_plan

    made = plan if isinstance(plan, Plan) else load_json(Plan, Path(plan), PlanError)
    return checked_plan(made, opened.index, opened.model_hash)


def _require_tokens(corpora: Corpora, plan: Plan, expert: Expert) -> None:
    """Raise ``CorpusError`` when the least squares would have fewer tokens than unknowns."""
    unknowns = plan.after.intermediate_size
    if corpora.calibration_tokens < unknowns:
        raise CorpusError(
            f"the corpora of {expert.name!r} have {corpora.calibration_tokens} calibration tokens, fewer "
            f"than the {unknowns} FFN channels of a block that the refit solves for; add documents, or "
            "prune without the refit"
        )


def _check_wishes(ratio: float, rule: str | None, targets: Sequence[str]) -> str:
    """Check ratio, rule and targets before any work is done; returns the rule."""
    from cusprun.pruning.planner import check_ratio
    from cusprun.pruning.rules import DEFAULT_RULE, RULES
    from cusprun.pruning.targets import parse_targets

    check_ratio(ratio)
    chosen = DEFAULT_RULE if rule is None else rule
    require_known(chosen, RULES, "rule")
    parse_targets(tuple(targets))
    return chosen


def _refuse_conflict(plan: object, **wishes: object) -> None:
    given = [name for name, value in wishes.items() if value is not None]
    if plan is not None and given:
        raise UserError(
            "a plan brings its own ratio, rule and targets and needs no scores; leave out "
            f"{' and '.join(given)}, or leave out the plan"
        )
