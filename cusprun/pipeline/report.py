"""Results as a report: one file that says whether to ship the expert, and what that rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cusprun.cache import fresh_output
from cusprun.errors import MeasurementError, OutputError, UserError
from cusprun.progress import SILENT, Progress
from cusprun.resolve import StrPath, as_paths
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.pipeline.reporting.inputs import Result
    from serve.report.view import Page, Unread


def _html(page: Page) -> bytes:
    from serve.report.page import render

    return render(page).encode("utf-8", "replace")


def _markdown(page: Page) -> bytes:
    from serve.report.markdown import to_markdown

    return to_markdown(page).encode("utf-8", "replace")


def _json(page: Page) -> bytes:
    from cusprun.codec import json_bytes

    return json_bytes(page)


WRITERS: Mapping[str, Callable[[Page], bytes]] = {".html": _html, ".md": _markdown, ".json": _json}
"""How a report is written, by the ending of its file."""


def report(
    results: StrPath | Sequence[StrPath], out: StrPath | Sequence[StrPath], *, progress: Progress = SILENT
) -> Page:
    """Write a report of results: ``out`` are files that end in ``.html``, ``.md`` or ``.json``.

    ``results`` are files that ``run``, ``bench``, ``evaluate``, ``verify``, ``sweep`` or ``overlap`` wrote,
    or folders of them, all of one expert. What is damaged or of another schema version gets a row of its own
    in the report, which is written from the others; then an error says so.

    Raises:
        UserError: a path does not exist, is of no known kind, the results are of different experts, nothing
            at all could be read, or an output has another ending.
        OutputError: an output exists or cannot be written.
        MeasurementError: the report was written, and some of the results could not be read.
    """
    from cusprun.checkpoint.output import atomic_file
    from cusprun.pipeline.reporting.inputs import read_results

    targets = [_checked(path) for path in as_paths(out)]
    if not targets:
        raise UserError("no output was named; give a file that ends in .html, .md or .json")
    if len(set(targets)) < len(targets):
        raise OutputError("an output is named twice; give each its own file")
    found, unread = read_results(as_paths(results))
    page = build_page(found, unread)
    with progress.stage("writing the report", len(targets), "file") as advance:
        written = [(target, WRITERS[target.suffix.lower()](page)) for target in targets]
        for target, content in written:
            with atomic_file(target) as partial:
                partial.write_bytes(content)
            advance(1)
    if unread:
        names = ", ".join(one.name for one in unread)
        raise MeasurementError(
            f"{len(unread)} of the results could not be read ({names}); the report was written from the "
            "others and says why"
        )
    return page


def _checked(out: Path) -> Path:
    if out.suffix.lower() not in WRITERS:
        raise UserError(f"the report {out} must end in {', '.join(WRITERS)}; name it so")
    return fresh_output(out)


def build_page(found: Sequence[Result], unread: Sequence[Unread] = ()) -> Page:
    """Return the view of results that were read.

    Raises:
        UserError: they are of different experts.
    """
    from cusprun.pipeline.reporting.kinds import KINDS, ordered
    from cusprun.pipeline.reporting.one_expert import require_one_expert
    from cusprun.pipeline.reporting.verdict import judge
    from cusprun.pipeline.reporting.wording import moment
    from serve.report.view import Page

    by_kind = {name: [result.record for result in found if result.kind.name == name] for name in KINDS}
    require_one_expert(by_kind)
    sections = [
        section for name, records in by_kind.items() if records for section in KINDS[name].shown(records)
    ]
    return Page(
        title=_title(by_kind),
        summary=tuple(_summary(by_kind)),
        verdict=judge(_evidence(by_kind)),
        unread=tuple(unread),
        sections=ordered(sections),
        created=moment(max((getattr(result.record, "created", "") for result in found), default="")),
        cusprun_version=__version__,
    )


def _evidence(by_kind: Mapping[str, Sequence[Any]]) -> Any:
    from cusprun.pipeline.reporting.kinds import BENCH, EVAL, PARITY, RUN
    from cusprun.pipeline.reporting.one_expert import manifests
    from cusprun.pipeline.reporting.verdict import Evidence

    return Evidence(
        manifest=next(iter(manifests(by_kind)), None),
        quality=next((one for one in by_kind[EVAL] if len(one.models) > 1), None),
        parity=by_kind[PARITY],
        artifacts=[file for run in by_kind[RUN] for file in run.artifacts],
        suites=[suite for bench in by_kind[BENCH] for suite in bench.suites],
    )


def _names(by_kind: Mapping[str, Sequence[Any]]) -> tuple[str, str]:
    """Return what the model and the expert are called, by the first kind of result that knows."""
    from cusprun.pipeline.reporting.kinds import BENCH, EVAL, RUN, SWEEP
    from cusprun.pipeline.reporting.one_expert import manifests

    for run in by_kind[RUN]:
        return run.source, run.expert
    for manifest in manifests(by_kind):
        return manifest.source, manifest.expert.name
    for sweep in by_kind[SWEEP]:
        return sweep.model, sweep.expert
    for quality in by_kind[EVAL]:
        return quality.models[0].model, quality.expert
    for bench in by_kind[BENCH]:
        for suite in bench.suites:
            return suite.before.file_name, suite.after.file_name
    for load in by_kind["load test"]:
        models = [endpoint.model for endpoint in load.endpoints]
        return models[0], " and ".join(models[1:])
    return "", ""


def _title(by_kind: Mapping[str, Sequence[Any]]) -> str:
    before, after = _names(by_kind)
    if before:
        return f"{before} → {after}" if after else before
    return "Overlap of language, domain and task" if by_kind["overlap"] else "Proofs of exports"


def _summary(by_kind: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Yield two sentences: what this is and what it is for."""
    from cusprun.pipeline.reporting.expert import dimension_text
    from cusprun.pipeline.reporting.kinds import BENCH, MANIFEST, NEURONS, RUN

    before, after = _names(by_kind)
    if by_kind[MANIFEST]:
        manifest = by_kind[MANIFEST][0]
        yield (
            f"{after} is {before} with {manifest.plan.total_ratio:.1%} of its parameters removed, made for "
            f"{dimension_text(manifest)}."
        )
        yield (
            "It keeps what the original needs for such text and gives up some of the rest, so it is meant "
            "for that job alone."
        )
    elif by_kind[NEURONS]:
        zeroed = by_kind[NEURONS][0]
        share = zeroed.zeroed_parameters / zeroed.parameters
        yield (
            f"{after} is {before} with {share:.1%} of its parameters set to zero, made for "
            f"{dimension_text(zeroed)}."
        )
        yield "It is neither smaller nor faster: single neurons are set to zero to see what they are worth."
    elif by_kind[RUN]:
        yield f"{after} is {before} with {by_kind[RUN][0].total_ratio:.1%} of its parameters removed."
        yield "It is meant for the job that its expert file describes, and gives up some of the rest."
    elif by_kind[BENCH]:
        yield f"{after} was measured against {before} side by side on one machine."
        yield "Nothing here says how good its answers are; for that, add the results of cusprun run."
