"""An expert's manifest in a report: what was pruned and why, what layers kept, how to make it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cusprun.panels import Heat, Line, Panel
from cusprun.pipeline.reporting.wording import counted, moment
from cusprun.pruning.plan_check import EDITED
from cusprun.records import (
    DIMENSIONS,
    Expert,
    LayerPlan,
    Manifest,
    NeuronManifest,
    NeuronPlan,
    Plan,
    Source,
)
from serve.report.view import Block, Bullets, Code, Grid, Heading, Picture, Prose, Section

_BINS = 64
"""Columns of the heat map over the channels of a layer; with 1,536 channels one is 24 wide."""

_MOST_CANDIDATES = 12
_MADE_GOOD = {
    "refit": "what is left of the last projections was solved again by least squares on these documents",
    "bias": "the mean of what went was added as biases",
    "none": "nothing was done to make good for it",
}
_WIDTHS = {
    "num_hidden_layers": "decoder blocks",
    "hidden_size": "hidden size",
    "intermediate_size": "FFN width",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV heads",
    "head_dim": "head size",
    "vocab_size": "vocabulary",
}


def manifest_sections(manifests: Sequence[Manifest]) -> Iterator[Section]:
    """Yield what was pruned, and how to make it again."""
    for number, manifest in enumerate(manifests):
        blocks = (*_what(manifest), *_kept(manifest, f"kept-{number}"), *_errors(manifest, f"refit-{number}"))
        yield Section("pruned", "What was pruned, and why", blocks)
        yield Section("reproduce", "How to make it again", tuple(_again(manifest)))


def dimension_text(manifest: Manifest | NeuronManifest) -> str:
    """Return what the expert is for, such as ``language (pack lang/en) and domain (maths.jsonl)``."""
    named = [
        f"{name} ({_source_names(manifest.expert.dimensions[name])})"
        for name in DIMENSIONS
        if name in manifest.expert.dimensions
    ]
    return " and ".join((", ".join(named[:-1]), named[-1])) if len(named) > 1 else "".join(named)


def _source_names(sources: Sequence[Source]) -> str:
    from cusprun.corpus.sources import source_name

    return ", ".join(map(source_name, sources))


def _what(manifest: Manifest) -> Iterator[Block]:
    plan = manifest.plan
    yield Prose(
        f"{plan.block_ratio:.1%} of the decoder blocks' attention and FFN parameters are gone, "
        f"{plan.total_ratio:.1%} of all parameters. Asked for: {plan.budget}, for {', '.join(plan.targets)}. "
        f"The rule {manifest.rule} chose among {', '.join(plan.units)} what the calibration documents need "
        f"least; {_MADE_GOOD.get(manifest.compensation, manifest.compensation)}. No gradient, no training."
    )
    if plan.reasons:
        yield Bullets(plan.reasons)
    yield documents_grid(manifest, manifest.refit_weights)
    yield Grid("Shapes", ("width", "before", "after", "change"), tuple(_shape_rows(manifest)))
    if plan.candidates:
        yield _candidates(plan)


def documents_grid(
    manifest: Manifest | NeuronManifest, refit_weights: Mapping[str, float] | None = None
) -> Grid:
    """Return the sources of each dimension, with their weights where there was a refit."""
    dimensions = manifest.expert.dimensions
    rows = [
        (name, _source_names(dimensions[name]), f"{(refit_weights or {}).get(name, 1):g}")
        for name in DIMENSIONS
        if name in dimensions
    ]
    if manifest.expert.general:
        rows.append(("general", _source_names(manifest.expert.general), "only measured"))
    columns = ("dimension", "sources", "weight in the refit")
    num_columns = 2 if refit_weights is None else 3
    return Grid(
        "The documents that decided",
        columns[:num_columns],
        tuple(row[:num_columns] for row in rows),
        texts=(1,),
        notes=(
            f"{counted(manifest.calibration_documents, 'calibration document')} with "
            f"{manifest.calibration_tokens:,} tokens decided; {manifest.held_out_documents:,} others were "
            "held out to measure quality, and no text stands on both sides.",
        ),
    )


def _shape_rows(manifest: Manifest) -> Iterator[tuple[str, ...]]:
    before, after = manifest.plan.before, manifest.plan.after
    values: list[tuple[str, int, int]] = [
        (label, getattr(before, name), getattr(after, name)) for name, label in _WIDTHS.items()
    ]
    values.append(("parameters", manifest.parameters_before, manifest.parameters_after))
    for label, old, new in values:
        yield label, f"{old:,}", f"{new:,}", "same" if old == new else f"{new / old - 1:+.1%}"


def _candidates(plan: Plan) -> Grid:
    found = sorted(plan.candidates, key=lambda one: one.predicted_loss)[:_MOST_CANDIDATES]
    rows = tuple(
        (
            f"{one.num_hidden_layers} × {one.intermediate_size:,}",
            str(one.num_key_value_heads),
            str(one.num_attention_heads),
            f"{one.block_ratio:.1%}",
            f"{one.predicted_loss:.4g}",
        )
        for one in found
    )
    columns = ("blocks × FFN width", "KV heads", "query heads", "block parameters gone", "predicted loss")
    return Grid("Shapes that keep the budget, by the loss that the plan predicts", columns, rows)


def _kept(manifest: Manifest, name: str) -> Iterator[Block]:
    """Yield the picture of what each layer of the original kept."""
    plan, before = manifest.plan, manifest.plan.before
    layers: dict[int, LayerPlan] = dict(zip(plan.kept_blocks, plan.layers, strict=False))
    if not layers:
        return
    width, groups = before.intermediate_size, before.num_key_value_heads
    to_a_column = f"channel, {width / _num_bins(width):.3g} to a column"
    channels = {layer: kept.ffn_channels for layer, kept in layers.items()}
    panels = [_heat("FFN channels", to_a_column, "share kept", channels, width, before.num_hidden_layers)]
    whole = all(len(kept.kv_groups) == groups for kept in layers.values())
    if groups > 1 and not whole:
        kept_groups = {layer: kept.kv_groups for layer, kept in layers.items()}
        title = "KV groups, with their query heads"
        panels.append(_heat(title, "KV group", "kept", kept_groups, groups, before.num_hidden_layers))
    yield Heading("What each layer kept")
    if whole:
        yield Prose("Every KV group of the layers that are left stayed, so the picture is of the FFN.")
    yield Picture(
        name,
        "Rows are layers of the original, the first at the top; columns are its channels or groups; the "
        "brighter a cell, the more of it was kept. Where a whole block went, its row is dark.",
        tuple(panels),
        (_layer_grid(plan, layers),),
    )


def _heat(
    title: str, x_label: str, scale_label: str, kept: Mapping[int, Sequence[int]], width: int, num_layers: int
) -> Heat:
    """Return the shares that each layer kept of its ``width`` units; a layer not in ``kept`` went whole."""
    return Heat(
        title=title,
        x_label=x_label,
        y_label="layer",
        scale_label=scale_label,
        values=tuple(_binned(kept.get(layer, ()), width) for layer in range(num_layers)),
        columns=width,
        row_labels=tuple(map(str, range(num_layers))),
    )


def _num_bins(width: int) -> int:
    return min(_BINS, width)


def _binned(kept: Sequence[int], width: int) -> tuple[float, ...]:
    """Return the share of units kept in each bin of a layer that is ``width`` wide."""
    bins = _num_bins(width)
    counts, sizes = [0] * bins, [0] * bins
    for unit in range(width):
        sizes[unit * bins // width] += 1
    for unit in kept:
        if unit < width:
            counts[unit * bins // width] += 1
    return tuple(count / size for count, size in zip(counts, sizes, strict=True))


def _layer_grid(plan: Plan, layers: Mapping[int, LayerPlan]) -> Grid:
    before = plan.before

    def row(layer: int) -> tuple[str, ...]:
        if layer not in layers:
            return str(layer), "block gone", "block gone", "block gone"
        kept = layers[layer]
        pairs = (
            (kept.ffn_channels, before.intermediate_size),
            (kept.kv_groups, before.num_key_value_heads),
            (kept.query_heads, before.num_attention_heads),
        )
        return str(layer), *(f"{len(units):,} of {width:,}" for units, width in pairs)

    columns = ("layer", "FFN channels kept", "KV groups kept", "query heads kept")
    return Grid("Kept of each layer", columns, tuple(row(layer) for layer in range(before.num_hidden_layers)))


def _errors(manifest: Manifest, name: str) -> Iterator[Block]:
    """Yield the error that pruning left in each layer's projections, before and after the refit."""
    if not manifest.refit:
        return
    projections = tuple(dict.fromkeys(entry.projection for entry in manifest.refit))
    lines: list[Line] = []
    for projection in projections:
        own = [entry for entry in manifest.refit if entry.projection == projection]
        x = tuple(float(entry.layer) for entry in own)
        lines.append(
            Line(f"{projection}, columns as they were", x, tuple(e.relative_error_before for e in own))
        )
        lines.append(Line(f"{projection}, refitted", x, tuple(e.relative_error_after for e in own)))
    rows = tuple(
        (
            f"{entry.layer}, {entry.projection}",
            f"{entry.relative_error_before:.3%}",
            f"{entry.relative_error_after:.3%}",
            "not refitted" if entry.ridge is None else f"{entry.ridge:g}",
            entry.measured_on,
        )
        for entry in manifest.refit
    )
    yield Heading("What each layer lost")
    yield Picture(
        name,
        "Relative squared error of each projection's output, measured on calibration documents, before and "
        "after the refit of the columns that stay.",
        (Panel("", "layer of the expert", "relative error", tuple(lines), dots=len(lines[0].x) < 40),),
        (
            Grid(
                "Error of each projection",
                ("layer, projection", "before the refit", "after", "ridge", "measured on"),
                rows,
                texts=(4,),
            ),
        ),
    )


