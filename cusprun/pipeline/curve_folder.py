"""The folder of a sweep: what may be in it, and several sweeps that write to it at once."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cusprun.cache import remove_leftovers
from cusprun.codec import load_json
from cusprun.errors import OutputError
from cusprun.pipeline.curve import SweepReport
from cusprun.pipeline.curve_files import FILES_FOR_PEOPLE

log = logging.getLogger(__name__)

SWEEP_JSON = "sweep.json"
_WORK = "work"
_PARTIAL = re.compile(r"\..+\.partial-\d+")
"""What a sweep at work names its unfinished files."""
_SHARED = (
    "cusprun_version", "model_hash", "expert", "corpus_hash", "rule", "targets", "units", "refit",
    "dimension_weights", "refit_target", "device",
)  # fmt: skip
"""What the points of one curve must share, by the names of the report's fields."""


@dataclass(frozen=True)
class CurveFolder:
    """A sweep's folder; see :meth:`checked`. What is unfinished stands in ``work``, and nothing else does."""

    path: Path

    @classmethod
    def checked(cls, path: Path) -> CurveFolder:
        """Return the folder at ``path``; makes nothing.

        Raises:
            OutputError: a sweep may be neither written to nor continued in it.
        """
        from cusprun.checkpoint.output import refuse_existing

        if not path.is_dir():
            refuse_existing(path)
            return cls(path)
        for name in (_WORK, SWEEP_JSON, *FILES_FOR_PEOPLE):
            remove_leftovers(path, name)
        others = [entry for entry in path.iterdir() if not _PARTIAL.fullmatch(entry.name)]
        if others and not (path / SWEEP_JSON).is_file():
            raise OutputError(
                f"{path} exists and holds no {SWEEP_JSON}; choose another folder or remove it first"
            )
        if not os.access(path, os.W_OK | os.X_OK):
            raise OutputError(f"{path} cannot be written; choose another folder")
        return cls(path)

    @property
    def report(self) -> Path:
        """The curve as JSON."""
        return self.path / SWEEP_JSON

    @property
    def work(self) -> Path:
        """Where this process puts what is unfinished."""
        return self.path / f".{_WORK}.partial-{os.getpid()}"

    def expert(self, ratio: float) -> Path:
        """Return where the expert of a ratio is kept."""
        return self.path / f"expert-{ratio}"

    def begun(self, blank: SweepReport) -> SweepReport:
        """Return the curve in the folder, or ``blank``, that of the same inputs without a point.

        Raises:
            OutputError: the curve in the folder is damaged or was measured from other inputs.
        """
        if not self.report.is_file():
            return blank
        found = load_json(SweepReport, self.report, OutputError)
        if found.inputs_hash != blank.inputs_hash:
            other = [name for name in _SHARED if getattr(found, name) != getattr(blank, name)]
            raise OutputError(
                f"{self.report} was measured from other inputs (not the same: "
                f"{', '.join(other) or 'documents'}); choose another folder or remove it"
            )
        return found

    def keep(self, made: Path, place: Path) -> Path:
        """Move what is finished to its place in the folder, unless another sweep was sooner; return that."""
        with self.alone():
            if place.exists():
                log.info("%s was made by another sweep meanwhile, which is kept", place)
            else:
                made.rename(place)
        return place

    def clear(self) -> None:
        """Remove what is unfinished, and the folder when nothing is in it."""
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):  # it holds what is finished, or was never made
            self.path.rmdir()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other sweep write to the folder, which is made if need be, for the length of the block."""
        self.path.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":  # which cannot lock a folder; two sweeps at once can lose a point there
            yield
            return
        import fcntl

        handle = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network disks lock nothing
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
