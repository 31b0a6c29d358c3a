"""Budgets against counted parameters, against llama.cpp's own quantiser, and in words."""

from __future__ import annotations

import ctypes
import itertools
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import documents, save_model

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.errors import ExportError, PlanError, UserError
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning.budget import bytes_budget, parameters_budget
from cusprun.pruning.budget_text import parse_count, parse_share, parse_size
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.plan_check import checked_plan
from cusprun.pruning.planner import Planner, make_plan
from cusprun.pruning.score import score_model
from cusprun.pruning.store import ImpactStore, open_store
from cusprun.records import UNITS, Corpora, Expert, Plan

sys.path.insert(0, str(Path(__file__).parent.parent / "exporters"))
Scored = tuple[CheckpointIndex, ImpactStore, str]
CORPORA = Corpora(documents(4, 0, "domain"), ())


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return score(save_model(tmp_path_factory.mktemp("scored") / "model"))


def score(folder: Path) -> Scored:
    index = open_checkpoint(folder)
    digest = model_hash(index)
    score_model(index, CORPORA, folder.parent / "store", model_hash=digest, corpus_hash="c")
    return index, open_store(folder.parent / "store"), digest


def plan_for(scored: Scored, budget: Any, **options: Any) -> Plan:
    index, store, digest = scored
    return make_plan(index, store, model_hash=digest, budget=budget, **{"targets": ("gguf:f16",), **options})


@pytest.mark.parametrize("units", [(), UNITS], ids=["default", "with blocks"])
@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_the_written_expert_has_at_most_the_parameters_asked_for(
    scored: Scored, share: float, units: tuple[str, ...], tmp_path: Path
) -> None:
    index = scored[0]
    wanted = round(index.num_parameters * share)
    plan = plan_for(scored, parameters_budget(index, wanted), units=units)
    provenance = Provenance("tiny", "m", "c", Expert("test", {}), {})
    write_expert(index, plan, tmp_path / "e", corpora=CORPORA, provenance=provenance, measure=False)
    written = open_checkpoint(tmp_path / "e").num_parameters
    assert written <= wanted
    assert written >= wanted - 3 * 48 * 6 * 8  # no more than one head of each block below
    assert plan.ratio == plan.block_ratio
    assert plan.budget == f"at most {wanted:,} parameters"
    assert plan.total_ratio == pytest.approx(1 - written / index.num_parameters)


def test_biases_that_a_rule_adds_count(scored: Scored, tmp_path: Path) -> None:
    index = scored[0]
    rule = "variance+bias"
    wishes = PruneWishes(target_params=round(index.num_parameters * 0.8), rule=rule)
    plan = plan_for(scored, wishes.budget(index), rule=rule)
    provenance = Provenance("tiny", "m", "c", Expert("test", {}), {})
    out, settings = tmp_path / "e", wishes.settings(rule, index.family)
    write_expert(index, plan, out, corpora=CORPORA, provenance=provenance, settings=settings, measure=False)
    written = open_checkpoint(out)
    assert "model.layers.0.self_attn.o_proj.bias" in written.tensors
    assert wishes.target_params is not None
    assert 0.95 * wishes.target_params < written.num_parameters <= wishes.target_params


@pytest.mark.parametrize("refit", [True, False])
def test_the_plan_s_share_of_all_parameters_is_that_of_the_written_expert(
    scored: Scored, refit: bool, tmp_path: Path
) -> None:
    """With the refit every projection of a block gets a bias for each of its rows; without, none does."""
    index, store, digest = scored
    rule = "variance+bias"
    wishes = PruneWishes(target_params=round(index.num_parameters * 0.8), rule=rule, refit=refit)
    planner = Planner.of(
        index, store, model_hash=digest, rule=rule, targets=("gguf:f16",), refit=wishes.refit
    )
    plan = planner.plan(wishes.budget(index))
    provenance = Provenance("tiny", "m", "c", Expert("test", {}), {})
    manifest = write_expert(
        index, plan, tmp_path / "e", corpora=CORPORA, provenance=provenance,
        settings=wishes.settings(rule, index.family), measure=False,
    )  # fmt: skip
    written = open_checkpoint(tmp_path / "e")
    assert wishes.target_params is not None
    assert written.num_parameters <= wishes.target_params
    after = plan.after
    biases = after.head_dim * (after.num_attention_heads + 2 * after.num_key_value_heads) + 48
    biases += 2 * after.intermediate_size + 48
    bare = sum(info.num_elements for name, info in written.tensors.items() if not name.endswith(".bias"))
    assert written.num_parameters == bare + (3 * biases if refit else 0)
    assert plan.total_ratio == manifest.plan.total_ratio == 1 - written.num_parameters / index.num_parameters
    assert checked_plan(plan, index, digest, refit=refit) == plan
    # Without biases to pay for, one more channel of each block would be too much.
    one_wider = bare + 3 * 3 * 48 + (3 * (biases + 2) if refit else 0)
    assert one_wider > wishes.target_params or after.intermediate_size == 80


