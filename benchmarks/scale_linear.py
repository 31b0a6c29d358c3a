"""Table ``linear``: how the time of scoring and of the whole prune grows with what there is to do."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from measuring import Job, Ledger, Options, Row
from scale_model import MEDIUM, TINY, Config, cut_to, model_folder, random_corpora, random_model
from scale_parts import RATIO, asked_for, exponent, verdict, wanted

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.codec import key_of
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning.planner import make_plan
from cusprun.pruning.rewrite import write_weights
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.records import Corpora

TABLE = "linear"
FACTORS = (1, 2, 4, 8, 16)
ROUNDS = 3
EXPONENT_MOST = 1.1


@dataclass(frozen=True)
class Size:
    """What there is to do: documents of so many tokens each, through so many blocks."""

    documents: int
    tokens: int
    layers: int

    def grown(self, axis: str, factor: int) -> Size:
        """Return a size that is ``factor`` times as large along one axis."""
        return replace(self, **{axis: getattr(self, axis) * factor})


STARTS: Mapping[str, Size] = {
    # 2,048 tokens at the least, so that the refit sees more tokens than the model has channels at every size.
    "documents": Size(documents=32, tokens=64, layers=4),
    "tokens": Size(documents=64, tokens=32, layers=4),
    "layers": Size(documents=32, tokens=64, layers=2),
}
"""Where each axis starts."""

_SMOKE = {axis: Size(documents=6, tokens=32, layers=1) for axis in STARTS}

_WARM_UP = Size(documents=32, tokens=64, layers=1)


def fill(options: Options, ledger: Ledger) -> None:
    """Make the rows that are missing."""
    if not asked_for(options, TABLE):
        return
    config, factors, rounds = (TINY, FACTORS[:2], 1) if options.smoke else (MEDIUM, FACTORS, ROUNDS)
    starts = _SMOKE if options.smoke else STARTS
    jobs = [
        Job(
            key_of(axis, vars(start), factors, rounds, config),
            {"axis": axis},
            partial(_row, axis, start, factors, rounds, config, options.scratch),
        )
        for axis, start in starts.items()
    ]
    ledger.finish(TABLE, jobs, dict, fresh=options.fresh, show=_shown, wanted=wanted(options, TABLE))


def _row(axis: str, start: Size, factors: Sequence[int], rounds: int, config: Config, scratch: Path) -> Row:
    sizes = [start.grown(axis, factor) for factor in factors]
    _timed(_WARM_UP, config, scratch)
    # Round by round, so that what else the machine does falls on all sizes alike; the fastest of each counts.
    times = [[_timed(size, config, scratch) for size in sizes] for _ in range(rounds)]
    best = {
        stage: [min(each[position][stage] for each in times) for position in range(len(sizes))]
        for stage in ("score", "prune")
    }
    values = [getattr(size, axis) for size in sizes]
    return {
        **vars(start),
        "sizes": values,
        "score_seconds": best["score"],
        "prune_seconds": best["prune"],
        "score_exponent": exponent(values, best["score"]),
        "prune_exponent": exponent(values, best["prune"]),
    }


def _timed(size: Size, config: Config, scratch: Path) -> dict[str, float]:
    """Return the seconds of scoring, and of the whole prune with it."""
    cut = cut_to(config, size.layers)
    index = open_checkpoint(random_model(model_folder(scratch, f"hidden-{cut['hidden_size']}", cut), cut))
    corpora = random_corpora(size.documents, size.tokens)
    with tempfile.TemporaryDirectory(dir=scratch) as made:
        return _prune(index, corpora, Path(made))


def _prune(index: CheckpointIndex, corpora: Corpora, root: Path) -> dict[str, float]:
    digest = model_hash(index)
    started = time.perf_counter()
    store = score_model(index, corpora, root / "store", model_hash=digest, corpus_hash="bench")
    scored = time.perf_counter()
    plan = make_plan(index, open_store(store), model_hash=digest, ratio=RATIO)
    (root / "expert").mkdir()
    settings = PruneWishes().settings(plan.rule, index.family)
    write_weights(index, plan, root / "expert", corpora.calibration, settings=settings)
    return {"score": scored - started, "prune": time.perf_counter() - started}


def _shown(row: Row) -> str:
    return f"scoring grows as size^{row['score_exponent']:.2f}, the prune as size^{row['prune_exponent']:.2f}"


def to_markdown(table: Row) -> str:
    """Render the table."""
    rows: Sequence[Row] = list(table["rows"].values())
    lines = [
        f"| {row['axis']} | {row['sizes'][0]} to {row['sizes'][-1]} | {_ends(row['score_seconds'])} | "
        f"{row['score_exponent']:.2f} | {_ends(row['prune_seconds'])} | {row['prune_exponent']:.2f} |"
        for row in rows
    ]
    is_met = all(max(row["score_exponent"], row["prune_exponent"]) <= EXPONENT_MOST for row in rows)
    return (
        "| what grows | range | scoring | exponent | whole prune | exponent |\n"
        "|---|---:|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n\n"
        f"Fitted over {len(rows[0]['sizes'])} sizes; a random model with the hidden size "
        f"{MEDIUM['hidden_size']} and {MEDIUM['intermediate_size']} FFN channels. What does not grow with an "
        "axis, as the solution of the refit with the number of documents, lowers its exponent. At most "
        f"{EXPONENT_MOST}: {verdict(is_met)}.\n"
    )


def _ends(seconds: Sequence[float]) -> str:
    return f"{seconds[0]:.2f} to {seconds[-1]:.2f} s"
