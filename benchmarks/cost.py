"""`make bench-cost`: what pruning costs, against one plain forward pass of stock transformers.

The calibration documents of the demo's expert run through SmolLM2-135M-Instruct in the same batches and type,
several rounds of: plain forward, score, plan, refit and write, all in one process. Reported are the medians
of the rounds and their range. Writes ``benchmarks/results/cost.json`` and ``cost.md``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experts import SMOLLM2
from measuring import RESULTS, machine, stock_model

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.corpus import build_corpora, load_expert
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning.planner import make_plan
from cusprun.pruning.rewrite import write_weights
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.records import Corpora
from cusprun.resolve import resolve
from cusprun.walk.batches import make_batches

EXPERT = Path(__file__).parent / "demo" / "expert.yaml"
ROUNDS = 3
DOCUMENTS = 30

TARGET = "output"
"""What the refit aims at: the target that needs no second stream, so that the walk itself is timed."""


def main() -> None:
    """Run the benchmark."""
    index = open_checkpoint(resolve(SMOLLM2.source).path)
    corpora = build_corpora(load_expert(EXPERT), index.folder)
    corpora = Corpora(corpora.calibration[:DOCUMENTS], ())
    rounds = [one_round(index, corpora) for _ in range(ROUNDS)]
    ratios = [sum(times.values()) / times["plain_forward"] - 1 for times in rounds]
    result = {
        "schema_version": 1,
        "command": "make bench-cost",
        "machine": machine(),
        "documents": len(corpora.calibration),
        "tokens": corpora.calibration_tokens,
        "rounds_seconds": rounds,
        "pruning_over_plain_forward": {
            "median": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cost.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "cost.md").write_text(to_markdown(result), encoding="utf-8")
    print(to_markdown(result))


def one_round(index: CheckpointIndex, corpora: Corpora, *, with_head: bool = True) -> dict[str, float]:
    """Time a plain forward pass and the three stages of pruning at ratio 0.25, once each.

    The pass goes up to the last hidden states alone when it is to be without the head.
    """
    seconds: dict[str, float] = {}
    model = stock_model(index.folder)
    plain = model if with_head else model.get_decoder()
    timed(seconds, "plain_forward", partial(plain_forward, plain, corpora))
    del model, plain
    with tempfile.TemporaryDirectory(prefix="cusprun-bench-") as scratch:
        root = Path(scratch)
        digest = model_hash(index)
        timed(
            seconds,
            "score",
            lambda: score_model(index, corpora, root / "store", model_hash=digest, corpus_hash="bench"),
        )
        plan = timed(
            seconds,
            "plan",
            lambda: make_plan(index, open_store(root / "store"), model_hash=digest, ratio=0.25),
        )
        (root / "expert").mkdir()
        timed(
            seconds,
            "refit_and_write",
            lambda: write_weights(
                index,
                plan,
                root / "expert",
                corpora.calibration,
                settings=PruneWishes(refit_target=TARGET).settings(plan.rule, index.family),
            ),
        )
    return seconds


@torch.inference_mode()
def plain_forward(model: Any, corpora: Corpora) -> None:
    """Run the stock model once over the documents."""
    for batch in make_batches(corpora.calibration):
        model(input_ids=batch.token_ids, use_cache=False)


def timed(seconds: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """Do the work and record its wall-clock time."""
    started = time.perf_counter()
    outcome = work()
    seconds[name] = time.perf_counter() - started
    return outcome


def to_markdown(result: dict[str, Any]) -> str:
    """Render the result."""
    names = list(result["rounds_seconds"][0])
    medians = {name: statistics.median(r[name] for r in result["rounds_seconds"]) for name in names}
    ratio = result["pruning_over_plain_forward"]
    rows = "\n".join(f"| {name.replace('_', ' ')} | {medians[name]:.1f} |" for name in names)
    return (
        f"| stage | seconds |\n|---|---:|\n{rows}\n\n"
        f"Score, plan, refit and write together take {ratio['median']:.2f} times one plain forward pass of "
        f"transformers over the same documents ({ratio['low']:.2f} to {ratio['high']:.2f} over "
        f"{len(result['rounds_seconds'])} rounds). SmolLM2-135M-Instruct, {result['documents']} documents, "
        f"{result['tokens']:,} tokens, {result['machine']['torch_threads']} threads of "
        f"{result['machine']['cpu']}. The refit aims at `{TARGET}` here; `residual` adds one pass of the "
        f"original. Made by `{result['command']}`.\n"
    )


if __name__ == "__main__":
    main()
