"""Rules against the publication's set definition; plans against their promises and the runtimes' limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import documents, save_model

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.codec import Indices, dump_json, load_json
from cusprun.errors import PlanError, StoreError, UserError
from cusprun.pruning.planner import checked_plan, make_plan
from cusprun.pruning.rules import RULES
from cusprun.pruning.score import score_model
from cusprun.pruning.store import ImpactStore, open_store
from cusprun.pruning.targets import parse_targets
from cusprun.records import Corpora, Plan


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointIndex, ImpactStore, str]:
    root = tmp_path_factory.mktemp("scored")
    index = open_checkpoint(save_model(root / "model"))
    digest = model_hash(index)
    corpora = Corpora(documents(4, 0, "domain") + documents(3, 1, "language"), ())
    score_model(index, corpora, root / "store", model_hash=digest, corpus_hash="c")
    return index, open_store(root / "store"), digest


def plan_for(scored: tuple[CheckpointIndex, ImpactStore, str], **options: object) -> Plan:
    index, store, digest = scored
    settings_ = {"ratio": 0.25, "targets": ("gguf:f16",), **options}
    return make_plan(index, store, model_hash=digest, **settings_)  # type: ignore[arg-type]


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    share=st.floats(0.05, 0.95),
)
def test_paper_rule_removes_the_intersection_of_the_irrelevant_sets(
    seed: int, sizes: list[int], share: float
) -> None:
    impacts = torch.rand(sum(sizes), 20, generator=torch.Generator().manual_seed(seed))
    dimensions, start = {}, 0
    for number, size in enumerate(sizes):
        dimensions[str(number)] = list(range(start, start + size))
        start += size
    scores = RULES["paper"](impacts, torch.ones(len(impacts)), dimensions)
    threshold = float(scores.quantile(share))
    irrelevant = [
        {unit for unit in range(20) if all(float(impacts[row, unit]) <= threshold for row in rows)}
        for rows in dimensions.values()
    ]
    assert set(torch.nonzero(scores <= threshold).flatten().tolist()) == set.intersection(*irrelevant)


def test_mean_rule_weighs_documents_alike_whatever_their_length() -> None:
    impacts = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 18.0]])
    scores = RULES["mean"](impacts, torch.tensor([1, 1, 1, 9]), {"a": [0, 1, 2], "b": [3]})
    assert scores.tolist() == [1.5, 1.5]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
def test_plans_reach_the_ratio_with_legal_equal_widths(
    scored: tuple[CheckpointIndex, ImpactStore, str], rule: str, ratio: float
) -> None:
    index, _, digest = scored
    plan = plan_for(scored, rule=rule, ratio=ratio)
    assert plan.block_ratio >= ratio - 1e-9
    assert checked_plan(plan, index, digest) == plan
    assert 48 % plan.after.num_attention_heads == 0
    for layer in plan.layers:
        assert len(layer.ffn_channels) == plan.after.intermediate_size
        assert len(layer.kv_groups) == plan.after.num_key_value_heads
        assert {head // 2 for head in layer.query_heads} == set(layer.kv_groups)


def test_the_shares_are_those_of_counted_parameters(
    scored: tuple[CheckpointIndex, ImpactStore, str],
) -> None:
    index = scored[0]
    plan = plan_for(scored, ratio=0.3)
    after = plan.after
    block = 2 * 48 * after.num_attention_heads * 8 + 2 * 48 * after.num_key_value_heads * 8
    block += 3 * 48 * after.intermediate_size
    whole = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80
    assert plan.block_ratio == pytest.approx(1 - block / whole)
    assert plan.total_ratio == pytest.approx(3 * (whole - block) / index.num_parameters)


def test_units_with_the_lowest_scores_go(scored: tuple[CheckpointIndex, ImpactStore, str]) -> None:
    _, store, _ = scored
    plan = plan_for(scored, rule="paper", ratio=0.3)
    for number, layer in enumerate(plan.layers):
        worst = store.layer(number)["ffn_channel"].amax(dim=0)
        kept = worst[list(layer.ffn_channels)]
        gone = [k for k in range(80) if k not in layer.ffn_channels]
        assert float(worst[gone].max()) <= float(kept.min())


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
def test_a_ratio_outside_its_range_is_refused(
    scored: tuple[CheckpointIndex, ImpactStore, str], ratio: float
) -> None:
    with pytest.raises(PlanError, match=r"\(0, 0.9\]"):
        plan_for(scored, ratio=ratio)


def test_a_ratio_that_no_legal_shape_reaches_names_the_most_that_one_does(
    scored: tuple[CheckpointIndex, ImpactStore, str],
) -> None:
    with pytest.raises(PlanError, match=r"the most is \d"):
        plan_for(scored, ratio=0.9, targets=("gguf:q8_0",))


def test_a_plan_round_trips_and_can_be_edited(
    scored: tuple[CheckpointIndex, ImpactStore, str], tmp_path: Path
) -> None:
    index, _, digest = scored
    plan = plan_for(scored)
    dump_json(plan, tmp_path / "plan.json")
    assert load_json(Plan, tmp_path / "plan.json") == plan
    fewer = tuple(replace(layer, ffn_channels=Indices(layer.ffn_channels[:7])) for layer in plan.layers)
    edited = checked_plan(replace(plan, layers=fewer), index, digest)
    assert edited.after.intermediate_size == 7
    assert edited.block_ratio > plan.block_ratio


def test_faulty_edits_are_refused(scored: tuple[CheckpointIndex, ImpactStore, str]) -> None:
    index, _, digest = scored
    plan = plan_for(scored)

    def edit(**changes: object) -> Plan:
        return replace(plan, layers=(plan.layers[0], replace(plan.layers[1], **changes), plan.layers[2]))

    faults = {
        "same width in every layer": edit(ffn_channels=Indices(range(3))),
        "units from 0 to 79": edit(ffn_channels=Indices([*plan.layers[1].ffn_channels[:-1], 80])),
        "at least one": edit(kv_groups=Indices()),
        "number of its own query heads": edit(
            query_heads=Indices(range(6)[: len(plan.layers[0].query_heads)])
        )
        if len(plan.layers[0].kv_groups) < 3
        else edit(kv_groups=Indices([0, 1, 2]), query_heads=Indices([])),
        "another model": replace(plan, model_hash="0"),
        "has 2 layers": replace(plan, layers=plan.layers[:2]),
    }
    for text, faulty in faults.items():
        with pytest.raises(PlanError, match=text if text != "number of its own query heads" else "query"):
            checked_plan(faulty, index, digest)


def test_a_store_of_another_model_and_a_damaged_store_are_refused(
    scored: tuple[CheckpointIndex, ImpactStore, str], tmp_path: Path
) -> None:
    index, store, _ = scored
    with pytest.raises(PlanError, match="another model"):
        make_plan(index, store, model_hash="other", ratio=0.25)
    with pytest.raises(StoreError, match="not an impact store"):
        open_store(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in store.folders[0].iterdir():
        (broken / file.name).write_bytes(
            file.read_bytes()[: -1 if file.name.endswith("2.safetensors") else None]
        )
    with pytest.raises(StoreError, match="layer-00002"):
        open_store(broken).layer(2)


@given(st.sets(st.integers(0, 300)))
@settings(max_examples=200)
def test_indices_round_trip_as_ranges(values: set[int]) -> None:
    indices = Indices(values)
    assert Indices.from_text(indices.to_text()) == indices
    assert list(indices) == sorted(values)
