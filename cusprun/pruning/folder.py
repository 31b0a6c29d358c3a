"""The expert as a folder that stock transformers loads: config, files, weights, manifest, model card."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from cusprun.checkpoint.files import copy_carried_files, write_config
from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.checkpoint.output import atomic_folder, refuse_existing, require_space
from cusprun.checkpoint.writer import DEFAULT_SHARD_BYTES
from cusprun.codec import dump_json
from cusprun.progress import SILENT, Progress
from cusprun.pruning.card import model_card
from cusprun.pruning.rewrite import write_weights
from cusprun.quality.likelihood import (
    DocumentLikelihood,
    exp_of_mean,
    measure_likelihood,
    perplexity,
)
from cusprun.records import Corpora, Expert, LayerRefit, Manifest, Plan, Shape
from cusprun.version import __version__

MANIFEST_NAME = "cusprun.json"
CARD_NAME = "README.md"
_VERSIONED = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
_SMALL_FILES_BYTES = 100_000_000


@dataclass(frozen=True)
class Provenance:
    """Where an expert comes from: what the user named, and hashes of what was read.

    ``seconds`` holds the wall-clock time of the stages before this one.
    """

    source: str
    model_hash: str
    corpus_hash: str
    expert: Expert
    seconds: Mapping[str, float]


def write_expert(
    index: CheckpointIndex,
    plan: Plan,
    out: Path,
    *,
    corpora: Corpora,
    provenance: Provenance,
    refit: bool = True,
    measure: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> Manifest:
    """Write the pruned model that ``plan`` describes into the folder ``out``, whole or not at all.

    With ``measure`` the held-out documents are run through original and expert, and the perplexities stand in
    manifest and card.

    Raises:
        OutputError: ``out`` exists already, cannot be written or does not fit on the disk.
        ModelError: weights cannot be read or are not finite.
    """
    refuse_existing(out)
    require_space(out, round(index.num_bytes * (1 - plan.total_ratio)) + _SMALL_FILES_BYTES)
    with atomic_folder(out) as folder:
        started = time.monotonic()
        write_config(folder, expert_config(index.config, plan.after))
        copy_carried_files(index.folder, folder)
        reports = write_weights(
            index,
            plan,
            folder,
            corpora.calibration if refit else (),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        seconds = {**provenance.seconds, "refit_and_write": time.monotonic() - started}
        written = open_checkpoint(folder)
        quality = measure_likelihood(written, corpora.held_out, index, progress=progress) if measure else ()
        provenance = replace(provenance, seconds=seconds)
        manifest = _manifest(index, written, plan, corpora, provenance, reports, quality)
        dump_json(manifest, folder / MANIFEST_NAME)
        (folder / CARD_NAME).write_text(model_card(manifest), encoding="utf-8")
    return manifest


def expert_config(config: Mapping[str, Any], after: Shape) -> dict[str, Any]:
    """Return the source's config with the widths that pruning changed, and ``head_dim`` always stated."""
    return {
        **config,
        "num_attention_heads": after.num_attention_heads,
        "num_key_value_heads": after.num_key_value_heads,
        "head_dim": after.head_dim,
        "intermediate_size": after.intermediate_size,
    }


def _manifest(
    index: CheckpointIndex,
    written: CheckpointIndex,
    plan: Plan,
    corpora: Corpora,
    provenance: Provenance,
    reports: tuple[LayerRefit, ...],
    quality: Sequence[DocumentLikelihood],
) -> Manifest:
    return Manifest(
        cusprun_version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        source=provenance.source,
        source_hash=provenance.model_hash,
        model_hash=model_hash(written),
        expert=without_folders(provenance.expert),
        corpus_hash=provenance.corpus_hash,
        calibration_documents=len(corpora.calibration),
        calibration_tokens=corpora.calibration_tokens,
        held_out_documents=len(corpora.held_out),
        rule=plan.rule,
        refit=reports,
        plan=plan,
        parameters_before=index.num_parameters,
        parameters_after=written.num_parameters,
        seconds={stage: round(value, 2) for stage, value in provenance.seconds.items()},
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _VERSIONED},
        },
        measurements={
            "weight_bytes_before": index.num_bytes,
            "weight_bytes_after": written.num_bytes,
            **({"held_out": _held_out(quality)} if quality else {}),
        },
    )


def _held_out(quality: Sequence[DocumentLikelihood]) -> dict[str, float]:
    tokens = sum(document.num_predicted_tokens for document in quality)
    before = exp_of_mean(sum(document.reference_negative_log_likelihood for document in quality), tokens)
    after = perplexity(quality)
    return {
        "documents": len(quality),
        "predicted_tokens": tokens,
        "perplexity_before": before,
        "perplexity_after": after,
        "perplexity_ratio": after / before,
        "mean_kl_divergence_nats": sum(document.kl_divergence for document in quality) / tokens,
        "top1_agreement": sum(document.top1_agreements for document in quality) / tokens,
    }


def without_folders(expert: Expert) -> Expert:
    """Return the expert with file names in the place of paths: a manifest must not tell a user's folders."""

    def short(sources: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            replace(source, path=Path(source.path).name) if source.path else source for source in sources
        )

    return replace(
        expert,
        dimensions={name: short(sources) for name, sources in expert.dimensions.items()},
        general=short(expert.general),
    )
