"""The points of a frontier: each size in each export, made, weighed, read aloud to and timed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.codec import key_of
from cusprun.errors import CusprunError, ExportError, MeasurementError, OutputError, UserError, require_known
from cusprun.paths import num_bytes
from cusprun.pipeline.bench import RUNTIME_OF
from cusprun.pipeline.calibration import importance_for
from cusprun.pipeline.curve import SweepReport
from cusprun.pipeline.curve_folder import SWEEP_JSON, CurveFolder
from cusprun.pipeline.curve_quality import CurveQuality, qualities
from cusprun.pipeline.evaluation import HELD_OUT, by_set
from cusprun.pipeline.frontier import DocumentSums, FrontierPoint, Speed, SpeedOptions
from cusprun.pipeline.opening import OpenModel
from cusprun.pipeline.original import original_likelihoods
from cusprun.pipeline.proof import RUNTIMES
from cusprun.pipeline.speed import MeasureSpeed
from cusprun.progress import Progress
from cusprun.recipe import ExportSpec
from cusprun.records import Corpora, TokenizedDocument

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cusprun.checkpoint.index import CheckpointIndex

log = logging.getLogger(__name__)

_ROOM_AT_START = frozenset({"vllm"})
"""Formats whose runtime must be told at its start how long texts will be."""


def parse_exports(texts: Sequence[str]) -> tuple[ExportSpec, ...]:
    """Return what is to be exported, written as ``FORMAT:PRECISION``.

    Raises:
        UserError: a format is unknown, a precision is missing, or an export is named twice.
        ExportError: a precision is unknown.
    """
    from exporters.registry import format_of

    specs: list[ExportSpec] = []
    for text in texts:
        name, _, quant = (part.strip() for part in text.lower().partition(":"))
        chosen = format_of(name)
        if not quant:
            raise UserError(
                f"the export {text!r} names no precision; write FORMAT:PRECISION, "
                f"like {name}:{chosen.default_quant}"
            )
        require_known(quant, chosen.quants, f"{name} precision", ExportError)
        spec = ExportSpec(name, quant)
        if spec in specs:
            raise UserError(f"the export {name}:{quant} is named twice; name every export once")
        specs.append(spec)
    return tuple(specs)


def require_runtimes(specs: Sequence[ExportSpec]) -> None:
    """Raise ``MissingDependencyError`` when what an export is measured in is not installed."""
    for name in dict.fromkeys(spec.to for spec in specs):
        RUNTIMES[name].require()


@dataclass
class Size:
    """One model of the curve, and the importance of its inputs once an export has asked for that."""

    ratio: float
    index: CheckpointIndex
    importance: Mapping[str, NDArray[np.float32]] | None = None


@dataclass(frozen=True)
class Exporter:
    """The exports of one sweep: makes artifacts, measures them, and keeps or removes them."""

    specs: tuple[ExportSpec, ...]
    original: Size
    opened: OpenModel
    corpora: Corpora
    sets: Mapping[str, tuple[TokenizedDocument, ...]]
    speed: SpeedOptions | None
    measure: MeasureSpeed
    folder: CurveFolder
    keep: bool
    progress: Progress

    def admitted(self, report: SweepReport) -> SweepReport:
        """Return a report that says how speeds are measured; refuses one whose speeds are others."""
        if self.specs and report.frontier and report.speed_options != self.speed:
            raise OutputError(
                f"{self.folder.report} holds exports whose speed was measured otherwise "
                f"({_differences(report.speed_options, self.speed)}); choose another folder or remove it"
            )
        return replace(report, speed_options=self.speed) if self.specs else report

    def left(self, report: SweepReport, ratio: float) -> list[ExportSpec]:
        """Return the exports of a size that are left to make or to measure; failed ones are tried again.

        Raises:
            OutputError: a file is in the way that the curve knows nothing of.
        """
        left = []
        for spec in self.specs:
            finished = self._finished(report, ratio, spec) is not None
            kept = self._kept(ratio, spec)
            if self.keep and kept.exists() and not finished:
                raise OutputError(f"{kept} exists and is not in {SWEEP_JSON}; remove it first")
            if not finished or (self.keep and not kept.exists()):
                left.append(spec)
        return left

    def copies(self, report: SweepReport, ratio: float, twins: Collection[float]) -> list[FrontierPoint]:
        """Return the points of a size that were measured at another ratio, which gave the same expert."""
        found = []
        for spec in self.specs:
            if self._finished(report, ratio, spec) is not None:
                continue
            measured = (self._finished(report, twin, spec) for twin in sorted(twins))
            point = next((point for point in measured if point is not None), None)
            if point is not None:
                found.append(replace(point, ratio=ratio, seconds={}))
        return found

    def point(self, report: SweepReport, size: Size, spec: ExportSpec) -> FrontierPoint:
        """Return the point of a size in an export: the one in the report, or made and measured.

        What fails is told in the point. The artifact stays in the work folder for :meth:`settle`.
        """
        found = self._finished(report, size.ratio, spec)
        if found is not None:
            self._made(size, spec)
            return found
        seconds: dict[str, float] = {}
        point = FrontierPoint(
            ratio=size.ratio,
            format=spec.to,
            precision=spec.quant,
            num_parameters=size.index.num_parameters,
            inputs_hash=self._inputs_hash(spec),
            seconds=seconds,
        )
        log.info("exporting and measuring %s", point.name)
        try:
            with _timed(seconds, "export"):
                artifact = self._made(size, spec)
            size_bytes = num_bytes(artifact)
            bits = 8 * size_bytes / point.num_parameters
            point = replace(point, file_bytes=size_bytes, bits_per_weight=bits)
            with _timed(seconds, "quality"):
                corpora, held_out = self._quality(artifact, spec)
                point = replace(point, corpora=corpora, held_out=held_out)
            if self.speed is not None:
                with _timed(seconds, "speed"):
                    point = replace(point, speed=self._speed(artifact, spec, self.speed))
        except Exception as error:  # one library's fault must not cost the hours that the others took
            log.debug("%s failed", point.name, exc_info=True)
            return replace(point, failure=self._reason(error))
        return point

    def settle(self, size: Size, spec: ExportSpec, point: FrontierPoint) -> None:
        """Keep or remove the artifact of a point; the original's stays at work, to measure speeds against."""
        from cusprun.checkpoint.output import remove

        made = self._unfinished(size.ratio, spec)
        if self.keep and point.failure is None:
            self.folder.keep(made, self._kept(size.ratio, spec))
        elif size.ratio or self.speed is None:
            remove(made)

    def _finished(self, report: SweepReport, ratio: float, spec: ExportSpec) -> FrontierPoint | None:
        wanted = (ratio, spec.to, spec.quant)
        for point in report.frontier:
            if point.key == wanted and point.failure is None and point.inputs_hash == self._inputs_hash(spec):
                return point
        return None

    def _inputs_hash(self, spec: ExportSpec) -> str:
        """Return what stands for a point, with its size and the inputs of the whole curve."""
        from exporters.registry import format_of

        options = format_of(spec.to).options(dict(spec.options))
        speed = None if self.speed is None else asdict(self.speed)
        return key_of("frontier", spec.to, spec.quant, repr(options), speed)

    def _name(self, ratio: float, spec: ExportSpec) -> str:
        from exporters.registry import format_of

        side = f"expert-{ratio}" if ratio else "original"
        return f"{side}-{spec.quant}{format_of(spec.to).suffix}"

    def _kept(self, ratio: float, spec: ExportSpec) -> Path:
        return self.folder.path / self._name(ratio, spec)

    def _unfinished(self, ratio: float, spec: ExportSpec) -> Path:
        return self.folder.work / self._name(ratio, spec)

    def _made(self, size: Size, spec: ExportSpec) -> Path:
        """Return an artifact, exported unless it is kept or was made by this sweep."""
        from exporters.registry import format_of

        kept, place = self._kept(size.ratio, spec), self._unfinished(size.ratio, spec)
        if self.keep and kept.exists():
            return kept
        if place.exists():
            return place
        chosen = format_of(spec.to)
        options = chosen.options(dict(spec.options))
        for loss in chosen.check(size.index, spec.quant, options):
            log.info("note: %s", loss)
        calibrated = spec.quant in chosen.calibrated
        if calibrated and size.importance is None:
            size.importance = importance_for(
                chosen,
                spec.quant,
                options,
                size.index,
                self.corpora,
                self.progress,
                self.opened.device,
                self.opened.workspace,
            )
        return chosen.export(
            size.index.folder,
            place,
            quant=spec.quant,
            options=options,
            importance=size.importance if calibrated else None,
            progress=self.progress,
        )

    def _quality(self, artifact: Path, spec: ExportSpec) -> tuple[dict[str, CurveQuality], DocumentSums]:
        from cusprun.quality.runtime_likelihood import runtime_likelihoods

        documents = [document for group in self.sets.values() for document in group]
        longest = max(len(document.token_ids) for document in documents)
        runtime = RUNTIMES[spec.to].open(artifact, **_runtime_options(spec, longest))
        try:
            own = runtime_likelihoods(runtime, documents, self.progress)
        finally:
            runtime.close()
        held_out = by_set(self.sets, own)[HELD_OUT]
        sums = DocumentSums(
            tuple(found.num_predicted_tokens for found in held_out),
            tuple(found.negative_log_likelihood for found in held_out),
        )
        base = original_likelihoods(self.opened, documents, self.progress)
        return qualities(self.sets, own, base), sums

    def _speed(self, artifact: Path, spec: ExportSpec, options: SpeedOptions) -> Speed:
        try:
            before = self._made(self.original, spec)
        except CusprunError as error:
            raise MeasurementError(
                f"the original has no export to compare the speed with ({error})"
            ) from None
        return self.measure(before, artifact, RUNTIME_OF[spec.to], options, self.progress)

    def _reason(self, error: Exception) -> str:
        """Return an error in one line, without the folders of whoever runs the sweep."""
        text = " ".join(str(error).split())
        if not isinstance(error, CusprunError):
            text = f"{type(error).__name__}: {text}"
        for folder in (self.folder.work.absolute(), self.folder.work, self.folder.path.absolute()):
            text = text.replace(f"{folder}{os.sep}", "")
        return text.replace(str(self.opened.index.folder.absolute()), self.opened.source)


def _differences(found: SpeedOptions | None, wanted: SpeedOptions | None) -> str:
    if found is None or wanted is None:
        return "not at all" if found is None else "this call measures none"
    return ", ".join(
        f"{name} {getattr(found, name)} and not {value}"
        for name, value in vars(wanted).items()
        if getattr(found, name) != value
    )


def _runtime_options(spec: ExportSpec, longest: int) -> dict[str, Any]:
    """Return how a runtime is opened: with the KV cache of the proof, and room for ``longest`` tokens."""
    from exporters.parity_records import limits_for

    cache = limits_for(spec.to, spec.quant).kv_cache
    options: dict[str, Any] = {"kv_cache": cache} if cache else {}
    return {**options, "context_length": longest + 1} if spec.to in _ROOM_AT_START else options


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = round(time.monotonic() - started, 2)