def _again(manifest: Manifest) -> Iterator[Block]:
    yield Code("expert.yaml: what the model is to be good at", expert_yaml(manifest.expert))
    is_edited = manifest.plan.budget == EDITED
    told = "; plan.json is the part 'plan' of its cusprun.json, which was edited by hand" if is_edited else ""
    yield Code(f"The expert{told}", _prune_command(manifest, is_edited))
    yield hashes_grid(manifest, manifest.plan)
    yield facts_grid(manifest)


def hashes_grid(manifest: Manifest | NeuronManifest, plan: Plan | NeuronPlan) -> Grid:
    """Return the hashes of what a model was made from and of itself."""
    hashes = [
        ("original", manifest.source_hash),
        ("calibration documents", manifest.corpus_hash),
        ("store of scores", plan.store_hash),
    ]
    hashes += [("plan", plan.content_hash)] if isinstance(plan, Plan) else []
    return Grid("Hashes (SHA-256)", ("of", "hash"), (*hashes, ("expert", manifest.model_hash)), texts=(1,))


def facts_grid(manifest: Manifest | NeuronManifest) -> Grid:
    """Return the seed, versions and times of a model that was made."""
    facts = (
        ("seed", str(manifest.expert.seed)),
        ("made", moment(manifest.created)),
        ("cusprun", manifest.cusprun_version),
        *manifest.versions.items(),
        *((f"seconds for {stage}", f"{value:,.1f}") for stage, value in manifest.seconds.items()),
    )
    return Grid("Seed, versions and time", ("what", "value"), facts, texts=(1,))


