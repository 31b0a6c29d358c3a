"""What the refit aims at: the original's stream as an alternative to each projection's own output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_checks import assert_close_entries, short_of_memory
from elsewhere import ELSEWHERE, elsewhere
from tiny import build_model, documents, save_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.codec import Indices, load_json
from cusprun.errors import CorpusError, PlanError, UserError
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning import inputs, refit_walk
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.plan_check import checked_plan
from cusprun.pruning.planner import make_plan
from cusprun.pruning.refit import DEFAULT_RIDGE, RefitSettings
from cusprun.pruning.rewrite import write_weights
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.records import Corpora, Expert, LayerPlan, Manifest, Plan, TokenizedDocument
from cusprun.walk.device import CPU, Device
from cusprun.walk.work_folder import working
from cusprun.walk.workspace import DEFAULT_WORKSPACE

CORPORA = Corpora(documents(8, 0, "domain") + documents(4, 1, "task"), documents(2, 2))
PLAIN = RefitSettings(held_out=0, anchors=0, target="residual")
"""On all calibration documents, and on them alone, with the ridge that is taken where none is chosen."""
STREAMS = ("llama", "llama-untied-biased", "qwen3-sliding-biased", "phi3-partial-rotary")
"""Tied and plain; biases behind projections; windows in some blocks; fused projections and wide heads."""
Text = Sequence[TokenizedDocument]


def planned(index: CheckpointIndex, root: Path, ratio: float = 0.5, **options: Any) -> Plan:
    score_model(index, CORPORA, root / "store", model_hash="m", corpus_hash="c")
    options.setdefault("rule", "mean")
    options.setdefault("units", ())
    store = open_store(root / "store")
    return make_plan(index, store, model_hash="m", ratio=ratio, targets=("gguf:f16",), **options)


def by_hand(plan: Plan, index: CheckpointIndex, layers: Sequence[LayerPlan]) -> Plan:
    return checked_plan(replace(plan, layers=tuple(layers)), index, "m")


def layer_of(heads: Sequence[int], channels: Sequence[int]) -> LayerPlan:
    return LayerPlan(Indices(range(3)), Indices(heads), Indices(channels))


def written(
    index: CheckpointIndex,
    plan: Plan,
    out: Path,
    settings: RefitSettings,
    corpora: Corpora = CORPORA,
    **options: Any,
) -> Path:
    provenance = Provenance("tiny", "m", "c", Expert("test", {}), {})
    options.setdefault("measure", False)
    write_expert(index, plan, out, corpora=corpora, provenance=provenance, settings=settings, **options)
    return out


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def flows(model: Any, texts: Text, *modules: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what flows into and out of modules of a whole model, in one pass: float64 [tokens, width]."""
    # No token sees the padding on its right.
    ids = pad_sequence([torch.tensor(each.token_ids) for each in texts], batch_first=True)
    lengths = torch.tensor([len(each.token_ids) for each in texts])
    real = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    found: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: Any, inputs: Any, given: Any) -> None:
        given = given[0] if isinstance(given, tuple) else given
        found[module] = (inputs[0][real].double(), given[real].double())

    handles = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [found[module] for module in modules]


def usual_unit(channels: torch.Tensor, drift: torch.Tensor) -> float:
    """The mean diagonal of tokens that are far above the median by neither channels nor drift."""
    small = [(rows**2).sum(1) <= 30 * (rows**2).sum(1).median() for rows in (channels, drift)]
    if not drift.any():
        small[1] = torch.ones_like(small[0])
    return float((channels[small[0] & small[1]] ** 2).sum(0).mean())


def solve_in_place(linear: Any, channels: torch.Tensor, target: torch.Tensor, keep: list[int]) -> None:
    """Solve for some columns of a projection by augmented least squares; the others become zero."""
    if len(keep) == linear.in_features:
        return
    weight = linear.weight.data.double()
    if linear.bias is not None:
        target = target - linear.bias.data.double()
    root = (DEFAULT_RIDGE * usual_unit(channels, target - channels @ weight.T)) ** 0.5
    rows = torch.cat([channels[:, keep], root * torch.eye(len(keep), dtype=torch.float64)])
    wanted = torch.cat([target, root * weight[:, keep].T])
    linear.weight.data.zero_()
    linear.weight.data[:, keep] = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T.float()


