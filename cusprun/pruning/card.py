"""The model card of an expert: hub metadata and what a reader needs to know, from the manifest alone."""

from __future__ import annotations

import re
from typing import Any

import yaml

from cusprun.records import DIMENSIONS, Manifest, Source

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(manifest: Manifest) -> str:
    """Return the README.md of an expert's folder: YAML front matter for the hub, then prose."""
    front = yaml.safe_dump(_metadata(manifest), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{_prose(manifest)}"


def _metadata(manifest: Manifest) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cusprun", "structured-pruning"],
    }
    packs = [source.pack or "" for source in manifest.expert.dimensions.get("language", ())]
    languages = sorted(pack.removeprefix("lang/") for pack in packs if pack.startswith("lang/"))
    if languages:
        metadata["language"] = languages
    if _HUB_ID.fullmatch(manifest.source) and not manifest.source.endswith(".gguf"):
        metadata["base_model"] = manifest.source
    return metadata


def _prose(manifest: Manifest) -> str:
    plan = manifest.plan
    before, after = plan.before, plan.after
    widths = [
        ("FFN width", before.intermediate_size, after.intermediate_size),
        ("decoder blocks", before.num_hidden_layers, after.num_hidden_layers),
        ("query heads", before.num_attention_heads, after.num_attention_heads),
        ("KV heads", before.num_key_value_heads, after.num_key_value_heads),
        ("parameters", manifest.parameters_before, manifest.parameters_after),
    ]
    table = "\n".join(f"| {name} | {old:,} | {new:,} | {new / old - 1:+.1%} |" for name, old, new in widths)
    dimensions = "\n".join(
        f"- **{name}**: {', '.join(_source_text(source) for source in manifest.expert.dimensions[name])}"
        for name in DIMENSIONS
        if name in manifest.expert.dimensions
    )
    return f"""# {manifest.expert.name}

An expert made from `{manifest.source}` by [cusprun](https://pypi.org/project/cusprun/) \
{manifest.cusprun_version}: structured pruning for one job, with no training.

## What it is for

{dimensions}

It keeps what the original needs for this job and gives up some of the rest: measure it on your own texts
(`cusprun eval`) before you use it for anything else.

## What changed

| | before | after | change |
|---|---:|---:|---:|
{table}

{plan.block_ratio:.1%} of the decoder blocks' attention and FFN parameters are gone, {plan.total_ratio:.1%} of
all parameters. Asked for: {plan.budget}. Rule `{manifest.rule}`, {_refit_text(manifest)},
{manifest.calibration_documents} calibration documents ({manifest.calibration_tokens:,} tokens).
Tokenizer and chat template are those of the original.

{_quality_text(manifest)}## How to make it again

`cusprun.json` holds the plan, the expert's sources, seeds, versions and the hashes of the model
(`{manifest.source_hash[:16]}`) and of the corpora (`{manifest.corpus_hash[:16]}`).
"""


def _quality_text(manifest: Manifest) -> str:
    held_out = manifest.measurements.get("held_out")
    if not held_out:
        return ""
    return f"""## How good it is

On {held_out["documents"]} held-out documents of the expert's own corpora
({held_out["predicted_tokens"]:,} tokens): perplexity {held_out["perplexity_before"]:.2f} before,
{held_out["perplexity_after"]:.2f} after
(x {held_out["perplexity_ratio"]:.3f}); the most likely next token is the original's in
{held_out["top1_agreement"]:.1%} of the cases.

"""


def _refit_text(manifest: Manifest) -> str:
    if manifest.compensation == "bias":
        return "the mean of what went added as biases"
    if not manifest.refit:
        return "no refit"
    before = sum(report.relative_error_before for report in manifest.refit) / len(manifest.refit)
    after = sum(report.relative_error_after for report in manifest.refit) / len(manifest.refit)
    weights = ", ".join(f"{name} {weight:g}" for name, weight in manifest.refit_weights.items())
    weighted = f"; weights of the dimensions: {weights}" if weights else ""
    what = "output" if manifest.refit_target == "output" else "stream"
    return f"least-squares refit (mean relative {what} error {before:.2%} to {after:.2%}{weighted})"


def _source_text(source: Source) -> str:
    return f"`{source.pack or source.dataset or source.path}`"
