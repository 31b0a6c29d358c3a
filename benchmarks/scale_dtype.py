"""Table ``dtype``: a prune with products in bfloat16 against one in float32, and what that changes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from experts import SMOLLM2
from measuring import Job, Ledger, Options, Row
from safetensors.torch import load_file
from scale_model import QWEN_1_5B, TINY, cut_to
from scale_parts import RATIO, asked_for, gigabytes, minutes, wanted
from scale_subject import Subject
from watched import cusprun, watched

from cusprun.checkpoint.output import remove
from cusprun.codec import key_of, load_json
from cusprun.errors import ModelError
from cusprun.records import Manifest
from cusprun.walk.device import DTYPES

TABLE = "dtype"
ROUNDS = 2
STAGES = {"score": "scoring", "refit_and_write": "refit and writing"}


SUBJECTS: Mapping[str, Subject] = {
    "smollm2-135m": Subject(SMOLLM2.title),
    "qwen2.5-1.5b": Subject(
        "4 blocks of Qwen2.5-1.5B's shape, random weights", cut_to(QWEN_1_5B, 4), documents=14, tokens=290
    ),
}
_SMOKE = {"tiny": Subject("tiny", cut_to(TINY, 2), documents=8, tokens=64)}


def fill(options: Options, ledger: Ledger) -> None:
    """Make the rows that are missing."""
    if not asked_for(options, TABLE):
        return
    subjects, rounds = (_SMOKE, 1) if options.smoke else (SUBJECTS, ROUNDS)
    jobs = [
        Job(
            key_of(name, vars(subject), rounds),
            {"model": name},
            partial(_row, name, subject, rounds, options),
        )
        for name, subject in subjects.items()
    ]
    ledger.finish(TABLE, jobs, dict, fresh=options.fresh, show=_shown, wanted=wanted(options, TABLE))


@dataclass(frozen=True)
class _Pruned:
    """What one prune took and made; ``impacts`` are those of FFN channels, [documents, channels] by block."""

    seconds: Mapping[str, float]
    memory_bytes: int
    impacts: Sequence[torch.Tensor]
    kept: Sequence[frozenset[int]]
    perplexity: float | None


def _row(name: str, subject: Subject, rounds: int, options: Options) -> Row:
    model, expert = subject.opened(name, options.scratch)
    made: dict[str, list[_Pruned]] = {dtype: [] for dtype in DTYPES}
    for _ in range(rounds):
        for dtype, found in made.items():
            found.append(_prune(model, expert, options.scratch / TABLE / name / dtype, dtype))
    exact, rounded = (made[dtype][0] for dtype in DTYPES)
    errors = torch.cat(
        [((b - a).abs() / a)[a > 0] for a, b in zip(exact.impacts, rounded.impacts, strict=True)]
    )
    return {
        "title": subject.title,
        "rounds_seconds": {dtype: [dict(each.seconds) for each in found] for dtype, found in made.items()},
        "memory_bytes": {dtype: max(each.memory_bytes for each in found) for dtype, found in made.items()},
        "impact_error": {"median": _quantile(errors, 0.5), "p99": _quantile(errors, 0.99)},
        "kept_alike": sum(len(a & b) for a, b in zip(exact.kept, rounded.kept, strict=True))
        / sum(map(len, exact.kept)),
        "perplexity": {dtype: found[0].perplexity for dtype, found in made.items()},
    }


def _quantile(values: torch.Tensor, share: float) -> float:
    return float(values.sort().values[int(share * (len(values) - 1))])


def _prune(model: Path, expert: Path, folder: Path, dtype: str) -> _Pruned:
    remove(folder)
    out = folder / "expert"
    command = cusprun("prune", model, "--expert", expert, "--ratio", RATIO, "--dtype", dtype, "--out", out)
    # A cache of its own: what the last round scored must not be found.
    found = watched(command, folder / "log", env={"CUSPRUN_CACHE": str(folder / "cache")})
    manifest = load_json(Manifest, out / "cusprun.json", ModelError)
    quality = manifest.measurements.get("held_out", {})
    return _Pruned(
        seconds={stage: manifest.seconds[stage] for stage in STAGES},
        memory_bytes=found.anonymous_bytes,
        impacts=[
            load_file(path)["ffn_channel"].double()
            for path in sorted((folder / "cache" / "scores").glob("*/*.safetensors"))
        ],
        kept=[frozenset(layer.ffn_channels) for layer in manifest.plan.layers],
        perplexity=quality.get("perplexity_after"),
    )


def _shown(row: Row) -> str:
    parts = [f"{STAGES[stage]} {_ratio(row, stage):.2f} x" for stage in STAGES]
    return f"{', '.join(parts)}, {row['kept_alike']:.1%} of channels alike"


def _median(row: Row, dtype: str, stage: str) -> float:
    return statistics.median(times[stage] for times in row["rounds_seconds"][dtype])


def _ratio(row: Row, stage: str) -> float:
    exact, rounded = (_median(row, dtype, stage) for dtype in DTYPES)
    return rounded / exact


def to_markdown(table: Row) -> str:
    """Render the table."""
    rows: Sequence[Row] = list(table["rows"].values())
    lines = [_line(row) for row in rows]
    return (
        "| model | scoring | refit and writing | memory, GB | impacts off by, median (99 %) | channels kept "
        "alike | perplexity of the expert |\n|---|---:|---:|---:|---:|---:|---:|\n"
        + "\n".join(lines)
        + "\n\n"
        "float32 → bfloat16: `--dtype bfloat16` makes the products of linear layers in 8 bits and adds in "
        "float32; the least squares and perplexities are as exact as ever. Impacts are those of FFN channels "
        f"on single documents. Medians of {len(rows[0]['rounds_seconds'][DTYPES[0]])} rounds in turn.\n"
    )


def _line(row: Row) -> str:
    times = [
        f"{' → '.join(minutes(_median(row, dtype, stage)) for dtype in DTYPES)} = {_ratio(row, stage):.2f}"
        for stage in STAGES
    ]
    quality = [row["perplexity"][dtype] for dtype in DTYPES]
    shown = "" if row["title"] != SMOLLM2.title else " → ".join(f"{value:.3f}" for value in quality)
    error = row["impact_error"]
    return (
        f"| {row['title']} | {' | '.join(times)} | "
        f"{' → '.join(gigabytes(row['memory_bytes'][dtype]) for dtype in DTYPES)} | "
        f"{error['median']:.2%} ({error['p99']:.2%}) | {row['kept_alike']:.1%} | {shown} |"
    )
