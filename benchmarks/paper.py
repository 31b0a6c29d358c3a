"""`make bench-paper DATA=FOLDER`: does the ordering of the publication (arXiv 2506.02561) hold here too?

On SmolLM2-135M-Instruct and its English maths expert a quarter of the neurons of every matrix is set to zero:
those that the published rule finds irrelevant on the expert's corpora, random ones, those that it finds
irrelevant on foreign corpora, and those that it finds the most relevant. Finished rows are kept; ``--fresh``
makes all again. Writes ``benchmarks/results/paper.json`` and ``paper.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from experts import ENGLISH_MATHS, SMOLLM2, BenchExpert, Part
from measuring import (
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

from cusprun.corpus import corpus_hash
from cusprun.errors import require_known
from cusprun.pruning.neuron_plan import make_neuron_plan
from cusprun.pruning.neuron_score import score_neurons
from cusprun.pruning.neuron_zero import write_zeroed
from cusprun.pruning.store import open_store

RATIO = 0.25
CALIBRATION_OF_EACH_KIND = 40
HELD_OUT = 30
GENERAL = 30
MUCH = 2.0
"""By what factor random neurons must cost more to call it much more."""

TABLE = f"{SMOLLM2.name}/{ENGLISH_MATHS.name}"
EXPERT = replace(
    ENGLISH_MATHS,
    calibration=tuple(replace(part, count=CALIBRATION_OF_EACH_KIND) for part in ENGLISH_MATHS.calibration),
    held_out=replace(ENGLISH_MATHS.held_out, count=HELD_OUT),
    general=replace(ENGLISH_MATHS.general, count=GENERAL),
)
FOREIGN = {
    language: replace(
        EXPERT,
        calibration=(Part(f"xquad/{language}.train", "paragraph", 2 * CALIBRATION_OF_EACH_KIND, "language"),),
    )
    for language in ("de", "zh")
}


@dataclass(frozen=True)
class Variant:
    """Which neurons go: by a rule, on the calibration documents of ``expert``."""

    name: str
    title: str
    expert: BenchExpert
    rule: str = "paper"
    relevant: bool = False


VARIANTS = (
    Variant("targeted", "irrelevant to the expert's corpora", EXPERT),
    Variant("foreign-de", "irrelevant to German paragraphs", FOREIGN["de"]),
    Variant("foreign-zh", "irrelevant to Chinese paragraphs", FOREIGN["zh"]),
    Variant("random", "random", EXPERT, rule="random"),
    Variant("relevant", "the most relevant to the expert's corpora", EXPERT, relevant=True),
)


def make(options: Options, ledger: Ledger) -> str:
    """Make all rows and return the table."""
    if options.only is not None:
        require_known(options.only, (TABLE,), "table")
    benches: dict[str, Bench] = {}
    jobs = []
    for variant in VARIANTS:
        corpora = variant.expert.calibration
        place = "+".join(part.file.replace("/", "-") for part in corpora)
        if place not in benches:
            expert = options.expert(variant.expert)
            benches[place] = Bench.of(SMOLLM2, expert, options, options.scratch / place)
        bench = benches[place]
        key = bench.key("neurons", RATIO, variant.rule, variant.relevant)
        store = options.scratch / place / "neurons"
        jobs.append(Job(key, {"variant": variant.name}, partial(variant_row, bench, variant, store)))
    first = next(iter(benches.values()))
    ledger.finish(TABLE, jobs, first.description, fresh=options.fresh, device=options.device)
    return to_markdown(ledger.tables[TABLE], ledger.content["command"])


def variant_row(bench: Bench, variant: Variant, store: Path) -> Row:
    """Set the neurons of one variant to zero and measure what is left."""
    digest, corpora = bench.opened.model_hash, bench.corpora
    if not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True)
        score_neurons(bench.index, corpora, store, model_hash=digest, corpus_hash=corpus_hash(corpora))
    plan = make_neuron_plan(
        bench.index,
        open_store(store),
        model_hash=digest,
        ratio=RATIO,
        rule=variant.rule,
        relevant=variant.relevant,
    )
    with bench.folder() as folder:
        manifest = write_zeroed(
            bench.index, plan, folder, corpora=corpora, provenance=bench.provenance, measure=False
        )
        made = {
            "calibration_documents": len(corpora.calibration),
            "zeroed_parameters": manifest.zeroed_parameters,
            "parameters": manifest.parameters,
        }
        return {**made, **bench.measured(folder)}


def to_markdown(table: Row, command: str) -> str:
    """Render the table."""
    rows = {row["variant"]: row for row in table["rows"].values()}
    lines = [
        f"| {RATIO:.0%} of the neurons set to zero | held-out perplexity ÷ original (95 %) "
        "| general ÷ original (95 %) |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {variant.title} | {interval(rows[variant.name], 'held_out')} "
        f"| {interval(rows[variant.name], 'general')} |"
        for variant in VARIANTS
    ]
    foreign = [part.file for expert in FOREIGN.values() for part in expert.calibration]
    foreign_documents = max(
        row["calibration_documents"] for name, row in rows.items() if name.startswith("foreign")
    )
    lines += [
        "",
        ordering({name: ratio_of(row, "held_out") for name, row in rows.items()}),
        "",
        f"{SMOLLM2.title}, neurons of every attention and FFN matrix, no refit. {corpora_text(table)} "
        f"Foreign corpora: {' and '.join(foreign)}, {foreign_documents} paragraphs each. "
        f"{machine_text(list(rows.values()))} Made by `{command}`.",
    ]
    return "\n".join(lines) + "\n"


def ordering(ratios: Mapping[str, float]) -> str:
    """Say whether the expert loses least by targeted neurons, more by foreign ones, most by relevant ones."""
    targeted, relevant, random = (ratios[name] for name in ("targeted", "relevant", "random"))
    foreign = [ratios[name] for name in ratios if name.startswith("foreign")]
    steps = {
        "targeted below foreign": targeted < min(foreign),
        "foreign below the most relevant": max(foreign) < relevant,
        f"random at least {MUCH:g} times targeted (it is {random / targeted:.1f} times)": (
            random >= MUCH * targeted
        ),
    }
    said = "; ".join(f"{step}: {'yes' if holds else 'no'}" for step, holds in steps.items())
    whole = "holds" if all(steps.values()) else "does not hold in full"
    return f"The ordering of the publication {whole} on the expert's held-out documents ({said})."


if __name__ == "__main__":
    run("paper", __doc__ or "", make)
