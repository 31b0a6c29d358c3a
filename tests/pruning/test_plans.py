"""Plans against their promises and the runtimes' limits, and against every legal shape tried one by one."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import documents, save_model

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.codec import Indices, dump_json, load_json
from cusprun.errors import PlanError, UserError
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning.budget import parameters_budget, ratio_budget
from cusprun.pruning.plan_check import EDITED, checked_plan
from cusprun.pruning.planner import Planner, make_plan
from cusprun.pruning.score import score_model
from cusprun.pruning.store import ImpactStore, open_store
from cusprun.pruning.targets import parse_targets
from cusprun.records import UNITS, Corpora, Plan

Scored = tuple[CheckpointIndex, ImpactStore, str]
RULES = ("surgeon", "paper", "mean", "quantile:0.9", "union", "variance+bias", "magnitude", "random")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    root = tmp_path_factory.mktemp("scored")
    index = open_checkpoint(save_model(root / "model"))
    digest = model_hash(index)
    corpora = Corpora(documents(4, 0, "domain") + documents(3, 1, "language"), ())
    score_model(index, corpora, root / "store", model_hash=digest, corpus_hash="c")
    return index, open_store(root / "store"), digest


def plan_for(scored: Scored, **options: object) -> Plan:
    index, store, digest = scored
    settings_ = {"ratio": 0.25, "targets": ("gguf:f16",), **options}
    return make_plan(index, store, model_hash=digest, **settings_)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("units", [(), UNITS], ids=["default", "with blocks"])
def test_plans_reach_the_ratio_with_legal_equal_widths(
    scored: Scored, rule: str, ratio: float, units: tuple[str, ...]
) -> None:
    index, _, digest = scored
    plan = plan_for(scored, rule=rule, ratio=ratio, units=units)
    assert plan.block_ratio >= ratio - 1e-9
    assert plan.ratio == ratio
    assert checked_plan(plan, index, digest) == plan
    assert 48 % plan.after.num_attention_heads == 0
    assert len(plan.layers) == len(plan.kept_blocks) == plan.after.num_hidden_layers
    assert units or len(plan.kept_blocks) == 3
    for layer in plan.layers:
        assert len(layer.ffn_channels) == plan.after.intermediate_size
        assert len(layer.kv_groups) == plan.after.num_key_value_heads
        assert {head // 2 for head in layer.query_heads} == set(layer.kv_groups)


@pytest.mark.parametrize("units", [(), UNITS], ids=["default", "with blocks"])
def test_the_shares_are_those_of_counted_parameters(scored: Scored, units: tuple[str, ...]) -> None:
    index = scored[0]
    plan = plan_for(scored, ratio=0.6, units=units)
    after = plan.after
    block = 2 * 48 * after.num_attention_heads * 8 + 2 * 48 * after.num_key_value_heads * 8
    block += 3 * 48 * after.intermediate_size
    whole = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80
    count = after.num_hidden_layers
    assert plan.block_ratio == pytest.approx(1 - count * block / (3 * whole))
    removed = 3 * whole - count * block + (3 - count) * 2 * 48  # the two norms go with their block
    assert plan.total_ratio == pytest.approx(removed / index.num_parameters)


def test_units_with_the_lowest_scores_go(scored: Scored) -> None:
    _, store, _ = scored
    plan = plan_for(scored, rule="paper", ratio=0.3)
    for number, layer in enumerate(plan.layers):
        worst = store.layer(number)["ffn_channel"].amax(dim=0)
        kept = worst[list(layer.ffn_channels)]
        gone = [k for k in range(80) if k not in layer.ffn_channels]
        assert float(worst[gone].max()) <= float(kept.min())


def test_blocks_with_the_lowest_scores_go(scored: Scored) -> None:
    _, store, _ = scored
    plan = plan_for(scored, rule="paper", ratio=0.3, units=("block",))
    worst = [float(store.layer(number)["block"].max()) for number in range(3)]
    assert set(plan.kept_blocks) == set(range(3)) - {worst.index(min(worst))}
    assert (plan.after.intermediate_size, plan.after.num_attention_heads) == (80, 6)
    assert plan.block_ratio == pytest.approx(1 / 3)


@pytest.mark.parametrize("ratio", [0.15, 0.34, 0.6])
def test_the_least_predicted_loss_of_all_legal_shapes_wins(scored: Scored, ratio: float) -> None:
    """Every shape, its units chosen by sorting, its loss added up by hand."""
    _, store, _ = scored
    layers = [store.layer(number) for number in range(3)]
    tokens = torch.tensor([document.num_tokens for document in store.documents]).sqrt().unsqueeze(1)

    def mean(impacts: torch.Tensor) -> list[float]:
        return (impacts / tokens).mean(dim=0).tolist()

    def energy(impacts: torch.Tensor) -> list[float]:
        squares = impacts.double().square().sum(dim=0)
        return (squares / squares.sum()).tolist()

    def lost(number: int, groups: int, per_group: int, width: int) -> float:
        arrays = layers[number]
        group_scores, head_scores = mean(arrays["kv_group"]), mean(arrays["query_head"])
        heads = []
        for group in sorted(range(3), key=lambda g: -group_scores[g])[:groups]:
            own = (2 * group, 2 * group + 1)
            heads += sorted(own, key=lambda head: -head_scores[head])[:per_group]
        channel_scores = mean(arrays["ffn_channel"])
        channels = sorted(range(80), key=lambda channel: -channel_scores[channel])[:width]
        head_energy, channel_energy = energy(arrays["query_head"]), energy(arrays["ffn_channel"])
        return 2 - sum(head_energy[h] for h in heads) - sum(channel_energy[c] for c in channels)

    block_scores = [mean(arrays["block"])[0] for arrays in layers]
    whole = 48 * (2 * 48 + 2 * 24 + 3 * 80)
    found, widths = [], range(16, 81, 16)
    for blocks, groups, per_group, width in itertools.product((1, 2, 3), (1, 2, 3), (1, 2), widths):
        if 48 % (groups * per_group):
            continue
        size = blocks * 48 * (2 * 8 * groups * per_group + 2 * 8 * groups + 3 * width)
        if 1 - size / (3 * whole) < ratio - 1e-9:
            continue
        kept = sorted(range(3), key=lambda number: -block_scores[number])[:blocks]
        loss = sum(lost(number, groups, per_group, width) for number in kept) + 2 * (3 - blocks)
        found.append((loss / 3, blocks, groups, groups * per_group, width))
    index, store, digest = scored
    planner = Planner.of(index, store, model_hash=digest, targets=("gguf:f16",), units=UNITS)
    coarse = replace(planner.shapes, constraints=replace(planner.shapes.constraints, ffn_multiple=16))
    plan = replace(planner, shapes=coarse).plan(ratio_budget(index, ratio))
    after = plan.after
    best = min(found)
    assert plan.candidates[0].predicted_loss == pytest.approx(best[0], rel=1e-5)
    assert best[1:] == (
        after.num_hidden_layers, after.num_key_value_heads, after.num_attention_heads, after.intermediate_size
    )  # fmt: skip


@pytest.mark.parametrize("units", [(unit,) for unit in UNITS] + [("ffn_channel", "block")])
def test_only_the_kinds_of_units_asked_for_go(scored: Scored, units: tuple[str, ...]) -> None:
    plan = plan_for(scored, ratio=0.1, units=units)
    before, after = plan.before, plan.after
    gone = {
        "block": after.num_hidden_layers < before.num_hidden_layers,
        "kv_group": after.num_key_value_heads < before.num_key_value_heads,
        "query_head": after.queries_per_group < before.queries_per_group,
        "ffn_channel": after.intermediate_size < before.intermediate_size,
    }
    assert {unit for unit, is_gone in gone.items() if is_gone} <= set(units)
    assert any(gone.values())


def test_an_unknown_kind_of_unit_is_refused_with_the_nearest(scored: Scored) -> None:
    with pytest.raises(UserError, match=r"'blocks'.*did you mean 'block'"):
        plan_for(scored, units=("blocks",))


@pytest.mark.parametrize("most", [127, 5])
def test_the_frontier_is_what_ratios_choose(scored: Scored, most: int) -> None:
    index, store, digest = scored
    planner = Planner.of(index, store, model_hash=digest, targets=("gguf:q8_0",), units=UNITS)
    frontier = planner.shapes.frontier(most)
    assert len(frontier) <= most
    ratios = [candidate.block_ratio for candidate in frontier]
    losses = [candidate.predicted_loss for candidate in frontier]
    assert ratios == sorted(ratios)
    assert losses == sorted(losses)
    for candidate in frontier:
        chosen = plan_for(scored, ratio=candidate.block_ratio, targets=("gguf:q8_0",), units=UNITS)
        assert chosen.candidates[0] == candidate


@pytest.mark.parametrize(
    ("targets", "multiple"),
    [
        (("gguf:q8_0",), 32),
        (("gguf:q4_k_m", "vllm:tp2"), 256),
        (("gguf:f16",), 1),
        (("vllm:tp1", "onnx:int4"), 64),
    ],
)
def test_targets_decide_the_ffn_multiple(targets: tuple[str, ...], multiple: int) -> None:
    assert parse_targets(targets).ffn_multiple == multiple


@pytest.mark.parametrize(
    ("target", "hint"),
    [("ggfu:q8_0", "gguf"), ("gguf:q4_km", "q4_k_m"), ("gguf", "gguf:"), ("vllm:tp3", "tp")],
)
def test_an_unknown_target_is_refused_with_the_nearest(target: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        parse_targets([target])


@pytest.mark.parametrize("ratio", [0.0, -0.1, 0.91, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(scored: Scored, ratio: float) -> None:
    with pytest.raises(PlanError, match=r"\(0, 0.9\]"):
        plan_for(scored, ratio=ratio)


def test_a_ratio_that_no_legal_shape_reaches_names_the_nearest(scored: Scored) -> None:
    with pytest.raises(PlanError, match=r"the most is \d.*nearest legal shapes are 3 blocks with 1 KV"):
        plan_for(scored, ratio=0.9, targets=("gguf:q8_0",))


def test_a_store_of_another_model_is_refused(scored: Scored) -> None:
    index, store, _ = scored
    with pytest.raises(PlanError, match="another model"):
        make_plan(index, store, model_hash="other", ratio=0.25)


def test_a_store_of_single_neurons_is_refused(scored: Scored) -> None:
    index, store, digest = scored
    neurons = replace(store, infos=tuple(replace(info, granularity="neuron") for info in store.infos))
    with pytest.raises(PlanError, match="single neurons"):
        make_plan(index, neurons, model_hash=digest, ratio=0.25)


def test_a_plan_round_trips_and_can_be_edited(scored: Scored, tmp_path: Path) -> None:
    index, _, digest = scored
    plan = plan_for(scored)
    dump_json(plan, tmp_path / "plan.json")
    assert load_json(Plan, tmp_path / "plan.json") == plan
    fewer = tuple(replace(layer, ffn_channels=Indices(layer.ffn_channels[:7])) for layer in plan.layers)
    edited = checked_plan(replace(plan, layers=fewer), index, digest)
    assert edited.after.intermediate_size == 7
    assert edited.block_ratio > plan.block_ratio
    assert edited.ratio == edited.block_ratio
    assert edited.budget == "edited by hand"
    assert any("to 7" in reason for reason in edited.reasons)
    assert not any("predicted loss" in reason for reason in edited.reasons)


def test_other_channels_of_the_same_number_are_an_edit_that_the_refit_leaves_alone(scored: Scored) -> None:
    index, _, digest = scored
    plan = plan_for(scored, rule="surgeon")
    assert any("chooses the FFN channels again" in reason for reason in plan.reasons)
    assert checked_plan(plan, index, digest) == plan
    wishes = PruneWishes()
    assert wishes.settings(plan.rule, index.family, edited=False).revise
    count = len(plan.layers[0].ffn_channels)
    first = replace(plan.layers[0], ffn_channels=Indices(range(count)))
    assert first != plan.layers[0]
    edited = checked_plan(replace(plan, layers=(first, *plan.layers[1:])), index, digest)
    assert edited.budget == EDITED
    assert edited.layers[0] == first
    assert not wishes.settings(plan.rule, index.family, edited=True).revise
    assert not wishes.settings("mean", index.family).revise


def test_an_edited_plan_may_drop_a_block(scored: Scored) -> None:
    index, _, digest = scored
    plan = plan_for(scored, units=UNITS, ratio=0.1)
    assert len(plan.kept_blocks) == 3
    edited = replace(plan, kept_blocks=Indices((0, 2)), layers=(plan.layers[0], plan.layers[2]))
    checked = checked_plan(edited, index, digest)
    assert checked.after.num_hidden_layers == 2
    assert checked.block_ratio > 1 / 3


@pytest.mark.parametrize(
    "words",
    [
        {"rule": "mean"},
        {"rule": "variance+bias"},
        {"targets": ("vllm:tp1", "gguf:f16")},
        {"units": UNITS},
        {"budget": "at least 0.9 of everything"},
        {"ratio": 0.05},
    ],
    ids=str,
)
def test_edited_words_are_an_edit_though_the_layers_are_the_plan_s(
    scored: Scored, words: dict[str, object]
) -> None:
    index, _, digest = scored
    plan = replace(plan_for(scored, targets=("vllm:tp1",)), targets=("vllm:tp1",))
    edited = checked_plan(replace(plan, **words), index, digest)  # type: ignore[arg-type]
    assert edited.layers == plan.layers
    assert edited.budget == edited.reasons[0] == EDITED
    assert edited.ratio == edited.block_ratio == plan.block_ratio
    assert any(edited.rule in reason and "as the edited plan says" in reason for reason in edited.reasons)
    assert not any("predicted loss" in reason for reason in edited.reasons)
    assert checked_plan(edited, index, digest) == edited


def test_an_edited_plan_that_keeps_more_than_it_asked_for_is_applied(scored: Scored) -> None:
    index, _, digest = scored
    plan = plan_for(scored, units=("ffn_channel",))
    more = tuple(replace(layer, ffn_channels=Indices(range(79))) for layer in plan.layers)
    edited = checked_plan(replace(plan, layers=more), index, digest)
    assert (edited.budget, edited.after.intermediate_size) == (EDITED, 79)
    assert edited.ratio == edited.block_ratio < plan.block_ratio


def test_a_plan_that_removes_nothing_is_refused(scored: Scored) -> None:
    index, _, digest = scored
    plan = plan_for(scored, units=("ffn_channel",))
    whole = tuple(replace(layer, ffn_channels=Indices(range(80))) for layer in plan.layers)
    with pytest.raises(PlanError, match="removes nothing"):
        checked_plan(replace(plan, layers=whole), index, digest)


def test_a_plan_of_another_budget_checks_as_it_is(scored: Scored) -> None:
    index, _, digest = scored
    for budget in (parameters_budget(index, 60_000), ratio_budget(index, 0.123456)):
        plan = plan_for(scored, ratio=None, budget=budget)
        assert checked_plan(plan, index, digest) == plan


def test_faulty_edits_are_refused(scored: Scored) -> None:
    index, _, digest = scored
    plan = plan_for(scored)

    def edit(**changes: object) -> Plan:
        return replace(plan, layers=(plan.layers[0], replace(plan.layers[1], **changes), plan.layers[2]))

    def all_layers(**changes: object) -> Plan:
        return replace(plan, layers=tuple(replace(layer, **changes) for layer in plan.layers))

    one_group = {"kv_groups": Indices([0]), "query_heads": Indices([0])}
    lopsided = {"kv_groups": Indices([0, 1]), "query_heads": Indices([0, 1, 2])}
    faults = {
        "same width in every layer": edit(ffn_channels=Indices(range(3))),
        "units from 0 to 79": edit(ffn_channels=Indices([*plan.layers[1].ffn_channels[:-1], 80])),
        "at least one": edit(kv_groups=Indices()),
        "number of its own query heads": all_layers(**lopsided),
        "another model": replace(plan, model_hash="0"),
        "has 2 layers and keeps 3": replace(plan, layers=plan.layers[:2]),
        "kept_blocks must name blocks from 0 to 2": replace(plan, kept_blocks=Indices((0, 1, 3))),
        "has 3 layers and keeps 2": replace(plan, kept_blocks=Indices((0, 1))),
        r"ratio 1.5 is outside \(0, 0.9\]": replace(plan, ratio=1.5),
        "says ratio 0.6 and its layers remove 0.2": replace(plan, ratio=0.6),
        "unknown rule 'maen'; did you mean 'mean'": replace(plan, rule="maen"),
        "unknown target runtime": replace(plan, targets=("ggfu:q8_0",)),
        "want a multiple of 256": replace(plan, targets=("gguf:q4_k_m",)),
        "do not divide over the ranks": replace(all_layers(**one_group), targets=("vllm:tp2",)),
        "unknown kind of unit": replace(plan, units=("ffn_chanel",)),
        "name each kind once": replace(plan, units=()),
        "removes units of the kind": replace(plan, units=("block",)),
        "removes units of the kind block": replace(
            plan, kept_blocks=Indices((0, 2)), layers=(plan.layers[0], plan.layers[2])
        ),
    }
    for text, faulty in faults.items():
        with pytest.raises(PlanError, match=text):
            checked_plan(faulty, index, digest)


@given(st.sets(st.integers(0, 300)))
@settings(max_examples=200)
def test_indices_round_trip_as_ranges(values: set[int]) -> None:
    indices = Indices(values)
    assert Indices.from_text(indices.to_text()) == indices
    assert list(indices) == sorted(values)


def test_thresholds_are_those_of_kept_blocks(scored: Scored) -> None:
    _, store, _ = scored
    plan = plan_for(scored, rule="paper", ratio=0.6, units=("ffn_channel", "block"))
    assert len(plan.ffn_thresholds) == len(plan.kept_blocks)
    for block, threshold, layer in zip(plan.kept_blocks, plan.ffn_thresholds, plan.layers, strict=True):
        worst = store.layer(block)["ffn_channel"].amax(dim=0).tolist()
        gone = [score for channel, score in enumerate(worst) if channel not in layer.ffn_channels]
        assert math.isclose(threshold, max(gone, default=0.0), rel_tol=1e-6)