def test_biases_that_a_rule_adds_count_in_the_bytes_of_a_file(tmp_path: Path) -> None:
    from tiny_exports import TinyConfig, make_folder

    from exporters.gguf import export
    from exporters.gguf_size import gguf_size

    config = {"hidden_size": 64, "num_hidden_layers": 4}
    index, store, digest = score(make_folder(tmp_path / "model", TinyConfig("llama", config)))
    rule, target = "variance+bias", ("gguf:f16",)
    wanted = round(gguf_size(index, "f16")(index.shape) * 0.8)
    wishes = PruneWishes(target_bytes=wanted, rule=rule, targets=target)
    plan = make_plan(index, store, model_hash=digest, budget=wishes.budget(index), rule=rule, targets=target)
    provenance = Provenance("tiny", digest, "c", Expert("test", {}), {})
    out, settings = tmp_path / "e", wishes.settings(rule, index.family)
    write_expert(index, plan, out, corpora=CORPORA, provenance=provenance, settings=settings, measure=False)
    cut = open_checkpoint(out)
    assert "model.layers.3.mlp.down_proj.bias" in cut.tensors
    assert gguf_size(cut, "f16")(cut.shape) == wishes.budget(index).measure(plan.after)
    assert export(out, tmp_path / "e.gguf", quant="f16").stat().st_size <= wanted
    bare = replace(wishes, refit=False).budget(index).measure(plan.after)
    assert bare == gguf_size(index, "f16")(plan.after) < gguf_size(cut, "f16")(cut.shape)


def test_a_budget_that_no_legal_shape_keeps_names_the_nearest(scored: Scored) -> None:
    index = scored[0]
    smallest = []
    for kv, per_group in itertools.product((1, 2, 3), (1, 2)):
        block = 48 * (2 * 8 * kv * per_group + 2 * 8 * kv + 3 * 32)
        smallest.append(96 * 48 + 48 + 3 * (block + 2 * 48))
    with pytest.raises(PlanError, match="at most 1,000 parameters") as caught:
        plan_for(scored, parameters_budget(index, 1000), targets=("gguf:q8_0",))
    first, second = sorted(smallest)[:2]
    assert f"{first:,} parameters" in str(caught.value)
    assert f"{second:,} parameters" in str(caught.value)


def test_a_budget_that_asks_for_nothing_names_the_least_cut(scored: Scored) -> None:
    index = scored[0]
    with pytest.raises(PlanError, match="asks for nothing") as caught:
        plan_for(scored, parameters_budget(index, index.num_parameters))
    assert f"{index.num_parameters - 3 * 3 * 48:,} parameters" in str(caught.value)


@pytest.mark.parametrize("number", [0, -5])
def test_budgets_below_one_are_refused(scored: Scored, number: int) -> None:
    with pytest.raises(PlanError, match="at least 1 parameter"):
        parameters_budget(scored[0], number)
    with pytest.raises(PlanError, match="at least 1 byte"):
        bytes_budget(number, "gguf:f16", lambda _shape: 1)