def expert_yaml(expert: Expert) -> str:
    """Return the expert as its file; paths are file names, since a manifest holds no folders."""
    import yaml

    tree: dict[str, Any] = {"name": expert.name}
    for name in DIMENSIONS:
        if name in expert.dimensions:
            tree[name] = {"sources": [_source_tree(source) for source in expert.dimensions[name]]}
    if expert.general:
        tree["general"] = {"sources": [_source_tree(source) for source in expert.general]}
    tree |= {"held_out": expert.held_out, "max_tokens": expert.max_tokens, "seed": expert.seed}
    if expert.augment is not None:
        tree["augment"] = dict(vars(expert.augment))
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)).rstrip()


def _source_tree(source: Source) -> dict[str, Any]:
    return {name: value for name, value in vars(source).items() if value is not None}


def _prune_command(manifest: Manifest, is_edited: bool) -> str:
    from shlex import quote

    plan = manifest.plan
    words = ["cusprun prune", quote(manifest.source), "--expert expert.yaml"]
    if is_edited:
        words.append("--plan plan.json")
    else:
        # All digits: where another budget was asked for, this is what was reached, and more is another shape.
        words += [f"--ratio {plan.ratio!r}", f"--rule {quote(manifest.rule)}"]
        words += [f"--for {quote(','.join(plan.targets))}", f"--units {quote(','.join(plan.units))}"]
    if manifest.compensation == "none":
        words.append("--no-refit")
    if manifest.refit_target != "output":
        words.append(f"--refit-target {quote(manifest.refit_target)}")
    words += [f"--weight {quote(f'{name}={value:g}')}" for name, value in manifest.refit_weights.items()]
    return " \\\n    ".join([" ".join(words[:3]), *words[3:], "--out expert"])
