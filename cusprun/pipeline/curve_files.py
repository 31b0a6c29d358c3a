"""A curve's files for people: the tables and, where matplotlib is installed, the pictures."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cusprun.errors import MissingDependencyError
from cusprun.pipeline.curve import SweepReport, curve_panels, to_markdown
from cusprun.pipeline.frontier_tables import frontier_markdown, frontier_panels

log = logging.getLogger(__name__)

SWEEP_MARKDOWN, SWEEP_PICTURE, FRONTIER_PICTURE = "sweep.md", "sweep.png", "frontier.png"
FILES_FOR_PEOPLE = (SWEEP_MARKDOWN, SWEEP_PICTURE, FRONTIER_PICTURE)


def write_tables(report: SweepReport, folder: Path) -> None:
    """Write the curve for people, over what an earlier call wrote."""
    from cusprun.plots import draw

    with _replaced(folder / SWEEP_MARKDOWN) as partial:
        partial.write_text(to_markdown(report) + frontier_markdown(report), encoding="utf-8")
    pictures = {SWEEP_PICTURE: curve_panels(report), FRONTIER_PICTURE: frontier_panels(report)}
    for name, panels in pictures.items():
        if not panels:
            continue
        try:
            with _replaced(folder / name) as partial:
                draw(panels, partial, f"{report.model} → {report.expert}", "png")
        except MissingDependencyError as missing:
            log.info("note: no %s was drawn; %s", name, missing)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Yield a path to write to that takes the place of ``path`` when the block ends well."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