def test_the_largest_shape_within_bytes_is_found(scored: Scored) -> None:
    plan = plan_for(
        scored,
        bytes_budget(101, "gguf:f16", lambda shape: 2 * shape.intermediate_size),
    )
    assert plan.after.intermediate_size == 50
    assert plan.budget == "at most 101 bytes as gguf:f16"


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_size, "80MB", 80_000_000),
        (parse_size, "1.5 gb", 1_500_000_000),
        (parse_size, "700", 700),
        (parse_count, "100M", 100_000_000),
        (parse_count, "1.5B", 1_500_000_000),
        (parse_count, "20k", 20_000),
        (parse_share, "5%", 0.05),
        (parse_share, "0.05", 0.05),
        (parse_share, "150 %", 1.5),
    ],
)
def test_budgets_are_read(parse: Any, text: str, value: float) -> None:
    assert parse(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_size, "80 apples"), (parse_size, "0"), (parse_size, "-5MB"), (parse_size, ""),
        (parse_count, "many"), (parse_count, "100MB"), (parse_count, "0.2"), (parse_count, "1e6"),
        (parse_share, "5"), (parse_share, "0"), (parse_share, "five"), (parse_share, "-1%"),
        (parse_share, "nan"),
    ],
)  # fmt: skip
def test_what_is_no_budget_is_refused(parse: Any, text: str) -> None:
    with pytest.raises(UserError, match="is not"):
        parse(text)


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "aligned": ("llama", {"num_hidden_layers": 9}),
    "tied, four queries to a group": (
        "llama",
        {"num_hidden_layers": 5, "num_attention_heads": 8, "tie_word_embeddings": True},
    ),
    "rows of no multiple of 256": (
        "llama",
        {"num_hidden_layers": 2, "hidden_size": 288, "intermediate_size": 320, "head_dim": 72},
    ),
    "rows of no multiple of 32": (
        "qwen2",
        {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 90, "tie_word_embeddings": True},
    ),
}
TYPES = (
    "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "iq4_xs", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l",
    "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
)  # fmt: skip


@pytest.mark.skipif(not find_spec("llama_cpp"), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_is_the_size_of_what_llama_cpp_writes(name: str, tmp_path: Path) -> None:
    import llama_cpp
    from tiny_exports import TinyConfig, make_folder

    from exporters.gguf import export
    from exporters.gguf_size import gguf_size

    family, config = SHAPES[name]
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = make_folder(tmp_path / "model", TinyConfig(family, wide | config))
    index = open_checkpoint(folder)
    source = export(folder, tmp_path / "f32.gguf", quant="f32")
    assert gguf_size(index, "f32")(index.shape) == pytest.approx(source.stat().st_size, rel=0.01)
    for quant in TYPES:
        options = llama_cpp.llama_model_quantize_default_params()
        options.nthread = 1
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
        out = tmp_path / f"{quant}.gguf"
        names = (str(path).encode() for path in (source, out))
        assert llama_cpp.llama_model_quantize(*names, ctypes.byref(options)) == 0
        size = out.stat().st_size
        estimate = gguf_size(index, quant, importance=False)(index.shape)
        # The metadata is estimated from above: 2 kB, which the smallest of these files feels.
        assert size <= estimate <= size + 2500, quant
        assert estimate == pytest.approx(size, rel=0.02), quant


def test_the_estimate_of_a_cut_is_that_of_the_cut_model(tmp_path: Path) -> None:
    from tiny_exports import TinyConfig, make_folder

    from exporters.gguf_size import gguf_size

    config = {"hidden_size": 64, "num_hidden_layers": 4}
    index, store, digest = score(make_folder(tmp_path / "model", TinyConfig("llama", config)))
    size_of = gguf_size(index, "q8_0")
    for share in (0.75, 0.9):
        wanted = round(size_of(index.shape) * share)
        budget = bytes_budget(wanted, "gguf:q8_0", size_of)
        plan = make_plan(index, store, model_hash=digest, budget=budget, targets=("gguf:q8_0",), units=UNITS)
        out = tmp_path / f"expert-{share}"
        provenance = Provenance("tiny", digest, "c", Expert("test", {}), {})
        write_expert(index, plan, out, corpora=CORPORA, provenance=provenance, measure=False)
        cut = open_checkpoint(out)
        assert gguf_size(cut, "q8_0")(cut.shape) == size_of(plan.after) <= wanted
        from exporters.gguf import export

        written = export(out, tmp_path / f"{share}.gguf", quant="q8_0")
        assert written.stat().st_size <= wanted


def test_an_unknown_type_and_a_model_without_tokenizer_are_refused(scored: Scored) -> None:
    from exporters.gguf_size import gguf_size

    with pytest.raises(ExportError, match="q4_k_m"):
        gguf_size(scored[0], "q4_km")
    with pytest.raises(ExportError, match="tokenizer"):
        gguf_size(scored[0], "q4_k_m")
