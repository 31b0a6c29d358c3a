"""`make bench-quality DATA=FOLDER`: what each rule keeps of an expert, at several ratios, on both models.

For every model and expert of ``benchmarks/experts.py``: score once, and for every ratio and rule plan, write
the expert and measure its perplexity on the expert's held-out documents and on text that it is not for. Only
FFN channels go, so that all rules cut to the same shape. Finished rows are kept, and a run that was stopped
goes on with the missing ones; ``--fresh`` makes all again, ``--only MODEL/EXPERT`` those of one table. Writes
``benchmarks/results/quality.json`` and ``quality.md``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experts import EXPERTS, MODELS, SMOLLM2, BenchExpert, BenchModel
from flap import biased_model, has_place_for_biases
from measuring import (
    SIDES,
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
    stock_likelihoods,
    stock_model,
)

from cusprun.codec import to_plain
from cusprun.errors import require_known
from cusprun.families import Family
from cusprun.pipeline.calibration import first_tokens
from cusprun.pipeline.proof import PARITY_TOKENS, prove
from cusprun.pipeline.wishes import PruneWishes
from cusprun.progress import SILENT
from cusprun.pruning.planner import make_plan
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.rules import DEFAULT_RULE, rule_entry
from cusprun.quality.report import corpus_quality
from cusprun.records import Plan
from exporters.gguf import export

RATIOS = (0.15, 0.25, 0.50)
TARGETS: Mapping[str, Mapping[float, float]] = {
    "held_out": {0.15: 1.04, 0.25: 1.08, 0.50: 1.50},
    "general": {0.25: 1.8},
}
"""The largest perplexity over the original's that the default is meant to have, by ratio."""

AGREEMENT_DOCUMENTS = 20
PARITY_TABLE, PARITY_RATIO = f"{SMOLLM2.name}/english-maths", 0.25
PARITY_QUANTS = ("f32", "f16")


@dataclass(frozen=True)
class Variant:
    """A rule with or without what makes good for the units that go.

    ``target`` is what the refit aims at, the product's own choice for the family when None.
    """

    rule: str
    compensated: bool
    title: str
    target: str | None = None

    def settings(self, family: Family) -> RefitSettings:
        """The product's own settings; FLAP takes the means of all calibration tokens and of no others."""
        settings = PruneWishes(refit=self.compensated, refit_target=self.target).settings(self.rule, family)
        return replace(settings, held_out=0.0, anchors=0) if settings.mode == "bias" else settings


DEFAULT = Variant(DEFAULT_RULE, True, f"{DEFAULT_RULE}, refit (the default)")
FLAP = Variant("variance+bias", True, "variance+bias (FLAP)")
PUBLISHED = Variant("paper", False, "paper, no refit (the published rule)")
STREAM = Variant(DEFAULT_RULE, True, f"{DEFAULT_RULE}, refit to the original's stream", "residual")
VARIANTS = {
    "default": DEFAULT,
    "flap": FLAP,
    "published": PUBLISHED,
    "stream": STREAM,
    "mean": Variant("mean", True, "mean, refit"),
    "mean alone": Variant("mean", False, "mean, no refit"),
}
EVERYWHERE = ("default", "flap", "published")
AT = {(PARITY_TABLE, PARITY_RATIO): ("mean", "mean alone")}
"""Further variants in one table at one ratio: what the choice and the refit are worth, each by itself."""


def make(options: Options, ledger: Ledger) -> str:
    """Make all rows and return the tables."""
    pairs = {
        f"{model.name}/{name}": (model, EXPERTS[name]) for model in MODELS.values() for name in model.experts
    }
    if options.only is not None:
        require_known(options.only, pairs, "table")
    for name in pairs if options.only is None else (options.only,):
        fill_table(name, *pairs[name], options, ledger)
    order = [name for name in pairs if name in ledger.tables]
    tables = [table_text(*pairs[name], ledger.tables[name]) for name in order]
    rows = [row for name in order for row in ledger.tables[name]["rows"].values()]
    return "\n".join([*tables, notes(rows, ledger.content["command"])])


def fill_table(name: str, model: BenchModel, expert: BenchExpert, options: Options, ledger: Ledger) -> None:
    """Make the missing rows of one model and expert."""
    bench = Bench.of(model, options.expert(expert), options, options.scratch / name)
    jobs = []
    for ratio in (0.25,) if options.smoke else RATIOS:
        for called in (*EVERYWHERE, *_stream(bench.index.family), *AT.get((name, ratio), ())):
            variant = VARIANTS[called]
            exported = name == PARITY_TABLE and ratio == PARITY_RATIO and variant in (DEFAULT, STREAM)
            inputs = (
                *(ratio, UNITS, variant.rule, variant.compensated),
                *(PARITY_QUANTS if exported else ()),
                *([variant.target] if variant.target else ()),
            )
            label = {"ratio": ratio, "variant": called, "rule": variant.rule}
            jobs.append(Job(bench.key(*inputs), label, partial(variant_row, bench, ratio, variant, exported)))
    ledger.finish(name, jobs, partial(described, bench), fresh=options.fresh, device=options.device)


