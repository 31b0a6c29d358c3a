"""Whether results are of one expert: one verdict cannot be of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cusprun.errors import UserError
from cusprun.pipeline.reporting.kinds import EVAL, MANIFEST, NEURONS, PARITY, RUN, SWEEP

ByKind = Mapping[str, Sequence[Any]]


def manifests(by_kind: ByKind) -> list[Any]:
    """Return the manifests of all sorts."""
    return [*by_kind[MANIFEST], *by_kind[NEURONS]]


def parameters_after(manifest: Any) -> int:
    """Return the parameters of what a manifest is of; neurons that are zero are still there."""
    found: int = getattr(manifest, "parameters_after", None) or manifest.parameters
    return found


def require_one_expert(by_kind: ByKind) -> None:
    """Raise ``UserError`` when results are of different experts, by their names or their weights."""
    made = {(run.expert, run.source, run.block_ratio, "") for run in by_kind[RUN]}
    made |= {(one.expert.name, one.source, one.plan.block_ratio, "") for one in by_kind[MANIFEST]}
    made |= {(one.expert.name, one.source, one.ratio, " of its neurons") for one in by_kind[NEURONS]}
    named = [f"{name} of {source} at {ratio:.3g}{what}" for name, source, ratio, what in sorted(made)]
    measured = {one.expert for kind in (EVAL, SWEEP) for one in by_kind[kind]}
    named += sorted(measured - {name for name, *_ in made})
    if len(named) > 1:
        raise UserError(
            f"a report is about one expert, and these results are of several ({'; '.join(named)}); "
            "write a report for each"
        )
    for manifest in manifests(by_kind):
        for stranger in _strangers(manifest, by_kind):
            raise UserError(
                f"a report is about one expert, and {stranger} is of another model than "
                f"{manifest.expert.name} of {manifest.source}; leave it out, or make it again"
            )


def _strangers(manifest: Any, by_kind: ByKind) -> Iterator[str]:
    """Yield the evaluations and proofs of models that the manifest does not know."""
    own = {manifest.model_hash, parameters_after(manifest)}
    for quality in by_kind[EVAL]:
        # By its number of parameters too: an export of the expert has other weights, and may be evaluated.
        experts = [{model.model_hash, model.num_parameters} for model in quality.models[1:]]
        if experts and not any(own & expert for expert in experts):
            yield f"the evaluation of {', '.join(model.model for model in quality.models)}"
    known = ("", manifest.source_hash, manifest.model_hash)
    for proof in by_kind[PARITY]:
        if proof.reference_sha256 not in known:
            yield f"the proof of {proof.artifact or proof.candidate}"
