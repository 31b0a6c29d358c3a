"""The size/quality curve: scores once, then makes, measures and removes an expert of each size."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.cache import key_of, remove_leftovers
from cusprun.codec import dump_json, load_json
from cusprun.errors import OutputError, PlanError, UserError, require_list
from cusprun.paths import expand_home
from cusprun.pipeline.curve import CurvePoint, CurveQuality, SweepReport
from cusprun.pipeline.curve_files import SWEEP_MARKDOWN, SWEEP_PICTURE, write_tables
from cusprun.pipeline.evaluation import measured_sets
from cusprun.pipeline.original import original_likelihoods
from cusprun.pipeline.stages import OpenModel, as_expert, corpora_of, open_model, prune_opened, scored
from cusprun.pipeline.wishes import PruneWishes, texts_of
from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert, Plan, TokenizedDocument
from cusprun.resolve import StrPath
from cusprun.version import __version__
from cusprun.walk.device import DEFAULT_DEVICE, open_device

if TYPE_CHECKING:
    from cusprun.quality.likelihood import DocumentLikelihood

log = logging.getLogger(__name__)

SWEEP_JSON = "sweep.json"
_WORK = "work"
_PARTIAL = re.compile(r"\..+\.partial-\d+")
"""What a sweep at work names its unfinished files."""
_VERSIONED = ("torch", "transformers", "numpy")
_SHARED = (
    "cusprun_version", "model_hash", "expert", "corpus_hash", "rule", "targets", "units", "refit",
    "dimension_weights", "refit_target", "device",
)  # fmt: skip
"""What the points of one curve must share, by the names of the report's fields."""


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
    keep: bool = False,
    device: str = DEFAULT_DEVICE,
    progress: Progress = SILENT,
) -> SweepReport:
    """Measure how quality falls with size: one expert for each ratio, scored once; write the curve.

    Each ratio is pruned as :func:`cusprun.prune` does with these options, measured in float32 on the expert's
    held-out documents and its general text, and removed again, or kept as ``expert-RATIO`` in ``out`` with
    ``keep``. The original is measured once. ``out`` then holds ``sweep.json``, ``sweep.md`` and, where
    matplotlib is installed, ``sweep.png``. Interrupted and called again, it continues from the finished
    ratios; called with other ratios, also while another call is at work in ``out``, it adds to the curve,
    which is returned whole. A curve of other inputs, or measured on another kind of ``device`` (that of
    :func:`cusprun.score`), is never replaced.

    Raises:
        DeviceError: the device is unknown, does not work or has too little memory.
        PlanError: a ratio is outside (0, 0.9], given twice, or no legal shape reaches it.
        ConfigError: the expert file has faults.
        CorpusError: documents are missing, unreadable or too few, or none is held out.
        ModelError: the model is missing, damaged or holds weights that are not finite.
        OutputError: ``out`` is something else than a curve of the same inputs, or cannot be written.
        UserError: the rule, a target or a kind of unit is unknown, or no ratio is given.
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
    where = open_device(device)
    folder = _checked_folder(expand_home(out))
    chosen = as_expert(expert)
    wishes.check_dimensions(chosen)
    opened = open_model(model, progress, where)
    wishes.check_family(opened.index.family, wishes.chosen_rule)
    corpora = corpora_of(opened, chosen, progress)
    job = _Job(opened, chosen, corpora, measured_sets(corpora, chosen), wishes, folder, keep, progress)
    for plan in job.plans(job.unfinished(job.begun(), ordered)):
        job.add_size(plan)
    with _alone(folder):
        report = job.begun()
        write_tables(report, folder)
    return report


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


def _checked_folder(folder: Path) -> Path:
    """Raise ``OutputError`` unless a sweep may be written to, or continued in, ``folder``; makes nothing."""
    from cusprun.checkpoint.output import refuse_existing

    if not folder.is_dir():
        refuse_existing(folder)
        return folder
    for name in (_WORK, SWEEP_JSON, SWEEP_MARKDOWN, SWEEP_PICTURE):
        remove_leftovers(folder, name)
    others = [entry for entry in folder.iterdir() if not _PARTIAL.fullmatch(entry.name)]
    if others and not (folder / SWEEP_JSON).is_file():
        raise OutputError(
            f"{folder} exists and holds no {SWEEP_JSON}; choose another folder or remove it first"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} cannot be written; choose another folder")
    return folder


@dataclass(frozen=True)
class _Job:
    """One sweep: all of it but the ratios."""

    opened: OpenModel
    expert: Expert
    corpora: Corpora
    sets: Mapping[str, tuple[TokenizedDocument, ...]]
    wishes: PruneWishes
    folder: Path
    keep: bool
    progress: Progress

    @property
    def documents(self) -> list[TokenizedDocument]:
        """Every document that is measured, set after set."""
        return [document for group in self.sets.values() for document in group]

    def begun(self) -> SweepReport:
        """Return the curve as it is in the folder, or one without a point.

        Raises:
            OutputError: the curve in the folder is damaged or was measured from other inputs.
        """
        report = self._report()
        path = self.folder / SWEEP_JSON
        if not path.is_file():
            return report
        found = load_json(SweepReport, path, OutputError)
        if found.inputs_hash != report.inputs_hash:
            other = [name for name in _SHARED if getattr(found, name) != getattr(report, name)]
            raise OutputError(
                f"{path} was measured from other inputs (not the same: {', '.join(other) or 'documents'}); "
                "choose another folder or remove it"
            )
        return found

    def unfinished(self, report: SweepReport, ratios: Sequence[float]) -> list[float]:
        """Return the ratios that are left to make; raises ``OutputError`` when one's folder is not ours."""
        done = {point.ratio for point in report.points}
        left = []
        for ratio in ratios:
            place = self._place(ratio)
            if ratio in done and (place.exists() or not self.keep):
                log.info("found ratio %g in %s; not measuring again", ratio, self.folder / SWEEP_JSON)
                continue
            if self.keep and place.exists():
                raise OutputError(f"{place} exists and is not in {SWEEP_JSON}; remove it first")
            left.append(ratio)
        return left

    def plans(self, ratios: Sequence[float]) -> list[Plan]:
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

    def add_size(self, plan: Plan) -> None:
        """Make an expert and measure it, unless that is done, and add its point to the curve."""
        report = self.begun()  # with the points that another sweep has added meanwhile
        known = any(point.ratio == plan.ratio for point in report.points)
        # One rule and one store keep the same units in the same shape, so the expert would be the same too.
        twin = next((point for point in report.points if point.shape == plan.after), None)
        if twin is not None and not known:
            log.info("ratio %g gives the same expert as %g; not measuring again", plan.ratio, twin.ratio)
            report = self._with_point(report, replace(twin, ratio=plan.ratio, seconds={}))
        if (known or twin is not None) and (not self.keep or self._place(plan.ratio).exists()):
            return
        if not report.original.corpora:
            report = replace(report, original=self._original())
        work = self.folder / f".{_WORK}.partial-{os.getpid()}"
        work.mkdir(parents=True)
        # What is thrown away again needs no measurement of its own in its manifest.
        corpora = self.corpora if self.keep else replace(self.corpora, held_out=())
        try:
            started = time.monotonic()
            made = work / "expert"
            wishes = PruneWishes(
                plan=plan,
                refit=self.wishes.refit,
                dimension_weights=self.wishes.dimension_weights,
                refit_target=self.wishes.refit_target,
            )
            prune_opened(self.opened, self.expert, corpora, made, wishes, self.progress)
            seconds = time.monotonic() - started
            if not known and twin is None:
                self._with_point(report, self._point(made, plan, seconds))
            if self.keep:
                self._keep(made, self._place(plan.ratio))
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # it holds what is finished
                self.folder.rmdir()

    def _keep(self, made: Path, place: Path) -> None:
        with _alone(self.folder):
            if place.exists():
                log.info("%s was made by another sweep meanwhile, which is kept", place)
            else:
                made.rename(place)

    def _place(self, ratio: float) -> Path:
        return self.folder / f"expert-{ratio}"

    def _report(self) -> SweepReport:
        """Return the curve of these inputs without a point; its original is not measured."""
        from cusprun.corpus import corpus_hash
        from cusprun.pruning.targets import DEFAULT_TARGETS, check_units

        texts = {
            name: [(item.text_hash, item.token_ids) for item in group] for name, group in self.sets.items()
        }
        digest, wishes = corpus_hash(self.corpora), self.wishes
        rule, targets = wishes.chosen_rule, wishes.targets or DEFAULT_TARGETS
        units = check_units(wishes.units)
        made = (rule, targets, units, wishes.refit, dict(wishes.dimension_weights))
        target = wishes.settings(rule, self.opened.index.family).target
        kind = self.opened.device.key
        inputs = (
            "sweep",
            self.opened.model_hash,
            digest,
            texts,
            made,
            __version__,
            f"target {target}",
            *kind,
        )
        return SweepReport(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            cusprun_version=__version__,
            versions={
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in _VERSIONED},
            },
            model=self.opened.source,
            model_hash=self.opened.model_hash,
            expert=self.expert.name,
            corpus_hash=digest,
            calibration_documents=len(self.corpora.calibration),
            calibration_tokens=self.corpora.calibration_tokens,
            rule=rule,
            targets=targets,
            units=units,
            refit=wishes.refit,
            dimension_weights=dict(wishes.dimension_weights),
            device=self.opened.device.kind,
            refit_target=target,
            inputs_hash=key_of(*inputs),
            original=CurvePoint(0.0, 0.0, 0.0, self.opened.index.shape, 0, 0, {}, {}),
            points=(),
        )

    def _original(self) -> CurvePoint:
        started = time.monotonic()
        corpora = self._qualities(original_likelihoods(self.opened, self.documents, self.progress))
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
        index = open_checkpoint(made)
        base = original_likelihoods(self.opened, self.documents, self.progress)
        own = measure_likelihood(index, self.documents, device=self.opened.device, progress=self.progress)
        return CurvePoint(
            ratio=plan.ratio,
            block_ratio=plan.block_ratio,
            total_ratio=plan.total_ratio,
            shape=plan.after,
            num_parameters=index.num_parameters,
            weight_bytes=index.num_bytes,
            corpora=self._qualities(own, base),
            seconds={"prune": round(seconds, 2), "measure": round(time.monotonic() - started, 2)},
        )

    def _qualities(
        self, own: Sequence[DocumentLikelihood], original: Sequence[DocumentLikelihood] | None = None
    ) -> dict[str, CurveQuality]:
        from cusprun.quality.report import corpus_quality

        found, start = {}, 0
        for name, group in self.sets.items():
            rows = slice(start, start + len(group))
            base = None if original is None else original[rows]
            found[name] = CurveQuality.of(corpus_quality(own[rows], base))
            start += len(group)
        return found

    def _with_point(self, report: SweepReport, point: CurvePoint) -> SweepReport:
        """Add a point to the curve in the folder, and return that; what another sweep added stays."""
        with _alone(self.folder):
            found = self.begun()
            points = {other.ratio: other for other in (point, *report.points, *found.points)}
            merged = replace(
                found,
                original=found.original if found.original.corpora else report.original,
                points=tuple(points[ratio] for ratio in sorted(points)),
            )
            dump_json(merged, self.folder / SWEEP_JSON)
        return merged


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other sweep write to a folder, which is made if need be, for the length of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # which cannot lock a folder; two sweeps at once can lose a point there
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks lock nothing
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