@pytest.mark.parametrize(
    ("family", "units"), [*((name, ()) for name in STREAMS), ("qwen2", ("block", "ffn_channel"))]
)
def test_the_refit_is_an_independent_one_with_both_whole_models_in_memory(
    family: str, units: tuple[str, ...], tmp_path: Path
) -> None:
    """The original runs beside, and the stream behind each projection is what its columns aim at."""
    index = open_checkpoint(save_model(tmp_path / "model", family))
    plan = planned(index, tmp_path, 0.5, units=units)
    if units:  # the block that goes is one that the original's stream has to pass between two others
        narrow = layer_of(range(6), range(0, 80, 2))
        plan = by_hand(replace(plan, kept_blocks=Indices((0, 2))), index, [narrow, narrow])
    folder = written(index, plan, tmp_path / "expert", PLAIN)
    dense, model = build_model(family), build_model(family)
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in plan.kept_blocks)
    model.config.num_hidden_layers = len(plan.kept_blocks)
    texts, width = CORPORA.calibration, plan.before.head_dim
    originals = [dense.model.layers[number] for number in plan.kept_blocks]
    wanted = flows(dense, texts, *originals, *(each.post_attention_layernorm for each in originals))
    behind_ffn, behind_attention = wanted[: len(originals)], wanted[len(originals) :]
    for number, (kept, block) in enumerate(zip(plan.layers, model.model.layers, strict=True)):
        heads = [head * width + entry for head in kept.query_heads for entry in range(width)]
        attention, ffn = block.self_attn.o_proj, block.mlp.down_proj
        (before, _), (channels, _) = flows(model, texts, block.input_layernorm, attention)
        solve_in_place(attention, channels, behind_attention[number][0] - before, heads)
        (before, _), (channels, _) = flows(model, texts, block.post_attention_layernorm, ffn)
        solve_in_place(ffn, channels, behind_ffn[number][1] - before, list(kept.ffn_channels))
    ours = stock(folder)
    with torch.no_grad():
        for document in CORPORA.held_out:
            ids = torch.tensor([document.token_ids])
            found, expected = (each(ids, use_cache=False).logits for each in (ours, model))
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def doubled() -> Any:
    """A llama of which half the heads and channels are linear combinations of the others."""
    model = build_model("llama")
    for block in model.model.layers:
        queries = block.self_attn.q_proj.weight.data.view(3, 2, 8, 48)
        queries[:, 1] = queries[:, 0]  # heads of one group with one query see the same
        gate, up = (linear.weight.data for linear in (block.mlp.gate_proj, block.mlp.up_proj))
        for first in range(0, 80, 4):  # with one gate, a channel is linear in its row of the other matrix
            gate[first + 1 : first + 4] = gate[first]
            up[first + 2] = 0.5 * up[first] - 1.5 * up[first + 1]
            up[first + 3] = up[first] + 0.7 * up[first + 1]
    return model


