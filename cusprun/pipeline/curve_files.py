"""A curve's files for people: the table and, where matplotlib is installed, the picture."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cusprun.errors import MissingDependencyError
from cusprun.pipeline.curve import SweepReport, curve_panels, to_markdown

log = logging.getLogger(__name__)

SWEEP_MARKDOWN, SWEEP_PICTURE = "sweep.md", "sweep.png"


def write_tables(report: SweepReport, folder: Path) -> None:
    """Write the curve for people, over what an earlier call wrote."""
    from cusprun.plots import draw

    with _replaced(folder / SWEEP_MARKDOWN) as partial:
        partial.write_text(to_markdown(report), encoding="utf-8")
    try:
        with _replaced(folder / SWEEP_PICTURE) as partial:
            draw(curve_panels(report), partial, f"{report.model} → {report.expert}", "png")
    except MissingDependencyError as missing:
        log.info("note: no %s was drawn; %s", SWEEP_PICTURE, missing)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Yield a path to write to that takes the place of ``path`` when the block ends well."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
