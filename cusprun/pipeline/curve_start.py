"""A curve without a point: what it is to be made from, which every point of it shares."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata

from cusprun.codec import key_of
from cusprun.pipeline.curve import CurvePoint, SweepReport
from cusprun.pipeline.opening import OpenModel
from cusprun.pipeline.wishes import PruneWishes
from cusprun.records import Corpora, Expert, TokenizedDocument
from cusprun.version import __version__

_VERSIONED = ("torch", "transformers", "numpy")


def blank_report(
    opened: OpenModel,
    expert: Expert,
    corpora: Corpora,
    sets: Mapping[str, tuple[TokenizedDocument, ...]],
    wishes: PruneWishes,
) -> SweepReport:
    """Return the curve of these inputs without a point; its original is not measured."""
    from cusprun.corpus import corpus_hash
    from cusprun.pruning.targets import DEFAULT_TARGETS, check_units

    texts = {name: [(item.text_hash, item.token_ids) for item in group] for name, group in sets.items()}
    digest = corpus_hash(corpora)
    rule, targets = wishes.chosen_rule, wishes.targets or DEFAULT_TARGETS
    units = check_units(wishes.units)
    made = (rule, targets, units, wishes.refit, dict(wishes.dimension_weights))
    target = wishes.settings(rule, opened.index.family).target
    inputs = (
        "sweep",
        opened.model_hash,
        digest,
        texts,
        made,
        __version__,
        f"target {target}",
        *opened.device.key,
    )
    return SweepReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cusprun_version=__version__,
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _VERSIONED},
        },
        model=opened.source,
        model_hash=opened.model_hash,
        expert=expert.name,
        corpus_hash=digest,
        calibration_documents=len(corpora.calibration),
        calibration_tokens=corpora.calibration_tokens,
        rule=rule,
        targets=targets,
        units=units,
        refit=wishes.refit,
        dimension_weights=dict(wishes.dimension_weights),
        device=opened.device.arithmetic,
        refit_target=target,
        inputs_hash=key_of(*inputs),
        original=CurvePoint(0.0, 0.0, 0.0, opened.index.shape, 0, 0, {}, {}),
        points=(),
    )
