"""Paper mode: score every single neuron, and set the irrelevant ones to zero with every shape kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.progress import SILENT, Progress
from cusprun.records import Corpora, Expert, NeuronManifest

if TYPE_CHECKING:
    from cusprun.pipeline.opening import OpenModel


def prune_neurons(
    opened: OpenModel,
    expert: Expert,
    corpora: Corpora,
    out: Path,
    *,
    ratio: float,
    rule: str,
    relevant: bool = False,
    exact: bool = False,
    progress: Progress = SILENT,
) -> NeuronManifest:
    """Write a folder of the same shapes with the share ``ratio`` of every matrix' neurons set to zero.

    ``relevant`` sets the most relevant ones to zero instead. ``exact`` computes the impact of rows of Q and K
    exactly on long documents too, instead of estimating it. The expert's seed seeds the rule ``random``.

    Raises:
        CorpusError: the documents are too few for the rule, or cannot tell the neurons apart.
        ModelError: weights cannot be read or are not finite.
        PlanError: the ratio is outside (0, 1) or too small for a single neuron, or the rule has no meaning
            for single neurons.
        OutputError: ``out`` exists, cannot be written or does not fit on the disk.
        UserError: the rule is unknown.
    """
    from cusprun.corpus import corpus_hash
    from cusprun.pruning.folder import Provenance
    from cusprun.pruning.neuron_plan import (
        check_neuron_ratio,
        check_neuron_rule,
        make_neuron_plan,
        require_removal,
    )
    from cusprun.pruning.neuron_zero import write_zeroed
    from cusprun.pruning.store import open_store

    check_neuron_rule(rule)
    check_neuron_ratio(ratio)
    require_removal(ratio, opened.index.shape)
    started = time.monotonic()
    store = open_store(scored_neurons(opened, expert, corpora, exact=exact, progress=progress))
    seconds = {"score": time.monotonic() - started}
    started = time.monotonic()
    plan = make_neuron_plan(
        opened.index,
        store,
        model_hash=opened.model_hash,
        ratio=ratio,
        rule=rule,
        relevant=relevant,
        seed=expert.seed,
    )
    seconds["plan"] = time.monotonic() - started
    return write_zeroed(
        opened.index,
        plan,
        out,
        corpora=corpora,
        provenance=Provenance(
            source=opened.source,
            model_hash=opened.model_hash,
            corpus_hash=corpus_hash(corpora),
            expert=expert,
            seconds=seconds,
        ),
        measure=bool(corpora.held_out),
        device=opened.device,
        workspace=opened.workspace,
        progress=progress,
    )


def scored_neurons(
    opened: OpenModel,
    expert: Expert,
    corpora: Corpora,
    *,
    exact: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Return the store of single neurons in the cache, made unless it is there and sound."""
    from cusprun.pipeline.scores import cached_store
    from cusprun.pruning.neuron_score import score_neurons

    def score_into(path: Path, corpus_hash: str) -> None:
        score_neurons(
            opened.index,
            corpora,
            path,
            model_hash=opened.model_hash,
            corpus_hash=corpus_hash,
            expert_name=expert.name,
            exact=exact,
            device=opened.device,
            workspace=opened.workspace,
            progress=progress,
        )

    return cached_store(opened, corpora, "neuron", score_into, exact)
