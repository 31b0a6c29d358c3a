"""Single neurons from score to folder: against the stock model, sets and the written weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, build_model, documents, save_model
from transformers import AutoModelForCausalLM

from cusprun.checkpoint.index import CheckpointIndex, model_hash, open_checkpoint
from cusprun.codec import load_json
from cusprun.errors import CorpusError, PlanError, UserError
from cusprun.families import families
from cusprun.pipeline.neurons import prune_neurons, scored_neurons
from cusprun.pipeline.opening import OpenModel
from cusprun.pipeline.wishes import PruneWishes
from cusprun.pruning.impact import channel_impacts
from cusprun.pruning.neuron_impact import EXACT_TOKENS, query_and_key_impacts, value_and_output_impacts
from cusprun.pruning.neuron_plan import choose_neurons, make_neuron_plan, owners_of, require_removal
from cusprun.pruning.neuron_score import observed_attention, score_neurons
from cusprun.pruning.rules import RULES
from cusprun.pruning.score import score_model
from cusprun.pruning.store import ImpactStore, open_store
from cusprun.pruning.store_layout import neuron_counts, store_bytes
from cusprun.records import NEURONS, Corpora, Expert, NeuronManifest, Shape, TokenizedDocument

DOCUMENTS = documents(4, 0, "domain") + documents(3, 1, "language")
CORPORA = Corpora(DOCUMENTS, documents(3, 2, "domain"))
EXPERT = Expert(name="tiny", dimensions={"domain": (), "language": ()})


class Scored:
    """A tiny model with a store of its neurons."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.index: CheckpointIndex = open_checkpoint(save_model(folder / "model", family))
        self.digest = model_hash(self.index)
        score_neurons(
            self.index, CORPORA, folder / "neurons", model_hash=self.digest, corpus_hash="c", exact=True
        )
        self.store: ImpactStore = open_store(folder / "neurons")
        self.opened = OpenModel(self.index, self.digest, "tiny")

    def plan(self, **options: object):  # type: ignore[no-untyped-def]
        wishes = {"ratio": 0.25, **options}
        return make_neuron_plan(self.index, self.store, model_hash=self.digest, **wishes)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=list(FAMILIES))
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return Scored(request.param, tmp_path_factory.mktemp("neurons"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return Scored("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "cache"))


def test_scores_are_the_closed_forms_on_the_stock_model(scored: Scored) -> None:
    """Each document alone through the whole stock model in float64, against batches through the walk."""
    layer = 1
    model = build_model(scored.family).double()
    config, block = model.config, model.model.layers[layer]
    modules = families()[config.model_type].modules
    block.self_attn.config = copy.deepcopy(config)
    inputs: dict[str, torch.Tensor] = {}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: inputs.update({name: args[0]})
        )
    arrays = scored.store.layer(layer)
    for row, document in enumerate(DOCUMENTS):
        mask = torch.ones(1, len(document.token_ids), dtype=torch.bool)
        with torch.no_grad(), observed_attention(block, modules) as seen:
            model(torch.tensor([document.token_ids]), use_cache=False)
        queries, keys = query_and_key_impacts(
            seen.query, seen.key, seen.mask, mask.sum(dim=1), seen.scaling, seen.rotary_dim
        )
        values, columns = value_and_output_impacts(
            inputs["self_attn.o_proj"],
            block.self_attn.o_proj.weight.detach(),
            scored.index.shape.head_dim,
            scored.index.shape.queries_per_group,
        )
        channels = channel_impacts(inputs["mlp.down_proj"], mask, block.mlp.down_proj.weight.detach())
        for kind, wanted in zip(NEURONS, (queries, keys, values, columns, channels), strict=True):
            torch.testing.assert_close(
                arrays[kind][row].double(), wanted[0], rtol=1e-3, atol=float(wanted.max()) * 1e-4
            )


def test_rows_of_a_pair_share_their_impact_and_leave_together(scored: Scored) -> None:
    shape, rotary = scored.index.shape, scored.store.infos[0].rotary_dim
    wanted = 8 if scored.family == "phi3-partial-rotary" else shape.head_dim
    assert rotary == wanted
    for rule in [f"{name}:0.8" if entry.takes_argument else name for name, entry in RULES.items()]:
        if rule in ("variance+bias", "surgeon"):
            continue
        for layer in scored.plan(rule=rule).layers:
            for kind in ("query_row", "key_row"):
                gone = set(layer.removed[kind])
                for row in gone:
                    head, channel = divmod(row, shape.head_dim)
                    if channel < rotary:
                        partner = (channel + rotary // 2) % rotary
                        assert head * shape.head_dim + partner in gone


def zeroed_by_hand(scored: Scored, layers: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """The stock model's weights with the neurons set to zero module by module."""
    model = build_model(scored.family)
    shape = scored.index.shape
    heads, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    with torch.no_grad():
        for block, gone in zip(model.model.layers, layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            rows = [(gone["query_row"], "q", 0), (gone["key_row"], "k", heads)]
            rows.append((gone["value_row"], "v", heads + kv))
            for chosen, letter, start in rows:
                if hasattr(attention, "qkv_proj"):
                    attention.qkv_proj.weight[[start + row for row in chosen]] = 0
                else:
                    for parameter in getattr(attention, f"{letter}_proj").parameters():
                        parameter[chosen] = 0
            attention.o_proj.weight[:, gone["output_column"]] = 0
            mlp.down_proj.weight[:, gone["ffn_channel"]] = 0
            if hasattr(mlp, "gate_up_proj"):
                for start in (0, shape.intermediate_size):
                    mlp.gate_up_proj.weight[[start + row for row in gone["ffn_channel"]]] = 0
            else:
                for parameter in (*mlp.gate_proj.parameters(), *mlp.up_proj.parameters()):
                    parameter[gone["ffn_channel"]] = 0
    return dict(model.state_dict())


def test_the_folder_holds_the_model_with_exactly_these_neurons_zero(scored: Scored, tmp_path: Path) -> None:
    manifest = prune_neurons(scored.opened, EXPERT, CORPORA, tmp_path / "out", ratio=0.3, rule="paper")
    assert load_json(NeuronManifest, tmp_path / "out" / "cusprun.json") == manifest
    gone = [{kind: list(chosen) for kind, chosen in layer.removed.items()} for layer in manifest.plan.layers]
    for counts in manifest.counts:
        for kind, total in neuron_counts(scored.index.shape).items():
            assert round(0.3 * total) - 1 <= counts[kind] <= round(0.3 * total)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = zeroed_by_hand(scored, gone)
    found = dict(loaded.state_dict())
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].equal(tensor), name
    before = dict(build_model(scored.family).named_parameters())
    changed = sum(int((dict(loaded.named_parameters())[n] != p).sum()) for n, p in before.items())
    assert changed == manifest.zeroed_parameters
    assert manifest.parameters == scored.index.num_parameters


def test_the_paper_rule_zeroes_the_intersection_of_the_irrelevant_sets(scored: Scored) -> None:
    for number, layer in enumerate(scored.plan(rule="paper").layers):
        impacts = scored.store.layer(number)
        for kind, threshold in layer.thresholds.items():
            irrelevant = [
                {unit for unit in range(impacts[kind].shape[1])
                 if all(float(impacts[kind][row, unit]) <= threshold for row in rows)}
                for rows in scored.store.dimensions.values()
            ]  # fmt: skip
            assert set(layer.removed[kind]) == set.intersection(*irrelevant)


def test_removing_the_relevant_hurts_more_than_random_and_random_more_than_the_irrelevant(
    tmp_path: Path,
) -> None:
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):  # trained models have strong and weak rows; random ones do not
            parameter.data *= torch.randn(len(parameter), 1, generator=generator).exp() / 2
    model.save_pretrained(tmp_path / "model")
    index = open_checkpoint(tmp_path / "model")
    opened = OpenModel(index, model_hash(index), "tiny")
    divergences = []
    for name, rule, relevant in (("a", "paper", False), ("b", "random", False), ("c", "paper", True)):
        manifest = prune_neurons(
            opened, EXPERT, CORPORA, tmp_path / name, ratio=0.25, rule=rule, relevant=relevant
        )
        divergences.append(manifest.measurements["held_out"]["mean_kl_divergence_nats"])
    assert divergences == sorted(divergences)
    assert divergences[0] < divergences[1] / 2


@settings(deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(0, 24), rotary=st.sampled_from([0, 4, 8]))
def test_chosen_neurons_have_the_lowest_scores_and_are_as_many_as_fit(
    seed: int, count: int, rotary: int
) -> None:
    shape = FakeShape()
    owners = owners_of("query_row", 24, shape, rotary)  # type: ignore[arg-type]
    scores = torch.rand(int(owners.max()) + 1, generator=torch.Generator().manual_seed(seed))[owners]
    lowest, _ = choose_neurons(scores, owners, count, False)
    highest, _ = choose_neurons(-scores, owners, count, True)
    assert lowest == highest
    assert count - 1 <= len(lowest) <= count
    kept = [row for row in range(24) if row not in lowest]
    if lowest and kept:
        assert float(scores[list(lowest)].max()) <= float(scores[kept].min())
    assert not {int(owners[row]) for row in lowest} & {int(owners[row]) for row in kept}


class FakeShape:
    head_dim = 8


def test_long_documents_are_estimated_close_to_the_exact_impacts(tmp_path: Path) -> None:
    index = open_checkpoint(save_model(tmp_path / "model", max_position_embeddings=256))
    ids = torch.randint(0, VOCAB, (2, EXACT_TOKENS + 40), generator=torch.Generator().manual_seed(0))
    corpora = Corpora(
        tuple(TokenizedDocument("domain", str(n), tuple(r.tolist())) for n, r in enumerate(ids)), ()
    )
    stores = []
    for exact in (False, True):
        folder = tmp_path / f"exact-{exact}"
        score_neurons(index, corpora, folder, model_hash="m", corpus_hash="c", exact=exact)
        stores.append(open_store(folder).layer(1))
    for kind in NEURONS:
        if kind in ("query_row", "key_row"):
            assert not stores[0][kind].equal(stores[1][kind])
            assert float((stores[0][kind] / stores[1][kind] - 1).abs().median()) < 0.2
        else:
            assert stores[0][kind].equal(stores[1][kind])


def test_finished_scores_are_found_again_and_fit_the_announced_size(llama: Scored) -> None:
    first = scored_neurons(llama.opened, EXPERT, CORPORA)
    made = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert scored_neurons(llama.opened, EXPERT, CORPORA) == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == made
    announced = store_bytes(llama.index.shape, len(DOCUMENTS), "neuron")
    written = sum(file.stat().st_size for file in first.glob("*.safetensors"))
    assert announced <= written < announced + 2000 * llama.index.shape.num_hidden_layers


def test_a_ratio_of_no_neuron_is_refused_with_the_smallest_that_does_something(
    llama: Scored, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"the smallest that sets one to zero is 0\.\d+$") as caught:
        prune_neurons(llama.opened, EXPERT, CORPORA, tmp_path / "o", ratio=0.004, rule="paper")
    assert not (tmp_path / "cache").exists()  # before any work
    smallest = float(str(caught.value).rpartition(" ")[2])
    assert smallest > 0.5 / 80  # half of one of the 80 FFN channels rounds to none
    removed = [sum(map(len, layer.removed.values())) for layer in llama.plan(ratio=smallest).layers]
    assert removed == [1, 1, 1]
    with pytest.raises(PlanError, match="not one neuron"):
        llama.plan(ratio=0.97 * smallest)


@given(width=st.integers(1, 20_000))
def test_the_smallest_ratio_removes_one_for_every_width(width: int) -> None:
    shape = Shape(1, 1, width, 1, 1, 1, 1, True)
    ratio = 1e-9
    with pytest.raises(PlanError) as caught:
        require_removal(ratio, shape)
    smallest = float(str(caught.value).rpartition(" ")[2])
    require_removal(smallest, shape)
    assert round(smallest * width) == 1
    assert 0.5 < smallest * width < 0.56


def test_the_granularity_decides_which_ratios_and_rules_may_be(llama: Scored) -> None:
    PruneWishes(granularity="neuron", ratio=0.95).check()
    with pytest.raises(PlanError, match="block parameters"):
        PruneWishes(ratio=0.95).check()
    with pytest.raises(PlanError, match="matrix' neurons"):
        PruneWishes(granularity="neuron", ratio=1.0).check()
    for rule, words in (("surgeon", "leaves the choice"), ("variance+bias", "rows of Q and K")):
        with pytest.raises(PlanError, match=words):
            PruneWishes(granularity="neuron", rule=rule).check()
        PruneWishes(rule=rule).check()


def test_what_cannot_be_is_refused(llama: Scored, tmp_path: Path) -> None:
    for ratio in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(PlanError, match="outside"):
            llama.plan(ratio=ratio)
    with pytest.raises(PlanError, match="another model"):
        make_neuron_plan(llama.index, llama.store, model_hash="other", ratio=0.5)
    with pytest.raises(PlanError, match="rows of Q and K"):
        llama.plan(rule="variance+bias")
    with pytest.raises(PlanError, match="rows of Q and K"):
        prune_neurons(llama.opened, EXPERT, CORPORA, tmp_path / "o", ratio=0.2, rule="variance+bias")
    assert not (tmp_path / "cache").exists()  # before any work
    with pytest.raises(UserError, match="did you mean 'paper'"):
        llama.plan(rule="papre")
    with pytest.raises(PlanError, match="leaves the choice to the refit"):
        prune_neurons(llama.opened, EXPERT, CORPORA, tmp_path / "o", ratio=0.2, rule="surgeon")
    assert not (tmp_path / "cache").exists()
    score_model(llama.index, CORPORA, tmp_path / "units", model_hash=llama.digest, corpus_hash="c")
    with pytest.raises(PlanError, match="whole units"):
        make_neuron_plan(llama.index, open_store(tmp_path / "units"), model_hash=llama.digest, ratio=0.5)
    same = tuple(TokenizedDocument("domain", "one text", (1, 2, 3, 4)) for _ in range(3))
    with pytest.raises(CorpusError, match="same text"):
        prune_neurons(llama.opened, EXPERT, Corpora(same, ()), tmp_path / "o", ratio=0.2, rule="paper")
    with pytest.raises(CorpusError, match="no calibration documents"):
        score_neurons(llama.index, Corpora((), ()), tmp_path / "p", model_hash="m", corpus_hash="c")
    assert not (tmp_path / "o").exists()
