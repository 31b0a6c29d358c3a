"""A model with single neurons set to zero, as a folder of the same shapes that stock transformers loads."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from cusprun import clock
from cusprun.checkpoint.files import copy_carried_files, write_config
from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.checkpoint.output import atomic_folder, refuse_existing, require_space
from cusprun.checkpoint.reader import read_tensor
from cusprun.checkpoint.writer import CheckpointWriter, Declared
from cusprun.codec import dump_json, key_of, to_plain
from cusprun.progress import SILENT, Progress
from cusprun.pruning.folder import (
    CARD_NAME,
    MANIFEST_NAME,
    SMALL_FILES_BYTES,
    VERSIONED,
    Provenance,
    device_version,
    held_out_quality,
    without_folders,
)
from cusprun.pruning.neuron_parts import NeuronStretch, neuron_stretches
from cusprun.quality.likelihood import DocumentLikelihood, measure_likelihood
from cusprun.records import Corpora, NeuronLayer, NeuronManifest, NeuronPlan
from cusprun.version import __version__
from cusprun.walk.device import CPU, Device
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace


def zeroed_tensor(
    tensor: torch.Tensor, stretches: Sequence[NeuronStretch], layer: NeuronLayer
) -> torch.Tensor:
    """Return a copy of a tensor with the neurons that go set to zero; ``stretches`` are the tensor's own."""
    zeroed = tensor.clone()
    for stretch in stretches:
        gone = torch.tensor(layer.removed.get(stretch.kind, ()), dtype=torch.int64)
        zeroed.index_fill_(stretch.axis, gone + stretch.start, 0)
    return zeroed


def write_zeroed(
    index: CheckpointIndex,
    plan: NeuronPlan,
    out: Path,
    *,
    corpora: Corpora,
    provenance: Provenance,
    measure: bool = True,
    device: Device = CPU,
    workspace: Workspace = DEFAULT_WORKSPACE,
    progress: Progress = SILENT,
) -> NeuronManifest:
    """Write the model that ``plan`` describes into the folder ``out``, whole or not at all.

    Biases of a row go with it. With ``measure`` the held-out documents are run through original and result,
    and the perplexities stand in the manifest.

    Raises:
        OutputError: ``out`` exists already, cannot be written or does not fit on the disk.
        ModelError: weights cannot be read or are not finite.
    """
    refuse_existing(out)
    require_space(out, index.num_bytes + SMALL_FILES_BYTES)
    clock.check()
    with atomic_folder(out) as folder:
        started = time.monotonic()
        write_config(folder, index.config)
        copy_carried_files(index.folder, folder)
        zeroed = _write_weights(index, plan, folder, progress)
        seconds = {**provenance.seconds, "zero_and_write": time.monotonic() - started}
        written = open_checkpoint(folder)
        quality = (
            measure_likelihood(
                written,
                corpora.held_out,
                index,
                key=key_of(provenance.model_hash, to_plain(plan)),
                device=device,
                workspace=workspace,
                progress=progress,
            )
            if measure
            else ()
        )
        provenance = replace(provenance, seconds=seconds)
        manifest = _manifest(index, written, plan, corpora, provenance, zeroed, quality, device)
        dump_json(manifest, folder / MANIFEST_NAME)
        (folder / CARD_NAME).write_text(_card(manifest), encoding="utf-8")
    return manifest


def _write_weights(index: CheckpointIndex, plan: NeuronPlan, folder: Path, progress: Progress) -> int:
    """Write all tensors, one at a time; returns the number of parameters set to zero."""
    zeroed = 0
    num_layers = index.shape.num_hidden_layers
    declared = [
        Declared(spec.name, index.tensors[spec.name].dtype, index.tensors[spec.name].shape)
        for spec in index.family.specs(num_layers)
        if spec.name in index.tensors
    ]
    with (
        CheckpointWriter(folder, declared) as writer,
        progress.stage("zero and write", num_layers, "layer") as advance,
    ):
        for spec in index.family.specs(0):
            if spec.name in index.tensors:
                writer.write(spec.name, read_tensor(index, spec.name))
        for number, layer in enumerate(plan.layers):
            specs = [spec for spec in index.family.layer_specs(number) if spec.name in index.tensors]
            stretches = list(neuron_stretches(specs, index.shape))
            for spec in specs:
                own = [stretch for stretch in stretches if stretch.name == spec.name]
                tensor = read_tensor(index, spec.name)
                writer.write(spec.name, zeroed_tensor(tensor, own, layer))
                zeroed += sum(
                    len(layer.removed.get(stretch.kind, ())) * tensor.numel() // tensor.shape[stretch.axis]
                    for stretch in own
                )
            advance(1)
    return zeroed


def _manifest(
    index: CheckpointIndex,
    written: CheckpointIndex,
    plan: NeuronPlan,
    corpora: Corpora,
    provenance: Provenance,
    zeroed: int,
    quality: Sequence[DocumentLikelihood],
    device: Device,
) -> NeuronManifest:
    return NeuronManifest(
        cusprun_version=__version__,
        created=clock.created(),
        source=provenance.source,
        source_hash=provenance.model_hash,
        model_hash=model_hash(written),
        expert=without_folders(provenance.expert),
        corpus_hash=provenance.corpus_hash,
        calibration_documents=len(corpora.calibration),
        calibration_tokens=corpora.calibration_tokens,
        held_out_documents=len(corpora.held_out),
        rule=plan.rule,
        ratio=plan.ratio,
        relevant=plan.relevant,
        counts=tuple({kind: len(gone) for kind, gone in layer.removed.items()} for layer in plan.layers),
        plan=plan,
        parameters=index.num_parameters,
        zeroed_parameters=zeroed,
        seconds=clock.took(provenance.seconds),
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in VERSIONED},
            **device_version(device),
        },
        measurements={"held_out": held_out_quality(quality)} if quality else {},
    )


def _card(manifest: NeuronManifest) -> str:
    which = "most" if manifest.relevant else "least"
    return f"""# {manifest.expert.name}

Made from `{manifest.source}` by [cusprun](https://pypi.org/project/cusprun/) {manifest.cusprun_version}: in
every block the {manifest.ratio:.0%} {which} relevant rows of Q, K and V, columns of O and FFN channels are
set to zero (rule `{manifest.rule}`, arXiv 2506.02561), {manifest.zeroed_parameters:,} of
{manifest.parameters:,} parameters.

Every shape is the original's, so it is neither smaller nor faster: it is meant for research. `cusprun.json`
holds the plan, the expert's sources, versions and the hashes of the model and the documents.
"""
