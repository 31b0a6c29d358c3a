"""The size/quality curve: scores once, then makes, measures and removes an expert of each size."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from cusprun.codec import dump_json
from cusprun.errors import OutputError, PlanError, UserError, require_list
from cusprun.paths import expand_home
from cusprun.pipeline.curve import CurvePoint, SweepReport
from cusprun.pipeline.curve_files import write_tables
from cusprun.pipeline.curve_folder import SWEEP_JSON, CurveFolder
from cusprun.pipeline.curve_quality import qualities
from cusprun.pipeline.curve_start import blank_report
from cusprun.pipeline.evaluation import measured_sets
from cusprun.pipeline.frontier import FrontierPoint, SpeedOptions, merged
from cusprun.pipeline.frontier_points import Exporter, Size, parse_exports, require_runtimes
from cusprun.pipeline.opening import OpenModel, as_expert, corpora_of, open_model
from cusprun.pipeline.original import original_likelihoods
from cusprun.pipeline.speed import MeasureSpeed, measure_speed
from cusprun.pipeline.stages import prune_opened, scored
from cusprun.pipeline.wishes import PruneWishes, texts_of
from cusprun.pipeline.workspaces import require_pruning_memory, workspace_of
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert, Plan, TokenizedDocument
from cusprun.resolve import StrPath
from cusprun.walk.device import DEFAULT_DEVICE, DEFAULT_DTYPE, open_device

log = logging.getLogger(__name__)


def sweep(
    model: StrPath,
    expert: StrPath | Expert,
    ratios: Sequence[float],
    out: StrPath,
    *,
    rule: str | None = None,
    targets: Sequence[str] = (),
    units: Sequence[str] = (),
    refit: bool = True,
    dimension_weights: Mapping[str, float] | None = None,
    refit_target: str | None = None,
    exports: Sequence[str] = (),
    speed: SpeedOptions | None = SpeedOptions(),  # noqa: B008 - frozen
    measure: MeasureSpeed = measure_speed,
    keep: bool = False,
    device: str = DEFAULT_DEVICE,
    dtype: str = DEFAULT_DTYPE,
    memory: int | str | None = None,
    workdir: StrPath | None = None,
    progress: Progress = SILENT,
) -> SweepReport:
    """Measure how quality falls with size: one expert for each ratio, scored once; write the curve.

    Each ratio is pruned as :func:`cusprun.prune` does with these options, measured in float32 on the expert's
    held-out documents and its general text, and removed again, or kept as ``expert-RATIO`` in ``out`` with
    ``keep``. The original is measured once. ``out`` then holds ``sweep.json``, ``sweep.md`` and, where
    matplotlib is installed, ``sweep.png``. Interrupted and called again, it continues from the finished
    ratios; called with other ratios, also while another call is at work in ``out``, it adds to the curve,
    which is returned whole. A curve of other inputs, or measured on another kind of ``device`` (that of
    :func:`cusprun.score`, as are ``memory`` and ``workdir``), is never replaced.

    ``exports``, like ``gguf:q4_k_m``, add the frontier: the original and each expert are exported, weighed,
    measured on the same documents in the export's own runtime, and timed by ``measure`` with the options
    ``speed`` (None: not timed) beside the original in the same export. An export that fails is a point that
    says why, among the report's ``failures``; the next call tries it again.

    Raises:
        DeviceError: the device is unknown, does not work or has too little memory.
        PlanError: a ratio is outside (0, 0.9], given twice, or no legal shape reaches it.
        ConfigError: the expert file has faults.
        CorpusError: documents are missing, unreadable or too few, or none is held out.
        ExportError: the precision of an export is unknown.
        MissingDependencyError: what an export is measured in is not installed.
        ModelError: the model is missing, damaged or holds weights that are not finite.
        OutputError: ``out`` is something else than a curve of the same inputs, or cannot be written.
        UserError: the rule, a target, an export or a kind of unit is unknown, no ratio is given, or the
            memory is too little.
    """
    ordered = _ordered(ratios)
    wishes = PruneWishes(
        rule=rule,
        targets=texts_of(targets, "targets"),
        units=texts_of(units, "units"),
        refit=refit,
        dimension_weights=dict(dimension_weights or {}),
        refit_target=refit_target,
    )
    wishes.check()
    specs = parse_exports(texts_of(exports, "exports"))
    if speed is not None:
        speed.check()
    require_runtimes(specs)
    where = open_device(device, dtype=dtype)
    folder = CurveFolder.checked(expand_home(out))
    chosen = as_expert(expert)
    wishes.check_dimensions(chosen)
    opened = open_model(model, progress, where, workspace_of(memory, workdir=workdir))
    wishes.check_family(opened.index.family, wishes.chosen_rule)
    corpora = corpora_of(opened, chosen, progress)
    sets = measured_sets(corpora, chosen)
    require_pruning_memory(opened, corpora, wishes.settings(wishes.chosen_rule, opened.index.family))
    exporter = Exporter(
        specs, Size(0.0, opened.index), opened, corpora, sets, speed, measure, folder, keep, progress
    )
    blank = blank_report(opened, chosen, corpora, sets, wishes)
    return _Job(opened, chosen, corpora, sets, wishes, folder, keep, progress, exporter, blank).run(ordered)


def _ordered(ratios: Sequence[float]) -> tuple[float, ...]:
    """Return the ratios, smallest first; refuses what cannot be before any work is done."""
    from cusprun.pruning.budget import check_ratio

    given = require_list(ratios, float, "ratios")
    if not given:
        raise UserError("no ratio was given; name at least one, like 0.25")
    ordered = sorted(map(float, given))
    for ratio in ordered:
        check_ratio(ratio)
    for one, other in pairwise(ordered):
        if one == other:
            raise PlanError(f"the ratio {one:g} is given twice; name every ratio once")
    return tuple(ordered)


@dataclass(frozen=True)
class _Job:
    """One sweep: all of it but the ratios. ``blank`` is its curve without a point."""

    opened: OpenModel
    expert: Expert
    corpora: Corpora
    sets: Mapping[str, tuple[TokenizedDocument, ...]]
    wishes: PruneWishes
    folder: CurveFolder
    keep: bool
    progress: Progress
    exporter: Exporter
    blank: SweepReport

    def run(self, ratios: Sequence[float]) -> SweepReport:
        """Add every size that is not there, and write the curve for people."""
        report = self._begun()
        self.exporter.left(report, 0.0)  # what is in the way is told before any work
        plans = self._plans(self._unfinished(report, ratios))
        try:
            self._add_exports(report, self.exporter.original)
            for plan in plans:
                self._add_size(plan)
        finally:
            self.folder.clear()
        with self.folder.alone():
            report = self._begun()
            write_tables(report, self.folder.path)
        return report

    def _begun(self) -> SweepReport:
        """Return the curve as it is in the folder, or one without a point."""
        return self.exporter.admitted(self.folder.begun(self.blank))

    def _unfinished(self, report: SweepReport, ratios: Sequence[float]) -> list[float]:
        """Return the ratios that are left to make; raises ``OutputError`` when one's folder is not ours."""
        done = {point.ratio for point in report.points}
        left = []
        for ratio in ratios:
            place = self.folder.expert(ratio)
            if self.keep and place.exists() and ratio not in done:
                raise OutputError(f"{place} exists and is not in {SWEEP_JSON}; remove it first")
            exports = self.exporter.left(report, ratio)
            if ratio in done and not exports and (place.exists() or not self.keep):
                log.info("found ratio %g in %s; not measuring again", ratio, self.folder.report)
                continue
            left.append(ratio)
        return left

    def _plans(self, ratios: Sequence[float]) -> list[Plan]:
        """Plan every size from one store, so that what cannot be reached is refused before one is made."""
        from cusprun.pruning.budget import ratio_budget
        from cusprun.pruning.planner import Planner
        from cusprun.pruning.store import open_store

        if not ratios:
            return []
        index = self.opened.index
        planner = Planner.of(
            index,
            open_store(scored(self.opened, self.expert, self.corpora, self.progress)),
            model_hash=self.opened.model_hash,
            rule=self.wishes.chosen_rule,
            targets=self.wishes.targets,
            units=self.wishes.units,
            refit=self.wishes.refit,
        )
        return [planner.plan(ratio_budget(index, ratio)) for ratio in ratios]

    def _add_size(self, plan: Plan) -> None:
        """Make and measure an expert and its exports, unless that is done; add the points to the curve."""
        from cusprun.checkpoint.index import open_checkpoint

        report = self._with_twins(self._begun(), plan)  # another sweep may have added points meanwhile
        known = any(point.ratio == plan.ratio for point in report.points)
        exports = self.exporter.left(report, plan.ratio)
        place = self.folder.expert(plan.ratio)
        if known and not exports and (place.exists() or not self.keep):
            return
        report = self._with_original(report)
        made = self._ours(place) if known and place.exists() else None
        try:
            if made is None:
                started = time.monotonic()
                made = self._make(plan)
                seconds = time.monotonic() - started
                if not known:
                    report = self._recorded(report, points=[self._point(made, plan, seconds)])
                if self.keep:
                    made = self.folder.keep(made, place)
            self._add_exports(report, Size(plan.ratio, open_checkpoint(made)))
        finally:
            shutil.rmtree(self._work, ignore_errors=True)

    def _with_twins(self, report: SweepReport, plan: Plan) -> SweepReport:
        """Add the points of a size that another ratio gave already.

        One rule and one store keep the same units in the same shape, so the expert would be the same too.
        """
        twins = {point.ratio: point for point in report.points if point.shape == plan.after}
        if not twins:
            return report
        first = twins[min(twins)]
        known = plan.ratio in twins
        if not known:
            log.info("ratio %g gives the same expert as %g; not measuring again", plan.ratio, first.ratio)
        points = [] if known else [replace(first, ratio=plan.ratio, seconds={})]
        copies = self.exporter.copies(report, plan.ratio, set(twins) - {plan.ratio})
        return self._recorded(report, points=points, frontier=copies) if points or copies else report

    @property
    def _work(self) -> Path:
        return self.folder.work / "expert"

    def _make(self, plan: Plan) -> Path:
        """Make the expert of a plan in the work folder, which is removed with it."""
        # What is thrown away again needs no measurement of its own in its manifest.
        corpora = self.corpora if self.keep else replace(self.corpora, held_out=())
        wishes = PruneWishes(
            plan=plan,
            refit=self.wishes.refit,
            dimension_weights=self.wishes.dimension_weights,
            refit_target=self.wishes.refit_target,
        )
        prune_opened(self.opened, self.expert, corpora, self._work, wishes, self.progress)
        return self._work

    def _ours(self, place: Path) -> Path:
        """Return a kept expert; raises ``ModelError`` when somebody has edited it."""
        from cusprun.checkpoint.index import open_checkpoint
        from cusprun.pipeline.artifacts import refuse_edited

        refuse_edited(open_checkpoint(place))
        return place

    def _add_exports(self, report: SweepReport, size: Size) -> None:
        """Make and measure the exports of a size that are left, one after the other."""
        left = self.exporter.left(report, size.ratio)
        report = self._with_original(report) if left else report
        for spec in left:
            point = self.exporter.point(report, size, spec)
            report = self._recorded(report, frontier=[point])
            self.exporter.settle(size, spec, point)

    def _with_original(self, report: SweepReport) -> SweepReport:
        return report if report.original.corpora else replace(report, original=self._original())

    def _original(self) -> CurvePoint:
        started = time.monotonic()
        corpora = qualities(self.sets, original_likelihoods(self.opened, self._documents, self.progress))
        index = self.opened.index
        return CurvePoint(
            ratio=0.0,
            block_ratio=0.0,
            total_ratio=0.0,
            shape=index.shape,
            num_parameters=index.num_parameters,
            weight_bytes=index.num_bytes,
            corpora=corpora,
            seconds={"measure": round(time.monotonic() - started, 2)},
        )

    def _point(self, made: Path, plan: Plan, seconds: float) -> CurvePoint:
        from cusprun.checkpoint.index import open_checkpoint
        from cusprun.quality.likelihood import measure_likelihood

        started = time.monotonic()
        index, documents = open_checkpoint(made), self._documents
        base = original_likelihoods(self.opened, documents, self.progress)
        own = measure_likelihood(
            index,
            documents,
            device=self.opened.device,
            workspace=self.opened.workspace,
            progress=self.progress,
        )
        return CurvePoint(
            ratio=plan.ratio,
            block_ratio=plan.block_ratio,
            total_ratio=plan.total_ratio,
            shape=plan.after,
            num_parameters=index.num_parameters,
            weight_bytes=index.num_bytes,
            corpora=qualities(self.sets, own, base),
            seconds={"prune": round(seconds, 2), "measure": round(time.monotonic() - started, 2)},
        )

    @property
    def _documents(self) -> list[TokenizedDocument]:
        """Every document that is measured, set after set."""
        return [document for group in self.sets.values() for document in group]

    def _recorded(
        self,
        report: SweepReport,
        points: Sequence[CurvePoint] = (),
        frontier: Sequence[FrontierPoint] = (),
    ) -> SweepReport:
        """Add points to the curve in the folder, and return that; what another sweep added stays."""
        with self.folder.alone():
            found = self._begun()
            known = {point.ratio: point for point in (*points, *report.points, *found.points)}
            whole = replace(
                found,
                original=found.original if found.original.corpora else report.original,
                points=tuple(known[ratio] for ratio in sorted(known)),
                frontier=merged(report.frontier, found.frontier, frontier),
            )
            dump_json(whole, self.folder.report)
        return whole
