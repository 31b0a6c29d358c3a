"""`make bench-tradeoff DATA=FOLDER`: the expert against general text, few documents, and refit targets.

SmolLM2-135M-Instruct, English maths, a quarter of the block parameters, the default rule. First the weight
of the language documents in the refit; then twenty maths documents alone, the same with documents that the
model makes of them, and two hundred real ones; then what the refit aims at, also at half of the parameters.
Finished rows are kept; ``--fresh`` makes all again, ``--only weights``, ``documents`` or ``targets`` those of
one table. Writes ``benchmarks/results/tradeoff.json`` and ``tradeoff.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
    ratio_of,
    run,
)

from cusprun.codec import load_json
from cusprun.errors import require_known
from cusprun.pipeline.augment import augmented
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning.folder import MANIFEST_NAME
from cusprun.pruning.planner import make_plan
from cusprun.pruning.rules import DEFAULT_RULE
from cusprun.records import REFIT_TARGETS, Augment, Expert, Manifest

RATIO = 0.25
OWN_OUTPUT = "output"
"""What the refits of the first two tables aim at; the third compares the targets."""
TARGET_RATIOS = (0.25, 0.5)
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
TABLES = ("weights", "documents", "targets")


def make(options: Options, ledger: Ledger) -> str:
    """Make all rows and return both tables."""
    if options.only is not None:
        require_known(options.only, TABLES, "table")
    if options.only in (None, "weights"):
        fill_weights(options, ledger)
    if options.only in (None, "documents"):
        fill_documents(options, ledger)
    if options.only in (None, "targets"):
        fill_targets(options, ledger)
    texts = []
    if "weights" in ledger.tables:
        texts.append(weights_text(ledger.tables["weights"]))
    if "documents" in ledger.tables:
        texts.append(documents_text(ledger.tables["documents"]))
    if "targets" in ledger.tables:
        texts.append(targets_text(ledger.tables["targets"]))
    rows = [row for table in ledger.tables.values() for row in table["rows"].values()]
    texts.append(
        f"{SMOLLM2.title}, ratio {RATIO} unless a row says another, rule `{DEFAULT_RULE}` with its refit, "
        "in the first two tables to each projection's own output, FFN channels alone. "
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
            partial(
                pruned_row,
                bench,
                PruneWishes(dimension_weights={"language": weight}, refit_target=OWN_OUTPUT),
            ),
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


def fill_targets(options: Options, ledger: Ledger) -> None:
    """Make the rows of what the refit aims at."""
    bench = Bench.of(SMOLLM2, options.expert(ENGLISH_MATHS), options, options.scratch / "targets")
    jobs = [
        Job(
            bench.key(ratio, UNITS, DEFAULT_RULE, {"target": target}),
            {"ratio": ratio, "target": target},
            partial(target_row, bench, ratio, target),
        )
        for ratio in (TARGET_RATIOS[:1] if options.smoke else TARGET_RATIOS)
        for target in REFIT_TARGETS
    ]

    def describe() -> Row:
        assert bench.store.documents  # scored here, so that no row's seconds count it
        return bench.description()

    ledger.finish("targets", jobs, describe, fresh=options.fresh, show=shown_target, device=options.device)


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
    return {**size, **pruned_row(bench, PruneWishes(refit_target=OWN_OUTPUT))}


def target_row(bench: Bench, ratio: float, target: str) -> Row:
    """Prune with a target of the refit, and measure; of ``auto`` also what decided."""
    return pruned_row(bench, PruneWishes(refit_target=target), ratio, told=chosen_target)


def chosen_target(folder: Path) -> Row:
    """Return what an expert's manifest says of how its target was chosen; nothing where it was given."""
    measurements = load_json(Manifest, folder / MANIFEST_NAME).measurements
    return {"choice": measurements["refit_target"]} if "refit_target" in measurements else {}


def pruned_row(
    bench: Bench, wishes: PruneWishes, ratio: float = RATIO, told: Callable[[Path], Row] = lambda _folder: {}
) -> Row:
    """Prune by what is wished of the refit, and measure; ``told`` adds what the expert's folder says."""
    plan = make_plan(
        bench.index,
        bench.store,
        model_hash=bench.opened.model_hash,
        ratio=ratio,
        rule=DEFAULT_RULE,
        units=UNITS,
    )
    with bench.expert_of(plan, wishes.settings(DEFAULT_RULE, bench.index.family)) as folder:
        return {"block_ratio": plan.block_ratio, **told(folder), **bench.measured(folder)}


def shown_target(row: Row) -> str:
    """Say in a few words what a target gave."""
    chosen = f"took {row['choice']['chosen']}, " if "choice" in row else ""
    return f"{chosen}held_out {ratio_of(row, 'held_out'):.3f}, general {ratio_of(row, 'general'):.3f}"


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


def targets_text(table: Row) -> str:
    """Render the table of what the refit aims at."""
    lines = [
        "| ratio | target of the refit | held-out perplexity ÷ original (95 %) "
        "| general ÷ original (95 %) | seconds |",
        "|---:|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['ratio']:.2f} | {target_cell(row)} | {interval(row, 'held_out')} "
        f"| {interval(row, 'general')} | {row['seconds']:.0f} |"
        for row in table["rows"].values()
    ]
    said = "`auto` chose by the perplexity on calibration documents that its trials had not seen."
    return "\n".join([*lines, "", f"{said} {corpora_text(table)}"]) + "\n"


def target_cell(row: Row) -> str:
    """Name a target and, of ``auto``, what it chose and the perplexities that decided."""
    choice = row.get("choice")
    if choice is None:
        return f"`{row['target']}`"
    tried = ", ".join(f"{name} {value:.3f}" for name, value in choice["perplexity"].items())
    return f"`{row['target']}`: {choice['chosen']} ({tried})"


if __name__ == "__main__":
    run("tradeoff", __doc__ or "", make)