@pytest.mark.parametrize("target", ["output", "residual"])
def test_what_is_linear_in_the_survivors_is_recovered_whatever_the_target(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = doubled()
    model.save_pretrained(tmp_path / "model")
    index = open_checkpoint(tmp_path / "model")
    plan = planned(index, tmp_path)
    kept = layer_of((0, 2, 4), [channel for channel in range(80) if channel % 4 < 2])
    plan = by_hand(plan, index, [kept] * 3)
    assert plan.after.intermediate_size == 40
    monkeypatch.setattr(inputs, "DEFAULT_RIDGE", 1e-7)  # a ridge that pulls would be seen
    settings = replace(PLAIN, target=target)
    expert = stock(written(index, plan, tmp_path / "expert", settings))
    none = stock(written(index, plan, tmp_path / "none", RefitSettings(mode="none")))
    with torch.no_grad():
        for document in CORPORA.held_out:
            ids = torch.tensor([document.token_ids])
            wanted = model(ids, use_cache=False, output_hidden_states=True).hidden_states
            found = expert(ids, use_cache=False, output_hidden_states=True).hidden_states
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
            lost = none(ids, use_cache=False, output_hidden_states=True).hidden_states
            assert float((lost[-1] - wanted[-1]).abs().max()) > 0.5


def columns(
    index: CheckpointIndex, layers: Sequence[LayerPlan], settings: RefitSettings
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    with working(DEFAULT_WORKSPACE, "refit", "") as work:
        texts = refit_walk.refit_texts(index, CORPORA.calibration, settings, work)
        with refit_walk.refit_walk(index, texts) as walk:
            for number, layer in enumerate(layers):
                found |= walk.refit_block(number, layer).weights
    return found


@pytest.mark.parametrize(("family", "revise"), [("llama", False), ("llama-untied-biased", True)])
def test_where_nothing_was_cut_before_both_targets_give_the_same_columns(
    family: str, revise: bool, tmp_path: Path
) -> None:
    index = open_checkpoint(save_model(tmp_path / "model", family))
    whole, narrow = layer_of(range(6), range(80)), layer_of(range(6), range(0, 80, 2))
    both = layer_of((0, 3, 5), range(40))
    settings = RefitSettings(anchors=20, revise=revise)
    for layers, same in (
        ((whole, whole, narrow), 1),  # of the FFN of the last block
        ((narrow, whole, whole), 1),
        ((both, whole, both), 1),  # of the attention of the first block, and of nothing behind it
    ):
        output = columns(index, layers, settings)
        residual = columns(index, layers, replace(settings, target="residual"))
        assert output.keys() == residual.keys()
        equal = [torch.equal(output[name], residual[name]) for name in output]
        assert equal == [True] * same + [False] * (len(equal) - same)


def test_the_last_stream_on_the_documents_of_the_fit_is_nearer_to_the_originals(tmp_path: Path) -> None:
    """Where the last projection has as much to make good as the blocks before it have lost."""
    index = open_checkpoint(save_model(tmp_path / "model"))
    plan = planned(index, tmp_path, 0.3)
    original, errors = build_model(), {}
    ((_, wanted),) = flows(original, CORPORA.calibration, original.model.layers[-1])
    for target in ("output", "residual"):
        model = stock(written(index, plan, tmp_path / target, replace(PLAIN, target=target)))
        ((_, found),) = flows(model, CORPORA.calibration, model.model.layers[-1])
        errors[target] = float(((found - wanted) ** 2).sum())
    assert errors["residual"] < 0.9 * errors["output"]


@pytest.mark.parametrize("target", ["residual", "auto"])
def test_a_norm_behind_the_projection_refuses_the_target(target: str, tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model", "gemma3"))
    plan, settings = planned(index, tmp_path, 0.3), RefitSettings(target=target)
    for refuse in (
        lambda: written(index, plan, tmp_path / "expert", settings),
        lambda: PruneWishes(refit_target=target).check_family(index.family, "mean"),
    ):
        with pytest.raises(PlanError, match=r"'residual'.*gemma3_text.*norm.*take the target 'output'"):
            refuse()
    assert not (tmp_path / "expert").exists()
    PruneWishes(refit_target=target, refit=False).check_family(index.family, "mean")
    PruneWishes().check_family(index.family, "mean")
    assert PruneWishes().settings("mean", index.family).target == "output"


def test_names_and_wishes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model"))
    plan = planned(index, tmp_path, 0.3)
    for refuse, words in (
        (lambda: written(index, plan, tmp_path / "e", RefitSettings(target="residue")), "mean 'residual'"),
        (lambda: PruneWishes(refit_target="outputs").check(), "mean 'output'"),
        (lambda: PruneWishes(refit_target="auto", refit=False).check(), "or refit"),
        (lambda: PruneWishes(refit_target="auto", granularity="neuron").check(), "the refit target"),
        (lambda: PruneWishes(refit_target="auto").check_family(index.family, "variance+bias"), "biases"),
    ):
        with pytest.raises(UserError, match=words):
            refuse()


def test_auto_keeps_the_target_whose_expert_predicts_documents_set_apart_better(tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model"))
    plan = planned(index, tmp_path, 0.3)
    settings = RefitSettings(held_out=0.25, anchors=10, target="auto")
    folder = written(index, plan, tmp_path / "auto", settings)
    manifest = load_json(Manifest, folder / "cusprun.json")
    told = manifest.measurements["refit_target"]
    apart = [CORPORA.calibration[position] for position in (3, 7, 11)]  # every fourth of each dimension
    fit = Corpora(tuple(each for each in CORPORA.calibration if each not in apart), ())
    wanted = {}
    for target in ("output", "residual"):
        trial = written(index, plan, tmp_path / f"trial-{target}", replace(settings, target=target), fit)
        wanted[target] = stock_perplexity(stock(trial), apart)
    assert told["perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert told["documents"] == len(apart)
    assert told["predicted_tokens"] == sum(len(each.token_ids) - 1 for each in apart)
    best = min(wanted, key=wanted.__getitem__)
    assert (told["asked"], told["chosen"], manifest.refit_target) == ("auto", best, best)
    assert not (folder / "trial").exists()
    same = written(index, plan, tmp_path / "same", replace(settings, target=best))
    weights = [(each / "model.safetensors").read_bytes() for each in (folder, same)]
    assert weights[0] == weights[1]
    assert "refit_target" not in load_json(Manifest, same / "cusprun.json").measurements


def stock_perplexity(model: Any, texts: Text) -> float:
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for document in texts:
            ids = torch.tensor([document.token_ids])
            logits = model(ids, use_cache=False).logits[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += len(document.token_ids) - 1
    return math.exp(nats / tokens)


def test_auto_needs_a_document_to_choose_on(tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model"))
    plan, one = planned(index, tmp_path, 0.3), Corpora(documents(1), ())
    with pytest.raises(CorpusError, match=r"set apart.*add documents"):
        written(index, plan, tmp_path / "expert", RefitSettings(target="auto"), one)
    assert not (tmp_path / "expert").exists()


@pytest.mark.parametrize("short", [None, "refit"])
def test_the_dense_stream_and_its_drift_are_on_the_device(
    short: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the device has no room to solve, on the host."""
    index = open_checkpoint(save_model(tmp_path / "model", "llama-untied-biased"))
    plan = planned(index, tmp_path, 0.4, rule="surgeon")
    settings = RefitSettings(revise=True, anchors=20, target="residual")
    made = {}
    places: tuple[tuple[str, Device], ...] = (("host", CPU), ("away", ELSEWHERE))
    for name, device in places:
        (tmp_path / name).mkdir()
        if short and device is ELSEWHERE:
            short_of_memory(monkeypatch, inputs, short, times=1)
        with elsewhere() as away:
            made[name] = write_weights(
                index, plan, tmp_path / name, CORPORA.calibration, settings=settings, device=device
            )
        assert (away.operations > 500) is (device is ELSEWHERE)
    assert made["host"].layers == made["away"].layers
    assert_close_entries(tmp_path / "host", tmp_path / "away")
