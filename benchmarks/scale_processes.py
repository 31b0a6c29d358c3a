"""Table ``processes``: one prune by two processes with a thread each, against one process with one thread."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from experts import SMOLLM2
from measuring import Job, Ledger, Options, Row
from scale_model import TINY, cut_to, expert_file, random_model
from scale_parts import DEMO_EXPERT, RATIO, asked_for, verdict, wanted
from watched import cusprun, watched

from cusprun.codec import key_of, load_json
from cusprun.errors import ModelError
from cusprun.records import Manifest
from cusprun.resolve import resolve

TABLE = "processes"
ROUNDS = 3
EFFICIENCY_LEAST = 0.8
PROCESSES = 2
STAGES: Mapping[str, str] = {
    "score": "scoring",
    "refit_and_write": "refit and writing",
    "command": "the whole command, with its start and the measuring of quality",
}


def fill(options: Options, ledger: Ledger) -> None:
    """Make the row if it is missing."""
    if not asked_for(options, TABLE):
        return
    rounds = 1 if options.smoke else ROUNDS
    name = "tiny" if options.smoke else SMOLLM2.name
    job = Job(key_of(name, rounds, PROCESSES), {"model": name}, partial(_row, options, rounds))
    ledger.finish(TABLE, [job], dict, fresh=options.fresh, show=_shown, wanted=wanted(options, TABLE))


def _row(options: Options, rounds: int) -> Row:
    folder = options.scratch / TABLE
    if options.smoke:
        model, expert = random_model(folder / "model", cut_to(TINY, 2)), expert_file(folder / "corpus", 4, 64)
    else:
        model, expert = resolve(SMOLLM2.source).path, DEMO_EXPERT
    times: dict[int, list[dict[str, float]]] = {1: [], PROCESSES: []}
    for number in range(rounds):
        for count, found in times.items():
            found.append(_timed(model, expert, folder / f"round-{number}-of-{count}", count))
    return {
        "title": SMOLLM2.title,
        "processes": PROCESSES,
        "rounds_seconds": {str(count): found for count, found in times.items()},
        "efficiency": {stage: _efficiency(times, stage) for stage in STAGES},
    }


def _timed(model: Path, expert: Path, folder: Path, processes: int) -> dict[str, float]:
    """Prune with so many processes of one thread each; return the seconds of the stages and of it all."""
    out = folder / "expert"
    command = cusprun("prune", model, "--expert", expert, "--ratio", RATIO, "--out", out)
    if processes > 1:
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes))
        command = [sys.executable, *launcher, *command[1:]]
    found = watched(
        command,
        folder / "log",
        # A cache of its own: what the last round scored must not be found.
        env={"OMP_NUM_THREADS": "1", "CUSPRUN_CACHE": str(folder / "cache")},
    )
    manifest = load_json(Manifest, out / "cusprun.json", ModelError)
    return {**manifest.seconds, "command": found.seconds}


def _efficiency(times: Mapping[int, Sequence[Mapping[str, float]]], stage: str) -> float:
    one, several = (statistics.median(each[stage] for each in found) for found in times.values())
    return one / (PROCESSES * several)


def _shown(row: Row) -> str:
    return ", ".join(f"{stage} {value:.2f}" for stage, value in row["efficiency"].items())


def to_markdown(table: Row) -> str:
    """Render the table."""
    row: Row = next(iter(table["rows"].values()))
    one, several = (
        {stage: statistics.median(each[stage] for each in rounds) for stage in STAGES}
        for rounds in row["rounds_seconds"].values()
    )
    lines = [
        f"| {STAGES[stage]} | {one[stage]:.1f} s | {several[stage]:.1f} s | {value:.2f} |"
        for stage, value in row["efficiency"].items()
    ]
    met = {stage: verdict(value >= EFFICIENCY_LEAST) for stage, value in row["efficiency"].items()}
    return (
        f"| stage | 1 process, 1 thread | {row['processes']} processes, 1 thread each | efficiency |\n"
        "|---|---:|---:|---:|\n" + "\n".join(lines) + "\n\n"
        f"{row['title']}, the demo's documents, medians of {len(row['rounds_seconds']['1'])} rounds in turn. "
        f"An efficiency of at least {EFFICIENCY_LEAST} in scoring: {met['score']}; in refit and writing, "
        f"where the first process solves and writes alone: {met['refit_and_write']}.\n"
    )
