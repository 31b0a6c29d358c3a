"""How much the irrelevant sets of the dimensions in some stores share: table, JSON and picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import combinations
from typing import TYPE_CHECKING

from cusprun.cache import fresh_output
from cusprun.errors import CorpusError, UserError, require_kind
from cusprun.progress import SILENT, Progress
from cusprun.resolve import StrPath, as_paths
from cusprun.version import __version__

if TYPE_CHECKING:
    import torch

    from cusprun.panels import Line, Panel
    from cusprun.pruning.overlap import ComparedDimension, KindOverlap, OverlapReport
    from cusprun.pruning.store import ImpactStore

DEFAULT_RATIO, DEFAULT_RULE = 0.25, "paper"


def overlap(
    scores: StrPath | Sequence[StrPath],
    *,
    ratio: float = DEFAULT_RATIO,
    rule: str = DEFAULT_RULE,
    plot: StrPath | None = None,
    progress: Progress = SILENT,
) -> OverlapReport:
    """Compare the irrelevant sets of all dimensions in one store of scores or several, for each kind of unit.

    The irrelevant set of a dimension is the share ``ratio`` of a block's units of one kind with the lowest
    score by ``rule`` over the dimension's documents alone. A kind with one unit in a block is judged over all
    blocks. ``plot`` names a picture to write, ``.png`` or ``.svg``. No model is read.

    Raises:
        StoreError: a store is missing, damaged, given twice or another model's.
        CorpusError: a dimension has too few documents for the rule.
        UserError: there is only one dimension, the rule is unknown or judges no single dimension, the ratio
            is not between 0 and 1, or the picture's name has another ending.
        MissingDependencyError: a picture is wanted and matplotlib is not installed.
        OutputError: the picture exists or cannot be written.
    """
    from cusprun.checkpoint.output import atomic_file
    from cusprun.plots import check_picture, draw
    from cusprun.pruning.overlap import OverlapReport, check_overlap_ratio
    from cusprun.pruning.store import open_store

    require_kind(ratio, float, "the ratio")
    check_overlap_ratio(ratio)
    _check_rule(rule)
    picture = None if plot is None else fresh_output(plot)
    if picture is not None:
        check_picture(picture)
    store = open_store(as_paths(scores))
    parts = _parts(store)
    kinds = _compare(parts, store.shape.num_hidden_layers, ratio, rule, progress)
    names = [part.compared.name for part in parts]
    report = OverlapReport(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cusprun_version=__version__,
        model_hash=store.model_hash,
        store_hash=store.store_hash,
        rule=rule,
        ratio=ratio,
        num_hidden_layers=store.shape.num_hidden_layers,
        dimensions=tuple(part.compared for part in parts),
        pairs=tuple(combinations(names, 2)),
        kinds=kinds,
    )
    if picture is not None:
        with atomic_file(picture) as partial:
            draw(panels(report), partial, _title(report), picture.suffix.lower().removeprefix("."))
    return report


@dataclass(frozen=True)
class _Part:
    """One dimension of one store, and its rows there."""

    compared: ComparedDimension
    store: ImpactStore
    rows: tuple[int, ...]

    def scores(self, layer: int, kind: str, rule: str) -> torch.Tensor:
        """Return the score of every unit of a block over this dimension alone: [units]."""
        import torch

        from cusprun.pruning.rules import score_units

        evidence = self.store.evidence(layer, kind)
        rows, fluctuation = list(self.rows), evidence.fluctuation
        if len(rows) < len(evidence.impacts):
            # Kept for all documents of the store together; a rule that asks for it gets no number.
            fluctuation = torch.full_like(fluctuation, torch.nan)
        own = replace(
            evidence,
            impacts=evidence.impacts[rows],
            tokens=evidence.tokens[rows],
            dimensions={self.compared.dimension: range(len(rows))},
            fluctuation=fluctuation,
            texts=tuple(evidence.texts[row] for row in rows),
        )
        try:
            found = score_units(rule, own)
        except CorpusError as error:
            raise CorpusError(f"{self.compared.name}: {error}") from None
        if not bool(torch.isfinite(found).all()):
            raise UserError(
                f"the rule {rule!r} cannot judge {self.compared.name} alone, because "
                f"{self.store.folders[0]} holds other dimensions too and its statistics are kept for all of "
                "them together; score each dimension on its own, or compare by another rule"
            )
        return found


def _check_rule(rule: str) -> None:
    """Raise ``UserError`` for a rule that is unknown or finds the same set for all documents."""
    from cusprun.pruning.rules import rule_entry

    if not rule_entry(rule).min_documents:
        raise UserError(
            f"the rule {rule!r} looks at no document, so all dimensions have the same irrelevant set; "
            f"compare by another rule, like {DEFAULT_RULE!r}"
        )


def _parts(store: ImpactStore) -> tuple[_Part, ...]:
    """Return every dimension of every store, called by as little as tells it from the others."""
    from cusprun.pruning.overlap import ComparedDimension

    found = [
        (number, dimension)
        for number, info in enumerate(store.infos)
        for dimension in dict.fromkeys(document.dimension for document in info.documents)
    ]
    if len(found) < 2:
        raise UserError(
            f"{store.folders[0]} holds one dimension ({found[0][1]}), and an overlap takes two; "
            "name the stores of other dimensions or experts too"
        )
    plain = Counter(dimension for _, dimension in found)
    named = Counter((dimension, store.infos[number].expert_name) for number, dimension in found)
    parts = []
    for number, dimension in found:
        info = store.infos[number]
        name = dimension
        if plain[dimension] > 1:
            expert = info.expert_name or "unnamed"
            known = named[dimension, info.expert_name] == 1
            name += f" ({expert})" if known else f" ({expert}, store {number + 1})"
        rows = tuple(row for row, document in enumerate(info.documents) if document.dimension == dimension)
        compared = ComparedDimension(
            name=name,
            dimension=dimension,
            expert_name=info.expert_name,
            documents=len(rows),
            tokens=sum(info.documents[row].num_tokens for row in rows),
        )
        parts.append(_Part(compared, replace(store, folders=(store.folders[number],), infos=(info,)), rows))
    return tuple(parts)


def _compare(
    parts: Sequence[_Part], num_layers: int, ratio: float, rule: str, progress: Progress
) -> tuple[KindOverlap, ...]:
    import torch

    from cusprun.pruning.overlap import irrelevant_count, irrelevant_set, kind_overlap, layer_overlap

    scores: dict[str, list[torch.Tensor]] = {}
    with progress.stage("comparing", num_layers, "layer") as advance:
        for layer in range(num_layers):
            for kind in parts[0].store.kinds:
                found = torch.stack([part.scores(layer, kind, rule) for part in parts])
                scores.setdefault(kind, []).append(found)
            advance(1)
    kinds = []
    for kind, rows in scores.items():
        layers: list[tuple[int | None, torch.Tensor]] = list(enumerate(rows))
        if rows[0].shape[1] == 1:
            layers = [(None, torch.cat(rows, dim=1))]
        units = layers[0][1].shape[1]
        if units < 2:
            continue
        overlaps = [
            layer_overlap(torch.stack([irrelevant_set(row, ratio) for row in values]), layer)
            for layer, values in layers
        ]
        count = irrelevant_count(units, ratio)
        kinds.append(kind_overlap(kind, overlaps, units=units, irrelevant=count, dimensions=len(parts)))
    return tuple(kinds)


def _title(report: OverlapReport) -> str:
    return f"Irrelevant sets at ratio {report.ratio:g}, rule {report.rule}"


def panels(report: OverlapReport) -> tuple[Panel, ...]:
    """Return one panel for each kind of unit: the overlap of each pair over the blocks, and chance."""
    from cusprun.panels import Panel

    return tuple(
        Panel(
            title=f"{kind.kind}: {kind.irrelevant} of {kind.units}"
            + (" over all layers" if kind.layers[0].layer is None else ""),
            x_label="layer",
            y_label="overlap",
            lines=tuple(_lines(report, kind)),
            limits=(-0.02, 1.02),
        )
        for kind in report.kinds
    )


def _lines(report: OverlapReport, kind: KindOverlap) -> list[Line]:
    from cusprun.panels import Line

    last = float(max(report.num_hidden_layers - 1, 1))
    whole = kind.layers[0].layer is None
    x = (0.0, last) if whole else tuple(float(layer.layer or 0) for layer in kind.layers)
    layers = kind.layers * 2 if whole else kind.layers
    lines = [
        Line(f"{pair[0]} and {pair[1]}", x, tuple(layer.jaccard[number] for layer in layers))
        for number, pair in enumerate(report.pairs)
    ]
    lines.append(Line("a pair by chance", (0.0, last), (kind.chance_jaccard,) * 2, reference=True))
    if len(report.dimensions) > 2:
        shared = tuple(layer.intersection for layer in layers)
        lines.append(Line("share of units irrelevant to all", x, shared))
    return lines
