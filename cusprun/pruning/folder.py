"""The expert as a folder that stock transformers loads: config, files, weights, manifest, model card."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from cusprun import clock
from cusprun.checkpoint.files import copy_carried_files, write_config
from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.checkpoint.output import atomic_folder, refuse_existing, require_space
from cusprun.checkpoint.writer import DEFAULT_SHARD_BYTES
from cusprun.codec import dump_json
from cusprun.progress import SILENT, Progress
from cusprun.pruning.card import model_card
from cusprun.pruning.dense_stream import check_target
from cusprun.pruning.fitted_blocks import BlockOf, fitted_blocks, refit_key
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.refit_memory import refitting
from cusprun.pruning.rewrite import (
    DEFAULT_SETTINGS,
    WrittenWeights,
    compensating_flags,
    write_blocks,
)
from cusprun.pruning.target_choice import TargetChoice, WriteModel, chosen_target
from cusprun.quality.likelihood import (
    DocumentLikelihood,
    exp_of_mean,
    measure_likelihood,
    perplexity,
)
from cusprun.records import Corpora, Expert, Manifest, Plan, TokenizedDocument
from cusprun.version import __version__
from cusprun.walk.budget import batching_within
from cusprun.walk.device import CPU, Device
from cusprun.walk.fallback import Batching, with_smaller_batches
from cusprun.walk.shell import load_config
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

MANIFEST_NAME = "cusprun.json"
CARD_NAME = "README.md"
VERSIONED = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
SMALL_FILES_BYTES = 100_000_000
_NOT_PER_BLOCK = frozenset({"architectures", "bos_token_id", "eos_token_id", "pad_token_id"})
"""Lists of a config that can be as long as the model is deep by chance."""


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


@dataclass(frozen=True)
class _Made:
    """Weights that were written, the settings that made them and how their target was chosen, if it was."""

    weights: WrittenWeights
    settings: RefitSettings
    choice: TargetChoice | None


def write_expert(
    index: CheckpointIndex,
    plan: Plan,
    out: Path,
    *,
    corpora: Corpora,
    provenance: Provenance,
    settings: RefitSettings = DEFAULT_SETTINGS,
    measure: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> Manifest:
    """Write the pruned model that ``plan`` describes into the folder ``out``, whole or not at all.

    ``settings`` say how the last projections make good for what went. With ``measure`` the held-out documents
    are run through original and expert, and the perplexities stand in manifest and card. The refit target
    ``auto`` makes two more experts first, each removed when it is measured.

    Raises:
        OutputError: ``out`` exists already, cannot be written or does not fit on the disk.
        ModelError: weights cannot be read or are not finite.
        PlanError: the rule adds biases that the family has no place for, or the family has no use for the
            refit target.
        CorpusError: there is no calibration document to choose the refit target on.
        UserError: there is no such refit target, or the memory of ``workspace`` is too little.
        DeviceError: the device has too little memory, in smaller batches too.
    """
    _refuse_impossible(index, plan, out, settings)
    ranks = workspace.ranks
    running: dict[str, Any] = {"device": device, "workspace": workspace, "progress": progress}
    lengths = [len(document.token_ids) for document in corpora.calibration]
    demand = refitting(index, lengths, settings, workspace.memory_bytes, device.dtype)

    def work(batching: Batching) -> Manifest:
        write = partial(
            _written_model, index, plan, max_shard_bytes=max_shard_bytes, batching=batching, **running
        )
        key = refit_key(plan, corpora.calibration, settings, batching, device, workspace)
        with ExitStack() as unfinished:  # ends after the output is committed
            with ExitStack() as output:
                folder = ranks.from_first(lambda: output.enter_context(atomic_folder(out)))
                started = time.monotonic()
                made = _made(write, folder, corpora.calibration, settings, key, unfinished, **running)
                seconds = {**provenance.seconds, "refit_and_write": time.monotonic() - started}
                written = open_checkpoint(folder)
                digest = ranks.from_first(lambda: model_hash(written))
                held_out = corpora.held_out
                quality = measure_likelihood(written, held_out, index, key=key, **running) if measure else ()
                # What follows takes no time: the measurement is not kept until the output is committed.
                told = replace(provenance, seconds=seconds)
                manifest = _manifest(index, written, digest, plan, corpora, told, made, quality, device)
                ranks.from_first(lambda: _describe(index, folder, manifest))
            return ranks.from_first(lambda: manifest)

    return with_smaller_batches(device, work, batching_within(workspace.memory_bytes, demand), ranks)


def _refuse_impossible(index: CheckpointIndex, plan: Plan, out: Path, settings: RefitSettings) -> None:
    """Raise before any work what would be raised behind it."""
    compensating_flags(index, plan, settings)
    if settings.mode == "refit":
        check_target(settings.target, index.family)
    refuse_existing(out)
    require_space(out, round(index.num_bytes * (1 - plan.total_ratio)) + SMALL_FILES_BYTES)
    clock.check()


def _describe(index: CheckpointIndex, folder: Path, manifest: Manifest) -> None:
    """Add the files that are not weights, and say where everything comes from."""
    copy_carried_files(index.folder, folder)
    dump_json(manifest, folder / MANIFEST_NAME)
    (folder / CARD_NAME).write_text(model_card(manifest), encoding="utf-8")


@contextmanager
def _written_model(
    index: CheckpointIndex,
    plan: Plan,
    folder: Path,
    documents: Sequence[TokenizedDocument],
    settings: RefitSettings,
    *,
    max_shard_bytes: int,
    workspace: Workspace,
    progress: Progress,
    **options: Any,
) -> Iterator[WrittenWeights]:
    """Write what a model is measured from; ``options`` are those of :func:`fitted_blocks`.

    The blocks that were refit go when the context ends well.
    """
    flags = compensating_flags(index, plan, settings)

    def write(fitted: BlockOf) -> WrittenWeights:
        write_config(folder, expert_config(index, plan, flags))
        return write_blocks(
            index, plan, folder, fitted, flags, max_shard_bytes=max_shard_bytes, progress=progress
        )

    with fitted_blocks(
        index, plan, documents, settings, workspace=workspace, progress=progress, **options
    ) as fitted:
        yield workspace.ranks.from_first(lambda: write(fitted))


def _made(
    write: WriteModel,
    folder: Path,
    documents: Sequence[TokenizedDocument],
    settings: RefitSettings,
    key: str,
    unfinished: ExitStack,
    **measuring: Any,
) -> _Made:
    """Write config and weights, by the target that ``auto`` stands for where that is asked.

    ``key`` and ``measuring`` are those of :func:`chosen_target`; ``unfinished`` keeps what is needed to go on
    until it is closed.
    """
    choice = None
    if settings.mode == "refit" and settings.target == "auto":
        scratch = folder / "trial"
        choice = unfinished.enter_context(
            chosen_target(write, documents, settings, scratch, key, **measuring)
        )
        settings = replace(settings, target=choice.target)
    return _Made(unfinished.enter_context(write(folder, documents, settings)), settings, choice)


def expert_config(index: CheckpointIndex, plan: Plan, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Return the source's config with what pruning changed, and ``head_dim`` always stated.

    When blocks go, every list with one entry for each block loses theirs. ``flags`` are config keys of biases
    that the expert gets.
    """
    after = plan.after
    return {
        **index.config,
        **(
            cut_blocks(index, plan.kept_blocks)
            if after.num_hidden_layers != plan.before.num_hidden_layers
            else {}
        ),
        "num_attention_heads": after.num_attention_heads,
        "num_key_value_heads": after.num_key_value_heads,
        "head_dim": after.head_dim,
        "intermediate_size": after.intermediate_size,
        **dict.fromkeys(flags, True),
    }


