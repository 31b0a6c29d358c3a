"""The result of a recipe: one record and one table, before against after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cusprun.paths import num_bytes
from cusprun.pipeline.samples import SampleAnswer
from cusprun.quality.report import CorpusQuality, EvalReport
from cusprun.records import Manifest
from cusprun.version import __version__
from exporters.parity_records import ParityReport
from serve.bench import table as bench_tables
from serve.bench.records import BenchReport
from serve.bench.table import Row, Table, exact_change, format_bytes, format_count

_BENCH_METRICS = ("peak_memory_bytes", "time_to_first_token_ms", "decode_tokens_per_second")
_SIZES = ("Parameters", "File size")  # of a bench table, which stand further up here
_COMPENSATIONS = {"refit": "with refit", "bias": "with biases for what went", "none": "no refit"}
_LABELS = {"held_out": "Perplexity, held-out expert documents", "general": "Perplexity, general text"}


@dataclass(frozen=True)
class ArtifactFile:
    """One export, a file or a folder, of original (``before``) or expert (``after``)."""

    side: str
    quant: str
    file_name: str
    file_bytes: int
    format: str = "gguf"

    @property
    def kind(self) -> str:
        """Format and precision; a precision alone is a GGUF file's."""
        return self.quant if self.format == "gguf" else f"{self.format} {self.quant}"


@dataclass(frozen=True)
class RunReport:
    """``results.json``: the table and everything it rests on; None stands for what was not asked for.

    ``seconds`` are those of the stages that this run did itself; the manifest's are of the pruning.
    ``samples`` are answers of both models to held-out prompts, none where the recipe asks for none.
    ``recipe`` is what the recipe said beside its model and paths; empty where it was not kept.
    """

    created: str
    cusprun_version: str
    source: str
    expert: str
    ratio: float
    block_ratio: float
    total_ratio: float
    table: Table
    artifacts: tuple[ArtifactFile, ...]
    parity: tuple[ParityReport, ...]
    quality: EvalReport | None
    bench: BenchReport | None
    seconds: Mapping[str, float]
    prune_seconds: Mapping[str, float]
    samples: tuple[SampleAnswer, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = 2


def run_report(
    *,
    manifest: Manifest,
    artifacts: Mapping[tuple[str, str], Mapping[str, Path]],
    parity: tuple[ParityReport, ...],
    quality: EvalReport | None,
    bench: BenchReport | None,
    seconds: Mapping[str, float],
    samples: tuple[SampleAnswer, ...] = (),
    recipe: Mapping[str, Any],
) -> RunReport:
    """Put the parts together; ``artifacts`` maps format and precision to ``original`` and ``expert``."""
    files = tuple(
        ArtifactFile(side, quant, path.name, num_bytes(path), to)
        for (to, quant), paths in artifacts.items()
        for side, path in zip(("before", "after"), paths.values(), strict=True)
    )
    return RunReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cusprun_version=__version__,
        source=manifest.source,
        expert=manifest.expert.name,
        ratio=manifest.plan.ratio,
        block_ratio=manifest.plan.block_ratio,
        total_ratio=manifest.plan.total_ratio,
        table=_table(manifest, files, parity, quality, bench),
        artifacts=files,
        parity=parity,
        quality=quality,
        bench=bench,
        seconds=dict(seconds),
        prune_seconds=manifest.seconds,
        samples=samples,
        recipe=recipe,
    )


def to_markdown(report: RunReport) -> str:
    """Return the table with a heading, in Markdown."""
    return f"# {report.source} → {report.expert}\n\n{bench_tables.to_markdown(report.table)}"


def _table(
    manifest: Manifest,
    files: tuple[ArtifactFile, ...],
    parity: tuple[ParityReport, ...],
    quality: EvalReport | None,
    bench: BenchReport | None,
) -> Table:
    suites = bench.suites if bench else ()
    tables = [bench_tables.bench_table(bench, suite, _BENCH_METRICS) for suite in suites] if bench else []
    rows = [
        Row(
            "Parameters",
            format_count(manifest.parameters_before),
            format_count(manifest.parameters_after),
            exact_change(manifest.parameters_before, manifest.parameters_after, "smaller", "larger"),
        )
    ]
    for kind in dict.fromkeys(file.kind for file in files):
        before, after = (file.file_bytes for file in files if file.kind == kind)
        rows.append(
            Row(
                f"File size ({kind})",
                format_bytes(before),
                format_bytes(after),
                exact_change(before, after, "smaller", "larger"),
            )
        )
    for suite, measured in zip(suites, tables, strict=True):
        named = f" in {bench_tables.suite_title(suite)}" if len(suites) > 1 else ""
        rows += [replace(row, metric=row.metric + named) for row in measured.rows if row.metric not in _SIZES]
    if quality:
        rows += [_perplexity_row(name, quality) for name in quality.corpus_names()]
    notes = [
        f"{bench_tables.suite_title(suite)}: {note}" if len(suites) > 1 else note
        for suite, measured in zip(suites, tables, strict=True)
        for note in measured.notes
    ]
    return Table(tuple(rows), (*_notes(manifest, parity, quality), *notes))


def _perplexity_row(name: str, quality: EvalReport) -> Row:
    before, after = (model.corpora[name] for model in quality.models)
    return Row(
        _LABELS[name], f"{before.perplexity.value:.2f}", f"{after.perplexity.value:.2f}", ratio_text(after)
    )


def ratio_text(quality: CorpusQuality) -> str:
    """Return a change of perplexity with its interval, such as ``↑ 7.4 % (6.1 to 8.9), worse``."""
    ratio = quality.perplexity_ratio
    assert ratio is not None
    low, middle, high = (100 * (value - 1) for value in (ratio.low, ratio.value, ratio.high))
    if low <= 0 <= high:
        return f"no difference shown ({low:+.1f} to {high:+.1f} %)"
    near, far = sorted((abs(low), abs(high)))
    arrow, word = ("↓", "better") if middle < 0 else ("↑", "worse")
    return f"{arrow} {abs(middle):.1f} % ({near:.1f} to {far:.1f}), {word}"


def _notes(
    manifest: Manifest, parity: tuple[ParityReport, ...], quality: EvalReport | None
) -> tuple[str, ...]:
    plan = manifest.plan
    notes = [
        f"{plan.block_ratio:.1%} of the blocks' attention and FFN parameters are gone, "
        f"{plan.total_ratio:.1%} of all; rule {manifest.rule}, {_COMPENSATIONS[manifest.compensation]}, "
        f"{manifest.calibration_documents} calibration documents ({manifest.calibration_tokens:,} tokens)."
    ]
    notes += [
        f"{report.artifact} computes the same as its checkpoint: KL {report.logits.mean_kl:.1e} nats per "
        f"token, top-1 agreement {report.logits.top1_agreement:.2%} over {report.logits.tokens:,} tokens."
        for report in parity
    ]
    if quality:
        sizes = "; ".join(
            f"{name.replace('_', '-')}: {row.documents} documents, {row.predicted_tokens:,} tokens"
            for name, row in quality.models[0].corpora.items()
        )
        notes.append(f"Perplexities in float32, changes with 95 % intervals over documents ({sizes}).")
    return tuple(notes)