def _stream(family: Family) -> tuple[str, ...]:
    """Name the variant that aims at the stream, where a family has a use for that."""
    return () if family.normalises_outputs else ("stream",)


def described(bench: Bench) -> Row:
    """Score, once for all rows, and return what a table holds beside them."""
    started = time.monotonic()
    assert bench.store.documents
    seconds = round(time.monotonic() - started, 1)
    return {**bench.description(), **agreement(bench), "score_seconds": seconds}


def variant_row(bench: Bench, ratio: float, variant: Variant, exported: bool) -> Row:
    """Write one expert and measure it; with ``exported`` its exports too, against the checkpoint."""
    plan = planned(bench, ratio, variant.rule, UNITS)
    row: Row = {
        "block_ratio": plan.block_ratio,
        "total_ratio": plan.total_ratio,
        "width_before": plan.before.intermediate_size,
        "shape": asdict(plan.after),
    }
    settings = variant.settings(bench.index.family)
    in_memory = settings.mode == "bias" and not has_place_for_biases(bench.index)
    if in_memory:
        settings = replace(settings, mode="none")
    with bench.expert_of(plan, settings) as folder:
        if in_memory:
            model = biased_model(bench.index, plan, folder, bench.corpora.calibration)
            sides = {side: stock_likelihoods(model, getattr(bench.corpora, side)) for side in SIDES}
            row |= bench.compared(sides) | {"biases": "in memory"}
        else:
            row |= bench.measured(folder)
        if exported:
            row["export_parity"] = [export_parity(bench, folder, quant) for quant in PARITY_QUANTS]
    if variant is DEFAULT:
        row["shape_with_heads"] = asdict(planned(bench, ratio, variant.rule).after)
    return row


def planned(bench: Bench, ratio: float, rule: str, units: Sequence[str] = ()) -> Plan:
    """Plan a ratio; all kinds of units that go by default may go unless ``units`` names some."""
    digest = bench.opened.model_hash
    return make_plan(bench.index, bench.store, model_hash=digest, ratio=ratio, rule=rule, units=units)


def export_parity(bench: Bench, folder: Path, quant: str) -> Row:
    """Export an expert and compare the file in llama.cpp with the checkpoint in transformers."""
    with bench.folder() as place:
        artifact = place.with_name(f"expert-{quant}.gguf")
        export(folder, artifact, quant=quant)
        (report,) = prove(folder, [artifact], first_tokens(bench.corpora.held_out, PARITY_TOKENS), SILENT)
    return {
        "quant": quant,
        "verdict": report.verdict,
        "text": to_plain(report.text),
        "logits": to_plain(report.logits),
    }


def agreement(bench: Bench) -> Row:
    """Compare the original's perplexity with the one that stock transformers gives, on the same documents."""
    documents = bench.corpora.held_out[:AGREEMENT_DOCUMENTS]
    theirs = stock_likelihoods(stock_model(bench.index.folder), documents)
    ours = bench.originals["held_out"][: len(documents)]
    return {
        "agreement_with_transformers": {
            "documents": len(documents),
            "cusprun": corpus_quality(ours).perplexity.value,
            "transformers": corpus_quality(theirs).perplexity.value,
        }
    }


