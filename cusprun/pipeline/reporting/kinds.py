"""The kinds of results that a report can show.

A further kind is one function from its records to sections, and one line of :data:`KINDS`. Sections with the
same name, whatever kind they come from, become one, in the order of :data:`PLACES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from serve.report.view import Section

_HERE = "cusprun.pipeline.reporting"

PLACES = (
    "table", "measured", "speed", "quality", "endpoint", "pruned", "overlap", "curve", "parity", "answers",
    "method", "reproduce",
)  # fmt: skip
"""Names of sections in the order of the page; a name that is not here comes before ``method``."""


@dataclass(frozen=True)
class ResultKind:
    """One kind of result file.

    ``name`` is what it is called, ``record`` the class that holds it and ``sections`` the functions that show
    all records of the kind that were given, each as ``module:name``, imported when they are needed. A file is
    of the first kind whose ``keys`` it has all. ``parts`` are keys that hold a record of another kind, or a
    list of such, which is shown as if it had been given too.
    """

    name: str
    record: str
    keys: frozenset[str]
    sections: tuple[str, ...]
    parts: Mapping[str, str]

    def record_type(self) -> type:
        """Return the class of the records."""
        found: type = _imported(self.record)
        return found

    def shown(self, records: Sequence[Any]) -> Iterator[Section]:
        """Yield the sections of all records of this kind."""
        for name in self.sections:
            show: Callable[[Sequence[Any]], Iterator[Section]] = _imported(name)
            yield from show(records)


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _kind(name: str, record: str, keys: str, sections: str, **parts: str) -> ResultKind:
    functions = tuple(f"{_HERE}.{place}" for place in sections.split())
    return ResultKind(name, record, frozenset(keys.split()), functions, parts)


RUN, BENCH, EVAL, PARITY, MANIFEST = "run", "bench", "evaluation", "proof", "manifest"
NEURONS, SWEEP = "manifest of single neurons", "sweep"

KINDS: Mapping[str, ResultKind] = {
    kind.name: kind
    for kind in (
        _kind(RUN, "cusprun.pipeline.results:RunReport", "source expert table artifacts", "runs:run_sections",
              bench=BENCH, quality=EVAL, parity=PARITY),
        _kind(MANIFEST, "cusprun.records:Manifest", "source_hash plan parameters_after",
              "expert:manifest_sections"),
        _kind(NEURONS, "cusprun.records:NeuronManifest", "source_hash plan zeroed_parameters",
              "neurons:neuron_sections"),
        _kind(BENCH, "serve.bench.records:BenchReport", "options environment elapsed_s",
              "measured:bench_sections method:method_sections"),
        _kind(EVAL, "cusprun.quality.report:EvalReport", "expert models resamples", "quality:eval_sections"),
        _kind("load test", "serve.bench.endpoint.records:EndpointReport", "endpoints results prompts",
              "endpoints:endpoint_sections"),
        _kind(SWEEP, "cusprun.pipeline.curve:SweepReport", "inputs_hash original points",
              "curves:sweep_sections"),
        _kind("overlap", "cusprun.pruning.overlap:OverlapReport", "dimensions pairs kinds",
              "curves:overlap_sections"),
        _kind(PARITY, "exporters.parity_records:ParityReport", "verdict limits logits",
              "quality:parity_sections"),
    )
}  # fmt: skip
"""Every kind by its name."""


def ordered(sections: Sequence[Section]) -> tuple[Section, ...]:
    """Return the sections in the order of the page, those of one name as one."""
    merged: dict[str, Section] = {}
    for section in sections:
        known = merged.get(section.name)
        blocks = (*known.blocks, *section.blocks) if known else section.blocks
        merged[section.name] = Section(section.name, (known or section).title, blocks)
    unplaced = PLACES.index("method") - 0.5
    return tuple(
        sorted(
            merged.values(),
            key=lambda one: PLACES.index(one.name) if one.name in PLACES else unplaced,
        )
    )