def cut_blocks(index: CheckpointIndex, kept: Sequence[int]) -> dict[str, Any]:
    """Return the config keys that change when only the blocks ``kept`` stay."""
    config: dict[str, Any] = dict(index.config)
    count = index.shape.num_hidden_layers
    kinds = getattr(load_config(index), "layer_types", None)
    if kinds is not None:  # a pattern that the config left to be worked out would start anew at the cut
        config["layer_types"] = list(kinds)
    cut: dict[str, Any] = {
        key: [value[layer] for layer in kept]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == count and key not in _NOT_PER_BLOCK
    }
    if isinstance(config.get("max_window_layers"), int):  # blocks from this number on have a window
        cut["max_window_layers"] = sum(layer < config["max_window_layers"] for layer in kept)
    return {**cut, "num_hidden_layers": len(kept)}


def _manifest(
    index: CheckpointIndex,
    written: CheckpointIndex,
    digest: str,
    plan: Plan,
    corpora: Corpora,
    provenance: Provenance,
    made: _Made,
    quality: Sequence[DocumentLikelihood],
    device: Device,
) -> Manifest:
    settings, fitted = made.settings, made.settings.mode == "refit"
    kept, total_ratio = made.weights.layers, 1 - written.num_parameters / index.num_parameters
    return Manifest(
        cusprun_version=__version__,
        created=clock.created(),
        source=provenance.source,
        source_hash=provenance.model_hash,
        model_hash=digest,
        expert=without_folders(provenance.expert),
        corpus_hash=provenance.corpus_hash,
        calibration_documents=len(corpora.calibration),
        calibration_tokens=corpora.calibration_tokens,
        held_out_documents=len(corpora.held_out),
        rule=plan.rule,
        refit=made.weights.reports,
        compensation=settings.mode,
        refit_weights=dict(settings.weights) if fitted else {},
        refit_target=settings.target if fitted else "output",
        plan=replace(plan, layers=kept, total_ratio=total_ratio),
        parameters_before=index.num_parameters,
        parameters_after=written.num_parameters,
        seconds=clock.took(provenance.seconds),
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in VERSIONED},
            **device_version(device),
        },
        measurements={
            "weight_bytes_before": index.num_bytes,
            "weight_bytes_after": written.num_bytes,
            **({"held_out": held_out_quality(quality)} if quality else {}),
            **({"refit_target": made.choice.measurement()} if made.choice else {}),
        },
    )


def device_version(device: Device) -> dict[str, str]:
    """Return what a manifest says of the device: nothing of the CPU."""
    return {"device": device.label} if device.key else {}


def held_out_quality(quality: Sequence[DocumentLikelihood]) -> dict[str, float]:
    """Return what a manifest says about the held-out documents, measured against the original."""
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
