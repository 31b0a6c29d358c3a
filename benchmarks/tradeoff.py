"""`make bench-tradeoff DATA=FOLDER`: the expert against general text, and few documents against many.

SmolLM2-135M-Instruct, English maths, a quarter of the block parameters, the default rule. First the weight
of the language documents in the refit; then twenty maths documents alone, the same with documents that the
model makes of them, and two hundred real ones. Finished rows are kept; ``--fresh`` makes all again, ``--only
weights`` or ``--only documents`` those of one table. Writes ``benchmarks/results/tradeoff.json`` and
``tradeoff.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from experts import ENGLISH_MATHS, MAX_TOKENS, SMOLLM2, BenchExpert
from measuring import (
    UNITS,
    Bench,
    Job,
    Ledger,
    Options,
    Row,
    corpora_text,
    interval,
    machine_text,
    run,
)

from cusprun.errors import require_known
from cusprun.pipeline.augment import augmented
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning.planner import make_plan
from cusprun.pruning.rules import DEFAULT_RULE
from cusprun.records import Augment, Expert

RATIO = 0.25
LANGUAGE_WEIGHTS = (0.3, 1.0, 3.0, 10.0)
FEW, MADE, MANY = 20, 80, 200
TEMPERATURE = 0.8


def maths_alone(count: int) -> BenchExpert:
    """Return the maths expert with ``count`` maths documents and no language dimension."""
    domain = ENGLISH_MATHS.calibration[0]
    return replace(ENGLISH_MATHS, calibration=(replace(domain, count=count),))


@dataclass(frozen=True)
class Documents:
    """How many real documents there are, and how many the model makes of them."""

    real: int
    made: int
    title: str


DOCUMENTS = (
    Documents(FEW, 0, f"{FEW} real documents"),
    Documents(FEW, MADE, f"{FEW} real documents and up to {MADE} that the model makes of them"),
    Documents(MANY, 0, f"{MANY} real documents"),
)
TABLES = ("weights", "documents")


def make(options: Options, ledger: Ledger) -> str:
    """Make all rows and return both tables."""
    if options.only is not None:
        require_known(options.only, TABLES, "table")
    if options.only in (None, "weights"):
        fill_weights(options, ledger)
    if options.only in (None, "documents"):
        fill_documents(options, ledger)
    texts = []
    if "weights" in ledger.tables:
        texts.append(weights_text(ledger.tables["weights"]))
    if "documents" in ledger.tables:
        texts.append(documents_text(ledger.tables["documents"]))
    rows = [row for table in ledger.tables.values() for row in table["rows"].values()]
    texts.append(
        f"{SMOLLM2.title}, ratio {RATIO}, rule `{DEFAULT_RULE}` with its refit, FFN channels alone. "
        f"{machine_text(rows)} Made by `{ledger.content['command']}`.\n"
    )
    return "\n".join(texts)


def fill_weights(options: Options, ledger: Ledger) -> None:
    """Make the rows of the language weights."""
    expert = options.expert(ENGLISH_MATHS)
    bench = Bench.of(SMOLLM2, expert, options, options.scratch / "weights")
    jobs = [
        Job(
            bench.key(RATIO, UNITS, DEFAULT_RULE, {"language": weight}),
            {"language_weight": weight},
            partial(pruned_row, bench, {"language": weight}),
        )
        for weight in (LANGUAGE_WEIGHTS[:1] if options.smoke else LANGUAGE_WEIGHTS)
    ]
    ledger.finish("weights", jobs, bench.description, fresh=options.fresh, device=options.device)


def fill_documents(options: Options, ledger: Ledger) -> None:
    """Make the rows of few and many documents."""
    jobs = []
    benches = []
    for documents in DOCUMENTS:
        expert = options.expert(maths_alone(documents.real))
        made = min(documents.made, 2) if options.smoke else documents.made
        place = options.scratch / f"documents-{documents.real}-{documents.made}"
        bench = Bench.of(SMOLLM2, expert, options, place)
        benches.append(bench)
        key = bench.key(RATIO, UNITS, DEFAULT_RULE, [made, TEMPERATURE] if made else [], documents.title)
        jobs.append(Job(key, {"documents": documents.title}, partial(documents_row, bench, made)))
    ledger.finish("documents", jobs, benches[-1].description, fresh=options.fresh, device=options.device)


def documents_row(bench: Bench, made: int) -> Row:
    """Let the model make documents, if any, and prune on what there is."""
    if made:
        settings = Augment(documents=made, temperature=TEMPERATURE)
        expert = Expert(bench.expert.name, {}, max_tokens=MAX_TOKENS, augment=settings)
        bench.corpora = augmented(bench.opened, expert, bench.corpora)
    corpora = bench.corpora
    size = {
        "calibration_documents": len(corpora.calibration),
        "calibration_tokens": corpora.calibration_tokens,
    }
    return {**size, **pruned_row(bench, {})}


def pruned_row(bench: Bench, weights: Mapping[str, float]) -> Row:
    """Prune with weights of the dimensions' documents in the refit, and measure."""
    plan = make_plan(
        bench.index,
        bench.store,
        model_hash=bench.opened.model_hash,
        ratio=RATIO,
        rule=DEFAULT_RULE,
        units=UNITS,
    )
    settings = PruneWishes(dimension_weights=weights).settings(DEFAULT_RULE)
    with bench.expert_of(plan, settings) as folder:
        return {"block_ratio": plan.block_ratio, **bench.measured(folder)}


def weights_text(table: Row) -> str:
    """Render the table of the language weights."""
    lines = [
        "| weight of the language documents | held-out perplexity ÷ original (95 %) "
        "| general ÷ original (95 %) |",
        "|---:|---:|---:|",
    ]
    lines += [
        f"| {row['language_weight']:g} | {interval(row, 'held_out')} | {interval(row, 'general')} |"
        for row in table["rows"].values()
    ]
    return "\n".join([*lines, "", corpora_text(table)]) + "\n"


def documents_text(table: Row) -> str:
    """Render the table of few and many documents."""
    lines = [
        "| maths documents alone | calibration tokens | held-out perplexity ÷ original (95 %) "
        "| general ÷ original (95 %) |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['documents']} | {row['calibration_tokens']:,} | {interval(row, 'held_out')} "
        f"| {interval(row, 'general')} |"
        for row in table["rows"].values()
    ]
    made = next((row for row in table["rows"].values() if "makes" in row["documents"]), None)
    said = (
        f"Temperature {TEMPERATURE}; {made['calibration_documents']} documents in all, since those that "
        "repeat another are left out."
        if made
        else ""
    )
    return "\n".join([*lines, "", said]) + "\n"


if __name__ == "__main__":
    run("tradeoff", __doc__ or "", make)
