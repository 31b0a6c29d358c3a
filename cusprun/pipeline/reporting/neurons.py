"""A model with single neurons set to zero in a report: what is zero, and how to make it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from shlex import quote

from cusprun.pipeline.reporting.expert import documents_grid, expert_yaml, facts_grid, hashes_grid
from cusprun.records import NeuronManifest
from serve.report.view import Block, Code, Grid, Prose, Section


def neuron_sections(manifests: Sequence[NeuronManifest]) -> Iterator[Section]:
    """Yield what was set to zero, and how to make it again."""
    for manifest in manifests:
        yield Section("pruned", "What was pruned, and why", tuple(_what(manifest)))
        yield Section("reproduce", "How to make it again", tuple(_again(manifest)))


def _what(manifest: NeuronManifest) -> Iterator[Block]:
    which = "most" if manifest.relevant else "least"
    yield Prose(
        f"In every block the {manifest.ratio:.0%} {which} relevant rows of Q, K and V, columns of O and FFN "
        f"channels are set to zero, by the rule {manifest.rule}: {manifest.zeroed_parameters:,} of "
        f"{manifest.parameters:,} parameters. Every shape is the original's, so the model is neither smaller "
        "nor faster; it is meant for research."
    )
    yield documents_grid(manifest)
    kinds = sorted({kind for block in manifest.counts for kind in block})
    rows = tuple(
        (str(number), *(f"{block.get(kind, 0):,}" for kind in kinds))
        for number, block in enumerate(manifest.counts)
    )
    yield Grid(
        "Neurons set to zero in each block", ("block", *(kind.replace("_", " ") for kind in kinds)), rows
    )


def _again(manifest: NeuronManifest) -> Iterator[Block]:
    yield Code("expert.yaml: what the model is to be good at", expert_yaml(manifest.expert))
    if manifest.relevant:
        yield Prose(
            "The most relevant neurons are set to zero in Python alone: prune_neurons(relevant=True)."
        )
    else:
        words = (
            f"cusprun prune {quote(manifest.source)} --expert expert.yaml",
            f"--granularity neuron --ratio {manifest.ratio!r} --rule {quote(manifest.rule)}",
            "--out expert",
        )
        yield Code("The model", " \\\n    ".join(words))
    yield hashes_grid(manifest, manifest.plan)
    yield facts_grid(manifest)
