"""`make bench-export DATA=FOLDER`: what exports cost and keep, on originals and experts of both models.

Four kinds of tables: how far each artifact is from its checkpoint, in each runtime; how many of 10,000 random
texts get the same token ids; what an importance matrix from the expert's documents saves at 4 bits; and the
GGUF writer's speed and memory against llama.cpp's converter, when ``LLAMA_CPP`` names a checkout of it.
Finished rows are kept. Writes ``benchmarks/results/export.json`` and ``export.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from experts import EXPERTS, GEMMA3, SMOLLM2, BenchModel
from export_speed import random_model, speed_row
from measuring import Bench, Job, Ledger, Options, Row, machine_text, run
from quality import DEFAULT, UNITS, planned

from cusprun.checkpoint.index import open_checkpoint
from cusprun.codec import to_plain
from cusprun.errors import require_known
from cusprun.pipeline.calibration import first_tokens, importance_for
from cusprun.pipeline.proof import PARITY_TOKENS, RUNTIMES
from cusprun.progress import SILENT
from exporters.parity import compare
from exporters.parity_records import limits_for
from exporters.parity_text import probe_texts
from exporters.probe_strings import random_texts
from exporters.registry import format_of
from serve.runtimes.torch_runtime import TorchRuntime

PAIRS: tuple[tuple[BenchModel, str], ...] = ((SMOLLM2, "english-maths"), (GEMMA3, "german-qa"))
WRITER = "writer"
"""The table of speed and memory."""
RATIO = 0.25
EXPORTS: Mapping[str, tuple[str, ...]] = {
    "gguf": ("f32", "f16", "q8_0", "q4_k_m"),
    "onnx": ("fp32", "int8", "int4"),
    "vllm": ("float32", "bfloat16", "int8", "int4"),
}
TEXTS, TEXTS_SEED = 10_000, 20_251
IMATRIX_QUANT = "q4_k_m"
IMATRIX_TARGET = 0.8
"""Perplexity that 4 bits cost with the importance matrix, over what they cost without."""
SPEED_TARGET, MEMORY_TARGET_BYTES = 2.0, 300_000_000


def make(options: Options, ledger: Ledger) -> str:
    """Make all rows and return the tables."""
    wanted = {f"{model.name}/{name}": (model, name) for model, name in PAIRS}
    if options.only is not None:
        require_known(options.only, (*wanted, WRITER), "table")
    for table, (model, name) in wanted.items():
        if options.only not in (None, table):
            continue
        bench = Bench.of(model, options.expert(EXPERTS[name]), options, options.scratch / model.name)
        with _folders(bench) as folders:
            for side, folder in folders.items():
                _parity_table(f"{table}/{side}", bench, folder, options, ledger)
    if options.only in (None, WRITER):
        _speed_table(options, ledger)
    return to_markdown(ledger)


@contextmanager
def _folders(bench: Bench) -> Iterator[Mapping[str, Path]]:
    """Yield the folders of original and expert; the expert is written for this."""
    plan = planned(bench, RATIO, DEFAULT.rule, UNITS)
    with bench.expert_of(plan, DEFAULT.settings(bench.index.family)) as expert:
        yield {"original": bench.index.folder, "expert": expert}


def _parity_table(name: str, bench: Bench, folder: Path, options: Options, ledger: Ledger) -> None:
    wanted = [(to, quant, True) for to, quants in EXPORTS.items() for quant in quants]
    wanted.append(("gguf", IMATRIX_QUANT, False))
    if options.smoke:
        wanted = [("gguf", "f32", True)]
    jobs = [
        Job(
            bench.key("export", name, to, quant, calibrated, RATIO, TEXTS),
            {"format": to, "quant": quant, "calibrated": calibrated},
            partial(
                _parity_row,
                bench,
                folder,
                to,
                quant,
                calibrated,
                folder == bench.index.folder and quant == EXPORTS[to][0],
                options,
            ),
        )
        for to, quant, calibrated in wanted
    ]
    ledger.finish(name, jobs, bench.description, fresh=options.fresh, show=_shown)


def _parity_row(
    bench: Bench, folder: Path, to: str, quant: str, calibrated: bool, many_texts: bool, options: Options
) -> Row:
    """Export a folder and compare it with itself in transformers, whatever the limits say.

    Token ids are those of many random texts, or else of the shipped probes: no precision changes them.
    """
    chosen = format_of(to)
    asked = chosen.options({} if calibrated else {"imatrix": False})
    importance = importance_for(chosen, quant, asked, open_checkpoint(folder), bench.corpora)
    with bench.folder() as place:
        artifact = place.with_name(f"{to}-{quant}{chosen.suffix}")
        chosen.export(folder, artifact, quant=quant, options=asked, importance=importance, progress=SILENT)
        reference = TorchRuntime(folder)
        cache = limits_for(to, quant).kv_cache
        candidate = RUNTIMES[to].open(artifact, **({"kv_cache": cache} if cache else {}))
        try:
            texts: Sequence[str] = probe_texts()
            if many_texts:
                texts = random_texts(20 if options.smoke else TEXTS, TEXTS_SEED, reference.special_texts)
            documents = first_tokens(bench.corpora.held_out, PARITY_TOKENS)
            report = compare(reference, candidate, texts, documents, limits_for(to, quant))
        finally:
            candidate.close()
            reference.close()
    return {"runtime": report.candidate, "failures": list(report.failures), **to_plain(_parts(report))}


def _parts(report: Any) -> dict[str, Any]:
    text = report.text
    return {
        "logits": to_plain(report.logits),
        "texts": {
            "count": text.probe_texts,
            "other_ids": text.mismatch_count,
            "explained": dict(text.explained),
        },
    }


def _shown(row: Row) -> str:
    return (
        f"KL {row['logits']['mean_kl']:.1e}, ratio {_cost(row):.4f}, {row['texts']['other_ids']} texts differ"
    )


def _speed_table(options: Options, ledger: Ledger) -> None:
    checkout = os.environ.get("LLAMA_CPP")
    converter = Path(checkout) / "convert_hf_to_gguf.py" if checkout else None
    small = Bench.of(SMOLLM2, options.expert(EXPERTS["english-maths"]), options, options.scratch / "s")
    jobs = [
        Job(
            small.key("speed", title, bool(converter)),
            {"model": title},
            partial(_speed, small.index.folder, random, converter, options.scratch),
        )
        for title, random in (("SmolLM2-135M", False), ("random, widths of Qwen2-1.5B", True))[
            : 1 if options.smoke else 2
        ]
    ]
    ledger.finish(WRITER, jobs, dict, fresh=options.fresh, show=lambda row: f"{row['cusprun']}")


def _speed(folder: Path, random: bool, converter: Path | None, scratch: Path) -> Row:
    source = random_model(scratch / "random-1.5b", folder) if random else folder
    return speed_row(source, converter, scratch)


def _cost(row: Row) -> float:
    """Return perplexity of the artifact over that of its checkpoint."""
    return float(row["logits"]["perplexity_candidate"] / row["logits"]["perplexity_reference"])


def to_markdown(ledger: Ledger) -> str:
    """Render all tables."""
    parts = [_parity_text(name, table) for name, table in ledger.tables.items() if name != WRITER]
    if WRITER in ledger.tables:
        parts.append(_writer_text(ledger.tables[WRITER]))
    rows = [row for table in ledger.tables.values() for row in table["rows"].values()]
    return "\n".join([*parts, f"{machine_text(rows)} Made by `{ledger.content['command']}`.\n"])


def _parity_text(name: str, table: Row) -> str:
    lines = [
        f"**{name}**",
        "",
        "| export | KL (nats per token) | largest difference | top-1 | perplexity ÷ checkpoint "
        "| texts with other ids |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = list(table["rows"].values())
    for row in rows:
        logits, texts = row["logits"], row["texts"]
        matrix = "" if row["calibrated"] else ", no importance matrix"
        what = "" if logits["compared"] == "logit" else " (log-prob.)"
        lines.append(
            f"| {row['format']} {row['quant']}{matrix} | {logits['mean_kl']:.1e} "
            f"| {logits['max_abs_logit_difference']:.1e}{what} | {logits['top1_agreement']:.2%} "
            f"| {_cost(row):.4f} | {texts['other_ids']} of {texts['count']:,} |"
        )
    return "\n".join([*lines, "", *_imatrix_text(rows)]) + "\n"


def _imatrix_text(rows: Sequence[Row]) -> list[str]:
    """Say what the importance matrix saves, against f16."""
    by_kind = {(row["quant"], row["calibrated"]): row for row in rows if row["format"] == "gguf"}
    keys = (("f16", True), (IMATRIX_QUANT, True), (IMATRIX_QUANT, False))
    if any(key not in by_kind for key in keys):
        return []
    base, with_matrix, without = (by_kind[key]["logits"]["perplexity_candidate"] for key in keys)
    share = (with_matrix - base) / (without - base)
    verdict = "met" if share <= IMATRIX_TARGET else "missed"
    return [
        f"At {IMATRIX_QUANT} the perplexity rises over f16 by {with_matrix - base:.4f} with the importance "
        f"matrix and by {without - base:.4f} without: {share:.2f} × (target {IMATRIX_TARGET}, {verdict})."
    ]


def _writer_text(table: Row) -> str:
    lines = [
        "**Folder to GGUF f16**",
        "",
        "| model | cusprun, s | llama.cpp's converter, s | times faster | peak memory, cusprun | converter |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in table["rows"].values():
        ours, theirs = row["cusprun"], row.get("converter")
        lines.append(
            f"| {row['model']} | {_seconds(ours)} | {_seconds(theirs)} "
            f"| {theirs['seconds'] / ours['seconds']:.1f} "
            if theirs
            else f"| {row['model']} | {_seconds(ours)} | – | – "
        )
        lines[-1] += f"| {_megabytes(ours)} | {_megabytes(theirs)} |"
    note = (
        "Whole commands, each in a process of its own, in turns; medians with fastest and slowest. Memory is "
        "the most anonymous memory at any time, file pages apart. Targets: "
        f"{SPEED_TARGET:g} times faster, under {MEMORY_TARGET_BYTES / 1e6:.0f} MB and the largest tensor. "
        "cusprun loads the file in llama.cpp at the end, the converter does not."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _seconds(side: Row | None) -> str:
    if side is None:
        return "–"
    return f"{side['seconds']:.1f} ({side['fastest_seconds']:.1f} to {side['slowest_seconds']:.1f})"


def _megabytes(side: Row | None) -> str:
    return "–" if side is None else f"{side['peak_anonymous_bytes'] / 1e6:.0f} MB"


if __name__ == "__main__":
    run("export", __doc__ or "", make)