def table_text(model: BenchModel, expert: BenchExpert, table: Row) -> str:
    """Render the table of one model and expert."""
    lines = [
        f"**{model.title}: {expert.title}**",
        "",
        "| ratio | rule | held-out perplexity ÷ original (95 %) | target "
        "| general ÷ original (95 %) | target |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in table["rows"].values():
        targets = {side: _target(row, side) for side in SIDES}
        shown = {side: "" if targets[side] is None else f"{targets[side]:.2f}" for side in SIDES}
        lines.append(
            f"| {row['ratio']:.2f} | {_variant(row).title} | {interval(row, 'held_out')} "
            f"| {shown['held_out']} | {interval(row, 'general')} | {shown['general']} |"
        )
    rows = table["rows"].values()
    texts = [widths_text(rows), corpora_text(table), agreement_text(table), parity_text(rows)]
    lines += ["", verdict(rows), "", " ".join(text for text in texts if text)]
    return "\n".join(lines) + "\n"


def agreement_text(table: Row) -> str:
    """Say what stock transformers gives for the original."""
    check = table["agreement_with_transformers"]
    return (
        f"On the first {check['documents']} held-out documents the original's perplexity is "
        f"{check['cusprun']:.4f} by cusprun and {check['transformers']:.4f} by transformers."
    )


def verdict(rows: Any) -> str:
    """Say which targets the default meets and misses, and where it beats the other two rules."""
    by_variant = {(_variant(row), row["ratio"]): row for row in rows}
    ours = {ratio: row for (variant, ratio), row in by_variant.items() if variant is DEFAULT}
    found = {"met": list[str](), "missed": list[str]()}
    for side, words in zip(SIDES, ("held-out", "general text"), strict=True):
        for ratio, row in ours.items():
            target = _target(row, side)
            if target is not None:
                value = ratio_of(row, side)
                found["met" if value <= target else "missed"].append(
                    f"{words} at {ratio:.2f} ({value:.3f} of {target:.2f})"
                )
    sentences = [f"Targets {word}: {', '.join(texts) or 'none'}." for word, texts in found.items()]
    sentences += [
        _comparison(ours, by_variant, FLAP, "FLAP"),
        _comparison(ours, by_variant, PUBLISHED, "the published rule"),
    ]
    return " ".join(sentences)


def _comparison(
    ours: Mapping[float, Row], rows: Mapping[tuple[Variant, float], Row], other: Variant, name: str
) -> str:
    """Say at which ratios the default loses less of the expert than another variant."""
    pairs = {ratio: (row, rows[other, ratio]) for ratio, row in ours.items() if (other, ratio) in rows}
    worse = [
        f"{ratio:.2f}"
        for ratio, (own, theirs) in pairs.items()
        if ratio_of(own, "held_out") >= ratio_of(theirs, "held_out")
    ]
    if not pairs:
        return f"Not yet compared with {name}."
    if worse:
        return f"At {', '.join(worse)} the default keeps no more of the expert than {name}."
    apart = all(
        own["held_out"]["perplexity_ratio"]["high"] < theirs["held_out"]["perplexity_ratio"]["low"]
        for own, theirs in pairs.values()
    )
    intervals = "the intervals are apart" if apart else "some intervals overlap"
    return f"At every ratio the default keeps more of the expert than {name} ({intervals})."


def _variant(row: Row) -> Variant:
    return VARIANTS[row["variant"]]


def _target(row: Row, side: str) -> float | None:
    return TARGETS[side].get(row["ratio"]) if _variant(row) is DEFAULT else None


def parity_text(rows: Any) -> str:
    """Say how close the exports are, where they were made."""
    reports = [report for row in rows if _variant(row) is DEFAULT for report in row.get("export_parity", ())]
    if not reports:
        return ""
    texts = []
    for report in reports:
        logits = report["logits"]
        texts.append(
            f"{report['quant']} KL {logits['mean_kl']:.1e} nats per token, top-1 agreement "
            f"{logits['top1_agreement']:.2%}, largest logit difference "
            f"{logits['max_abs_logit_difference']:.1e}"
        )
    return f"The default at {PARITY_RATIO}, exported to GGUF: {'; '.join(texts)}."


def notes(rows: Sequence[Row], command: str) -> str:
    """Say what holds for all tables."""
    compensations = {rule_entry(row["rule"]).compensation for row in rows}
    texts = [
        "A ratio is the share of the decoder blocks' attention and FFN parameters that goes. Only FFN "
        "channels may go here, so that every rule cuts to the same shape.",
        *_other_shapes(rows),
        "Perplexities are measured in float32; intervals are bootstrap intervals over documents, model and "
        "original on the same draws.",
    ]
    if "bias" in compensations:
        texts.append("FLAP's biases are the means over the calibration documents alone.")
    if any(row.get("biases") for row in rows):
        texts.append(
            "Gemma 3 has no place for them, so that cusprun refuses the rule there; they were added to the "
            "cut model in transformers."
        )
    return f"{' '.join(texts)} {machine_text(rows)} Made by `{command}`.\n"


def widths_text(rows: Any) -> str:
    """Say what FFN width each ratio leaves."""
    widths = {row["ratio"]: row["shape"]["intermediate_size"] for row in rows}
    before = {row["width_before"] for row in rows}
    steps = ", ".join(f"{width} at {ratio:.2f}" for ratio, width in widths.items())
    return f"FFN width {', '.join(map(str, before))} to {steps}."


def _other_shapes(rows: Sequence[Row]) -> list[str]:
    """Say how often the planner would have taken another shape, had it been free to."""
    free = [row for row in rows if "shape_with_heads" in row]
    others = [row for row in free if row["shape_with_heads"] != row["shape"]]
    if not others:
        return ["Free to cut heads as well, the default's planner takes the same shapes."] if free else []
    return [
        f"Free to cut heads as well, the default's planner takes another shape in {len(others)} of "
        f"{len(free)} cases."
    ]


if __name__ == "__main__":
    run("quality", __doc__ or "", make)
