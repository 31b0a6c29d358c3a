"""What pruning will take of time, memory and disk, from a trial on the first blocks at their true widths."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.errors import UserError
from cusprun.pipeline import trial
from cusprun.pipeline.estimated_disk import DiskUse, disk_use
from cusprun.pipeline.opening import OpenModel, as_expert, corpora_of, open_model
from cusprun.pipeline.wishes import DEFAULT_RATIO, PruneWishes, texts_of
from cusprun.pipeline.workspaces import pruning_demands, require_pruning_memory, workspace_of
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert, Plan, TokenizedDocument
from cusprun.resolve import StrPath, resolve
from cusprun.walk.device import DEFAULT_DEVICE, DEFAULT_DTYPE, Device, open_device
from cusprun.walk.workspace import Workspace

if TYPE_CHECKING:
    from cusprun.checkpoint.index import CheckpointIndex

HASH, SCORE, PLAN, REFIT, MEASURE = "start, open and hash", "score", "plan", "refit and write", "measure"
_HASH = "0" * 64
_BATCHES = 2
"""Batches of the smaller trial, at least."""
_BLOCKS = 3
"""Blocks of the larger trial: what two of three take is known better than what one of two does."""
_FEW = 3
"""All documents are tried at once up to so many times the tokens of the smaller trial."""
_LARGER_S = 15.0
"""What scoring and measuring one block may take in the larger trial; it has twice the tokens at the least."""
_SHARE_OF_WIDTH = 0.6
"""Its tokens, as a share of the FFN's width, at least: from a half on the refit keeps sums, and not rows."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage: wall-clock seconds, and the most memory that no file stands behind."""

    name: str
    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a run of ``cusprun prune`` will take.

    ``memory_bytes`` is the most of its stages, what no file stands behind. ``disk`` is the most that lies on
    disk at one time, by what it is. ``measured_tokens`` of the calibration documents were run through
    ``measured_blocks`` blocks for it, in ``measured_seconds``.
    """

    model: str
    expert: str
    device: str
    blocks: int
    documents: int
    tokens: int
    stages: tuple[StageEstimate, ...]
    seconds: float
    memory_bytes: int
    disk_bytes: int
    disk: DiskUse
    measured_blocks: int
    measured_tokens: int
    measured_seconds: float
    schema_version: int = 1


def estimate(
    model: StrPath,
    expert: StrPath | Expert,
    *,
    ratio: float | None = None,
    target_params: int | None = None,
    rule: str | None = None,
    targets: Sequence[str] = (),
    units: Sequence[str] = (),
    refit: bool = True,
    dimension_weights: Mapping[str, float] | None = None,
    refit_target: str | None = None,
    device: str = DEFAULT_DEVICE,
    dtype: str = DEFAULT_DTYPE,
    memory: int | str | None = None,
    workdir: StrPath | None = None,
    start_seconds: float = 0.0,
    progress: Progress = SILENT,
) -> Estimate:
    """Say what :func:`cusprun.prune` with these options will take on this machine as it is; keep nothing.

    One and three blocks of the model are scored, planned, refit, written and measured at their true widths,
    with a part of the documents where there are many; the whole is worked out from that. ``units`` may not
    be blocks, which are chosen by the scores of all of them. What the trial writes lies in ``workdir`` (the
    cache unless given) as long as it lasts. ``start_seconds`` is what a process takes
    before it comes to the work.

    Raises:
        UserError: the memory is too little, or the kind of unit is ``block``.
        CusprunError: what :func:`cusprun.prune` raises before it begins to work.
    """
    started = time.perf_counter()
    wishes = PruneWishes(
        ratio=ratio,
        rule=rule,
        targets=texts_of(targets, "targets"),
        units=texts_of(units, "units"),
        target_params=target_params,
        refit=refit,
        dimension_weights=dict(dimension_weights or {}),
        refit_target=refit_target,
    )
    wishes.check()
    if "block" in wishes.units:
        raise UserError("which blocks go is known when all are scored; leave out 'block', or do not estimate")
    where = open_device(device, dtype=dtype)
    chosen = as_expert(expert)
    wishes.check_dimensions(chosen)
    workspace = workspace_of(memory, workdir=workdir)
    opened = _opened(model, chosen, where, workspace, progress)
    corpora = corpora_of(opened, chosen, progress)
    wishes.check_family(opened.index.family, wishes.chosen_rule)
    settings = wishes.settings(wishes.chosen_rule, opened.index.family)
    require_pruning_memory(opened, corpora, settings)
    read_seconds = start_seconds + time.perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="cusprun-estimate-", dir=workspace.folder) as scratch:
        run = _Trial(opened, corpora, wishes, Path(scratch))
        with progress.stage("trying the first blocks", 1) as advance:
            run.measure()
            advance(1)
    stages = run.stages(read_seconds + run.warm_seconds)
    disk = disk_use(opened, corpora, settings, run.plan, run.expert_bytes)
    return Estimate(
        model=opened.source,
        expert=chosen.name,
        device=where.label,
        blocks=opened.index.shape.num_hidden_layers,
        documents=len(corpora.calibration),
        tokens=corpora.calibration_tokens,
        stages=stages,
        seconds=sum(stage.seconds for stage in stages),
        memory_bytes=max(stage.memory_bytes for stage in stages),
        disk_bytes=disk.most_bytes,
        disk=disk,
        measured_blocks=max(run.counts),
        measured_tokens=max(tokens for _, tokens in run.times[SCORE]),
        measured_seconds=time.perf_counter() - started,
    )


def _opened(
    model: StrPath, expert: Expert, device: Device, workspace: Workspace, progress: Progress
) -> OpenModel:
    """Open a model without reading all of it, unless it is to make documents that its hash stands for."""
    from cusprun.checkpoint.index import open_checkpoint
    from cusprun.walk.shell import load_config

    if expert.augment is not None:
        return open_model(model, progress, device, workspace)
    located = resolve(model, progress)
    index = open_checkpoint(located.path)
    load_config(index)
    return OpenModel(index, _HASH, located.source, device, workspace)


@dataclass
class _Trial:
    """The stages of pruning, on one block and on three, and on few documents and on more."""

    opened: OpenModel
    corpora: Corpora
    wishes: PruneWishes
    scratch: Path
    times: dict[str, dict[tuple[int, int], float]] = field(default_factory=dict)
    watch: trial.MemoryWatch = field(default_factory=trial.MemoryWatch)
    parts: dict[str, tuple[tuple[TokenizedDocument, ...], ...]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    hash_rate: float = 0.0
    warm_seconds: float = 0.0

    def __post_init__(self) -> None:
        shape = self.opened.index.shape
        self.counts = (1,) if shape.num_hidden_layers == 1 else (1, min(_BLOCKS, shape.num_hidden_layers))
        # The refit keeps rows or sums, whichever are smaller: the trial must do what the run will.
        batch = _batch_tokens(self.opened, self.corpora, self.wishes)
        self.least_tokens = max(_BATCHES * batch, round(_SHARE_OF_WIDTH * shape.intermediate_size))
        self.is_cold = self.opened.index.num_bytes > _available_bytes()
        self.plan: Plan

    def measure(self) -> None:
        """Run every stage."""
        from cusprun.checkpoint.index import model_hash

        views = {count: trial.first_blocks(self.opened.index, count) for count in self.counts}
        largest = views[max(self.counts)]
        _, seconds = trial.timed(lambda: model_hash(largest))
        self.hash_rate = seconds / largest.num_bytes
        started = time.perf_counter()
        shortest = min(self.corpora.calibration, key=lambda document: len(document.token_ids))
        # What is imported and set up on first use would be taken for a block's.
        self._score(views[1], (shortest,), self.scratch / "warm")
        self.warm_seconds = time.perf_counter() - started
        for count, view in views.items():
            for documents in self._parts(SCORE, self.corpora.calibration):
                name = f"{count}-{len(documents)}"
                self._prune(view, documents, self.scratch / name, is_first=count == 1)
            written = self._expert(count)
            self.sizes[count] = written.num_bytes
            for documents in self._parts(MEASURE, self.corpora.held_out):
                self._timed(MEASURE, view, documents, partial(self._measure, written, view, documents))
            for place in list(self.scratch.iterdir()):  # two embeddings and heads are gigabytes
                shutil.rmtree(place)

    def _parts(
        self, stage: str, documents: tuple[TokenizedDocument, ...]
    ) -> Iterator[tuple[TokenizedDocument, ...]]:
        """Yield few documents and, once a stage has run with these, more; or all, where that is quick.

        What a trial takes is multiplied by the blocks, and so is its noise: the longer, the better.
        """
        if stage not in self.parts and trial.num_tokens(documents) <= _FEW * self.least_tokens:
            self.parts[stage] = (documents,) if documents else ()
        if stage in self.parts:
            yield from self.parts[stage]
            return
        few = trial.spread(documents, self.least_tokens)
        yield few
        tokens = trial.num_tokens(few)
        longer = max(2.0, _LARGER_S / max(1e-9, self.times[stage][1, tokens]))
        more = trial.spread(documents, round(longer * tokens))
        self.parts[stage] = (more,) if len(more) == len(documents) else (few, more)
        yield more

    def _timed(
        self,
        stage: str,
        view: CheckpointIndex,
        documents: tuple[TokenizedDocument, ...],
        work: Callable[[], Any],
    ) -> Any:
        before = (lambda: trial.drop_cached(view)) if self.is_cold else (lambda: None)
        with self.watch.during(stage):
            result, seconds = trial.timed(work, before)
        key = view.shape.num_hidden_layers, trial.num_tokens(documents)
        self.times.setdefault(stage, {})[key] = seconds
        return result

    def _prune(
        self, view: CheckpointIndex, documents: tuple[TokenizedDocument, ...], place: Path, *, is_first: bool
    ) -> None:
        """Score, plan, refit and write."""
        place.mkdir()
        tries = iter(range(9))
        store = self._timed(
            SCORE, view, documents, lambda: self._score(view, documents, place / f"store-{next(tries)}")
        )
        plan = self._timed(PLAN, view, documents, lambda: self._planned(view, store))
        self._timed(
            REFIT, view, documents, lambda: self._write(view, plan, documents, place / f"out-{next(tries)}")
        )
        if is_first:
            self.plan = plan

    def _options(self) -> dict[str, Any]:
        return {
            "device": self.opened.device,
            "workspace": replace(self.opened.workspace, folder=self.scratch),
        }

    def _score(self, view: CheckpointIndex, documents: tuple[TokenizedDocument, ...], out: Path) -> Path:
        from cusprun.pruning.score import score_model

        corpora = Corpora(documents, ())
        return score_model(view, corpora, out, model_hash=_HASH, corpus_hash=_HASH, **self._options())

    def _planned(self, view: CheckpointIndex, store: Path) -> Plan:
        from cusprun.pruning.budget import ratio_budget
        from cusprun.pruning.planner import Planner
        from cusprun.pruning.store import open_store

        planner = Planner.of(
            view,
            open_store(store),
            model_hash=_HASH,
            rule=self.wishes.chosen_rule,
            targets=self.wishes.targets,
            units=self.wishes.units,
            refit=self.wishes.refit,
        )
        return planner.plan(ratio_budget(view, _ratio(self.wishes, self.opened.index)))

    def _write(
        self, view: CheckpointIndex, plan: Plan, documents: tuple[TokenizedDocument, ...], folder: Path
    ) -> None:
        from cusprun.checkpoint.files import write_config
        from cusprun.pruning.folder import expert_config
        from cusprun.pruning.refit_memory import refitting
        from cusprun.pruning.rewrite import compensating_flags, write_weights
        from cusprun.walk.budget import batching_within

        settings = self.wishes.settings(plan.rule, view.family)
        if settings.target == "auto":
            settings = replace(settings, target="residual")
        memory = self.opened.workspace.memory_bytes
        lengths = [len(document.token_ids) for document in documents]
        batching = batching_within(
            memory, refitting(view, lengths, settings, memory, self.opened.device.dtype)
        )
        folder.mkdir()
        write_config(folder, expert_config(view, plan, compensating_flags(view, plan, settings)))
        write_weights(view, plan, folder, documents, settings=settings, batching=batching, **self._options())
        self._written = folder

    def _expert(self, count: int) -> CheckpointIndex:
        from cusprun.checkpoint.index import open_checkpoint

        written = open_checkpoint(self._written)
        assert written.shape.num_hidden_layers == count
        return written

    def _measure(
        self, written: CheckpointIndex, view: CheckpointIndex, documents: tuple[TokenizedDocument, ...]
    ) -> None:
        from cusprun.quality.likelihood import measure_likelihood

        measure_likelihood(written, documents, view, **self._options())

    @property
    def expert_bytes(self) -> int:
        """Bytes of the whole expert's weights."""
        most = max(self.counts)
        each = (self.sizes[most] - self.sizes[1]) // max(1, most - 1)
        return self.sizes[1] + (self.opened.index.shape.num_hidden_layers - 1) * each

    def stages(self, read_seconds: float) -> tuple[StageEstimate, ...]:
        """Return what the whole run takes; ``read_seconds`` went into the documents."""
        index, tokens = self.opened.index, self.corpora.calibration_tokens
        layers, held_out = index.shape.num_hidden_layers, trial.num_tokens(self.corpora.held_out)
        refits = 3 if self.wishes.refit_target == "auto" else 1
        seconds = {
            HASH: read_seconds + self.hash_rate * index.num_bytes,
            SCORE: self._whole(SCORE, layers, tokens),
            PLAN: self._whole(PLAN, layers, tokens),
            REFIT: refits * self._whole(REFIT, layers, tokens) + self.hash_rate * self.expert_bytes,
            MEASURE: self._whole(MEASURE, layers, held_out) if held_out else 0.0,
        }
        told = self._told_memory()
        return tuple(StageEstimate(name, took, told.get(name, 0)) for name, took in seconds.items() if took)

    def _whole(self, stage: str, layers: int, tokens: int) -> float:
        return trial.predicted_seconds(self.times[stage], layers, tokens)

    def _told_memory(self) -> Mapping[str, int]:
        """Return the most memory of each stage: what was seen or, where nothing can be, what is counted."""
        if self.watch.highest:
            return self.watch.highest
        settings = self.wishes.settings(self.wishes.chosen_rule, self.opened.index.family)
        demands = pruning_demands(self.opened, self.corpora, settings)
        most = max(demand.total_bytes(demand.longest) for demand in demands)
        return dict.fromkeys((SCORE, REFIT, MEASURE), most)


def _batch_tokens(opened: OpenModel, corpora: Corpora, wishes: PruneWishes) -> int:
    """Return the padded tokens of a batch of the stage that has the smallest ones."""
    from cusprun.walk.batches import DEFAULT_BATCH_TOKENS

    memory = opened.workspace.memory_bytes
    if memory is None:
        return DEFAULT_BATCH_TOKENS
    settings = wishes.settings(wishes.chosen_rule, opened.index.family)
    return max(demand.batch_tokens(memory) for demand in pruning_demands(opened, corpora, settings))


def _ratio(wishes: PruneWishes, index: CheckpointIndex) -> float:
    """Return the share of the blocks' parameters that goes."""
    from cusprun.pruning.budget import MAX_RATIO
    from cusprun.pruning.targets import all_block_parameters

    if wishes.target_params is None:
        return DEFAULT_RATIO if wishes.ratio is None else wishes.ratio
    whole = all_block_parameters(index, index.shape)
    return min(MAX_RATIO, max(1e-6, (index.num_parameters - wishes.target_params) / whole))


def _available_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
