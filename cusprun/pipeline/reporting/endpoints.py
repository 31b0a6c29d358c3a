"""Load tests of endpoints in a report: what clients saw at each level, and how each ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from cusprun.panels import Line, Panel
from serve.bench.endpoint.records import EndpointReport, LevelSummary
from serve.bench.endpoint.table import LoadTable, letter, load_tables
from serve.report.view import Block, Grid, Picture, Prose, Section

_DRAWN: Mapping[str, tuple[str, Callable[[LevelSummary], float | None]]] = {
    "Output tokens": ("tokens per second", lambda one: one.output_tokens_per_second),
    "Time to first token, p50": ("ms", lambda one: _p50(one.time_to_first_token_ms)),
    "Time per output token, p50": ("ms", lambda one: _p50(one.time_per_output_token_ms)),
}
"""What is drawn over the levels: the axis, and how it is read from a level."""


def endpoint_sections(reports: Sequence[EndpointReport]) -> Iterator[Section]:
    """Yield the tables of each load test, and throughput and latency over its levels."""
    blocks: list[Block] = [
        Prose(
            "Requests as clients send them, streamed, at several loads. The first token is the first event "
            "that holds text; only requests that ended well are timed, and how the others ended stands "
            "beside them."
        )
    ]
    for number, report in enumerate(reports):
        grids = tuple(_grid(table) for table in load_tables(report))
        panels = tuple(_panels(report))
        if panels:
            names = ", ".join(
                f"{letter(place)} is {endpoint.model}" for place, endpoint in enumerate(report.endpoints)
            )
            description = f"Throughput and latency over the load; {names}."
            blocks.append(Picture(f"load-{number}", description, panels, (_drawn_grid(report),)))
        blocks += grids
    yield Section("endpoint", "Under load", tuple(blocks))


def _p50(found: object) -> float | None:
    value = getattr(found, "p50", None)
    return value if isinstance(value, float | int) else None


def _grid(table: LoadTable) -> Grid:
    """Return a load table as one of the report; a row without a name has that of the row above."""
    rows: list[tuple[str, ...]] = []
    for row in table.rows:
        rows.append((row[0] or rows[-1][0], *row[1:]))
    columns = (table.columns[0], table.columns[1] or "what", *table.columns[2:])
    return Grid(table.title, columns, tuple(rows), texts=(1, len(columns) - 1), notes=table.notes)


def _panels(report: EndpointReport) -> Iterator[Panel]:
    levels = list(dict.fromkeys(result.level for result in report.results))
    for title, (unit, read) in _DRAWN.items():
        lines = []
        for place in range(len(report.endpoints)):
            points = [
                (float(levels.index(result.level)), value)
                for result in report.results
                if result.endpoint == place and (value := read(result.summary)) is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Line(letter(place), x, y))
        if lines:
            top = 1.12 * max(max(line.y) for line in lines)
            ticks = tuple(level.label for level in levels)
            yield Panel(title, "load", unit, tuple(lines), limits=(0.0, top or 1.0), dots=True, ticks=ticks)


def _drawn_grid(report: EndpointReport) -> Grid:
    rows = tuple(
        (
            f"{letter(result.endpoint)}, {result.level.label}",
            *(
                "unknown" if (value := read(result.summary)) is None else f"{value:,.1f}"
                for _, read in _DRAWN.values()
            ),
        )
        for result in report.results
    )
    columns = ("endpoint, load", *(f"{title} ({unit})" for title, (unit, _) in _DRAWN.items()))
    return Grid("Throughput and latency by load", columns, rows)
