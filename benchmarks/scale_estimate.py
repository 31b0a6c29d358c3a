"""Table ``estimate``: what `cusprun prune --estimate` says beforehand, against what then happens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial

from experts import SMOLLM2
from measuring import Job, Ledger, Options, Row
from scale_model import LLAMA_8B, QWEN_1_5B, TINY, cut_to
from scale_parts import RATIO, asked_for, gigabytes, minutes, verdict, wanted
from scale_subject import Subject
from watched import Watched, cusprun, watched

from cusprun.checkpoint.output import remove
from cusprun.codec import key_of

TABLE = "estimate"
OFF_MOST = 0.25
QUANTITIES = ("seconds", "memory_bytes", "disk_bytes")


SUBJECTS: Mapping[str, Subject] = {
    "smollm2-135m": Subject(SMOLLM2.title),
    "smollm2-135m-in-1GB": Subject(f"{SMOLLM2.title}, `--memory 1GB`", memory="1GB"),
    "qwen2.5-1.5b": Subject("4 blocks of Qwen2.5-1.5B's shape", cut_to(QWEN_1_5B, 4)),
    "llama-3.1-8b": Subject(
        "Llama-3.1-8B's shape, `--memory 4GB`", LLAMA_8B, documents=8, tokens=128, memory="4GB"
    ),
}
_SMOKE = {"tiny": Subject("tiny", cut_to(TINY, 2), documents=4, tokens=64)}


def fill(options: Options, ledger: Ledger) -> None:
    """Make the rows that are missing."""
    if not asked_for(options, TABLE):
        return
    subjects = _SMOKE if options.smoke else SUBJECTS
    jobs = [
        Job(
            key_of(name, subject.config, subject.memory),
            {"model": name},
            partial(_row, name, subject, options),
        )
        for name, subject in subjects.items()
    ]
    ledger.finish(TABLE, jobs, dict, fresh=options.fresh, show=_shown, wanted=wanted(options, TABLE))


def _row(name: str, subject: Subject, options: Options) -> Row:
    folder = options.scratch / TABLE / name
    model, expert = subject.opened(name, options.scratch)
    asked = [model, "--expert", expert, "--ratio", RATIO]
    asked += [] if subject.memory is None else ["--memory", subject.memory]
    env = {"CUSPRUN_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    report, places = folder / "estimate.json", (folder / "out", folder / "cache")
    for earlier in (report, *places):
        remove(earlier)
    estimating = watched(
        cusprun("prune", *asked, "--estimate", "--json", report),
        folder / "estimate.log",
        env=env,
    )
    told = json.loads(report.read_text(encoding="utf-8"))
    command = cusprun("prune", *asked, "--out", folder / "out" / "expert")
    found = watched(command, folder / "prune.log", env=env, folders=places)
    estimated = {name: float(told[name]) for name in QUANTITIES}
    measured = _measured(found)
    return {
        "title": subject.title,
        "estimating_seconds": round(estimating.seconds, 1),
        "estimated": estimated,
        "measured": measured,
        "estimated_over_measured": {name: estimated[name] / measured[name] for name in QUANTITIES},
    }


def _measured(found: Watched) -> dict[str, float]:
    return {
        "seconds": found.seconds,
        "memory_bytes": float(found.anonymous_bytes),
        "disk_bytes": float(found.disk_bytes),
    }


def is_close(ratio: float) -> bool:
    """Return whether an estimate is near enough."""
    return abs(ratio - 1) <= OFF_MOST


def _shown(row: Row) -> str:
    return ", ".join(f"{name} x {ratio:.2f}" for name, ratio in row["estimated_over_measured"].items())


def to_markdown(table: Row) -> str:
    """Render the table."""
    rows: Sequence[Row] = list(table["rows"].values())
    show = {"seconds": minutes, "memory_bytes": gigabytes, "disk_bytes": gigabytes}
    lines = [
        f"| {row['title']} | "
        + " | ".join(
            f"{show[name](row['estimated'][name])} / {show[name](row['measured'][name])} "
            f"= {row['estimated_over_measured'][name]:.2f}"
            for name in QUANTITIES
        )
        + f" | {minutes(row['estimating_seconds'])} |"
        for row in rows
    ]
    is_met = all(is_close(ratio) for row in rows for ratio in row["estimated_over_measured"].values())
    return (
        "| model | time, estimated / measured | memory, GB | disk, GB | the estimate took |\n"
        "|---|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n\n"
        f"Within {OFF_MOST:.0%} of what happens: {verdict(is_met)}.\n"
    )
