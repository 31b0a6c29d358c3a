"""Table ``walk``: scoring and the whole prune, against one plain forward pass in the same batches."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cost import one_round
from experts import SMOLLM2
from measuring import Job, Ledger, Options, Row
from scale_model import QWEN_1_5B, TINY, Config, cut_to, model_folder, random_corpora, random_model
from scale_parts import DEMO_EXPERT, asked_for, minutes, verdict, wanted

from cusprun.checkpoint.index import open_checkpoint
from cusprun.codec import key_of
from cusprun.corpus import build_corpora, load_expert
from cusprun.records import Corpora
from cusprun.resolve import resolve

TABLE = "walk"
ROUNDS = 3
SCORE_MOST = 1.15
PRUNE_MOST = 3.0
LAYERS = 4
WIDE = "qwen2.5-1.5b"
"""The row that plans for larger models are computed from."""
_PRODUCT_WIDTH = 2048


@dataclass(frozen=True)
class Subject:
    """A model and its documents: a real one with those of the demo, or a random one with random ones.

    Of a random model some blocks are measured, without the head, whose share they would distort.
    """

    title: str
    config: Config | None = None
    documents: int = 30
    tokens: int = 290
    rounds: int = ROUNDS

    @property
    def key(self) -> str:
        """The hash of what is measured."""
        return key_of(self.title, self.config, self.documents, self.tokens, self.rounds)

    def opened(self, scratch: Path) -> tuple[Path, Corpora]:
        """Return the model's folder and the documents."""
        if self.config is not None:
            folder = model_folder(scratch, self.config["model_type"], self.config)
            return random_model(folder, self.config), random_corpora(self.documents, self.tokens)
        folder = resolve(SMOLLM2.source).path
        corpora = build_corpora(load_expert(DEMO_EXPERT), folder)
        return folder, Corpora(corpora.calibration[: self.documents], ())


def _wide(layers: int, documents: int, rounds: int = ROUNDS) -> Subject:
    """Return some blocks of a wide model, with so many documents."""
    title = (
        f"{layers} of the {QWEN_1_5B['num_hidden_layers']} blocks of Qwen2.5-1.5B's shape, random weights, "
        "without the head"
    )
    return Subject(title, cut_to(QWEN_1_5B, layers), documents, rounds=rounds)


SUBJECTS: Mapping[str, Subject] = {
    "smollm2-135m": Subject(SMOLLM2.title),
    # As many tokens as above, fewer than half of the channels, and so many that the solution hardly counts.
    WIDE: _wide(layers=4, documents=30),
    f"{WIDE}-few-tokens": _wide(layers=4, documents=14),
    f"{WIDE}-many-tokens": _wide(layers=2, documents=226, rounds=1),
}
_SMOKE = {"tiny": Subject("tiny", cut_to(TINY, 2), documents=8, tokens=64, rounds=1)}


def fill(options: Options, ledger: Ledger) -> None:
    """Make the rows that are missing."""
    if not asked_for(options, TABLE):
        return
    subjects = _SMOKE if options.smoke else SUBJECTS
    jobs = [
        Job(subject.key, {"model": name}, partial(_row, subject, options.scratch))
        for name, subject in subjects.items()
    ]
    ledger.finish(TABLE, jobs, dict, fresh=options.fresh, show=_shown, wanted=wanted(options, TABLE))


def _row(subject: Subject, scratch: Path) -> Row:
    folder, corpora = subject.opened(scratch)
    index = open_checkpoint(folder)
    times = [one_round(index, corpora, with_head=subject.config is None) for _ in range(subject.rounds)]
    return {
        "title": subject.title,
        "config": dict(index.config),
        "product_rates": {"float32": _product_rate(torch.float32), "float64": _product_rate(torch.float64)},
        "hash_rate": _hash_rate(),
        "documents": len(corpora.calibration),
        "tokens": corpora.calibration_tokens,
        "rounds_seconds": times,
        "score_over_plain": _ratio(times, ("score",)),
        "prune_over_plain": _ratio(times, ("score", "plan", "refit_and_write")),
    }


def _product_rate(dtype: torch.dtype) -> float:
    """Return the operations per second of a product of large square matrices, the best of five."""
    matrix = torch.rand(_PRODUCT_WIDTH, _PRODUCT_WIDTH, dtype=dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * _PRODUCT_WIDTH**3 / min(seconds)


def _hash_rate() -> float:
    """Return the bytes per second of the hash that a model is known by, the best of five."""
    block = bytes(1 << 26)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        hashlib.sha256(block).digest()
        seconds.append(time.perf_counter() - started)
    return len(block) / min(seconds)


def _ratio(rounds: Sequence[Mapping[str, float]], stages: Sequence[str]) -> dict[str, float]:
    ratios = [sum(times[stage] for stage in stages) / times["plain_forward"] for times in rounds]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def _shown(row: Row) -> str:
    return (
        f"scoring {row['score_over_plain']['median']:.2f} x, the whole prune "
        f"{row['prune_over_plain']['median']:.2f} x a plain forward pass"
    )


def to_markdown(table: Row) -> str:
    """Render the table."""
    rows: Sequence[Row] = list(table["rows"].values())
    lines = [
        f"| {row['title']} | {row['tokens']:,} | {_seconds(row)} | {_shown_ratio(row['score_over_plain'])} | "
        f"{_shown_ratio(row['prune_over_plain'])} |"
        for row in rows
    ]
    scoring = all(row["score_over_plain"]["median"] <= SCORE_MOST for row in rows)
    pruning = all(row["prune_over_plain"]["median"] <= PRUNE_MOST for row in rows)
    return (
        "| model | tokens | plain forward pass | scoring ÷ plain | whole prune ÷ plain |\n"
        "|---|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n\n"
        f"Medians and range of up to {max(len(row['rounds_seconds']) for row in rows)} rounds, each in one "
        "process and in the same batches; the plain pass is stock transformers'. The whole prune is scoring, "
        "plan, refit (target `output`) and writing. What the refit's solution takes does not grow with the "
        f"tokens. Scoring at most {SCORE_MOST} times: {verdict(scoring)}; the whole prune at most "
        f"{PRUNE_MOST} times: {verdict(pruning)}.\n"
    )


def _seconds(row: Row) -> str:
    return minutes(statistics.median(times["plain_forward"] for times in row["rounds_seconds"]))


def _shown_ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
