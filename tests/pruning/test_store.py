"""The store against a direct computation from all tokens of the stock model; stores joined equal one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, build_model, documents, save_model

from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.codec import dump_json, load_json
from cusprun.errors import PlanError, StoreError
from cusprun.pruning.planner import make_plan
from cusprun.pruning.rules import RULES, score_units
from cusprun.pruning.score import score_model
from cusprun.pruning.store import ImpactStore, open_store
from cusprun.pruning.store_layout import STORE_FILE, StoreInfo, layer_file, unit_counts
from cusprun.records import UNITS, Corpora, TokenizedDocument

LAYER = 1
DOCUMENTS = documents(4, 0, "domain") + documents(3, 1, "language")


def score(folder: Path, model: Path, texts: tuple[TokenizedDocument, ...], name: str) -> Path:
    index = open_checkpoint(model)
    return score_model(
        index, Corpora(texts, ()), folder / name, model_hash=model_hash(index), corpus_hash=name
    )


@pytest.fixture(scope="module", params=list(FAMILIES))
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("store")
    save_model(root / "model", request.param)
    score(root, root / "model", DOCUMENTS, "whole")
    return request.param, root


class Seen:
    """What the stock model computes at every token of every document, in float64."""

    def __init__(self, family: str) -> None:
        self.model = build_model(family).double()
        self.block = self.model.model.layers[LAYER]
        rows: dict[str, list[torch.Tensor]] = {"mlp": [], "attention": [], "before": [], "after": []}

        def keep(name: str) -> object:
            return lambda _module, args: rows[name].append(args[0][0])

        self.block.mlp.down_proj.register_forward_pre_hook(keep("mlp"))
        self.block.self_attn.o_proj.register_forward_pre_hook(keep("attention"))
        self.block.register_forward_pre_hook(keep("before"))
        self.model.model.layers[LAYER + 1].register_forward_pre_hook(keep("after"))
        with torch.no_grad():
            for document in DOCUMENTS:
                self.model(torch.tensor([document.token_ids]))
        self.tokens = {name: torch.cat(parts) for name, parts in rows.items()}
        self.rows = rows


def test_fluctuation_is_the_weighted_variance_over_all_tokens(scored: tuple[str, Path]) -> None:
    family, root = scored
    store, seen = open_store(root / "whole"), Seen(family)
    config = seen.model.config
    head_dim = seen.block.self_attn.head_dim

    def per_channel(name: str, projection: torch.nn.Linear) -> torch.Tensor:
        variances = seen.tokens[name].var(dim=0, correction=0)
        return variances * projection.weight.detach().norm(dim=0).square()

    heads = per_channel("attention", seen.block.self_attn.o_proj).view(-1, head_dim).mean(dim=1)
    increment = seen.tokens["after"] - seen.tokens["before"]
    relative = increment / seen.tokens["after"].norm(dim=1, keepdim=True)
    wanted = {
        "ffn_channel": per_channel("mlp", seen.block.mlp.down_proj),
        "query_head": heads,
        "kv_group": heads.view(config.num_key_value_heads, -1).mean(dim=1),
        "block": relative.var(dim=0, correction=0).sum().unsqueeze(0),
    }
    assert set(wanted) == set(UNITS)
    for kind, values in wanted.items():
        found = store.evidence(LAYER, kind).fluctuation
        torch.testing.assert_close(found, values, rtol=1e-3, atol=float(values.max()) * 1e-4)


def test_block_impact_is_relative_at_each_token(scored: tuple[str, Path]) -> None:
    family, root = scored
    seen = Seen(family)
    found = open_store(root / "whole").evidence(LAYER, "block").impacts
    for row, (before, after) in enumerate(zip(seen.rows["before"], seen.rows["after"], strict=True)):
        ratios = (after - before).norm(dim=1) / after.norm(dim=1)
        assert float(found[row, 0]) == pytest.approx(float(ratios.square().sum().sqrt()), rel=1e-4)


def test_magnitude_is_the_norm_of_all_weights_of_a_unit(scored: tuple[str, Path]) -> None:
    """A unit's squared weights are what the block's total loses when the unit's weights are set to zero."""
    family, root = scored
    store = open_store(root / "whole")
    block = build_model(family).model.layers[LAYER]
    attention, mlp, shape = block.self_attn, block.mlp, store.shape
    dim, per_group = shape.head_dim, shape.queries_per_group
    q_width, kv_width = shape.num_attention_heads * dim, shape.num_key_value_heads * dim

    def rows_of(unit: str, number: int) -> list[torch.Tensor]:
        found = []
        if unit == "ffn_channel":
            for name in ("gate_proj", "up_proj"):
                if hasattr(mlp, name):
                    found += [parameter[number] for parameter in getattr(mlp, name).parameters()]
            if hasattr(mlp, "gate_up_proj"):
                found += [mlp.gate_up_proj.weight[number + k * shape.intermediate_size] for k in (0, 1)]
            return [*found, mlp.down_proj.weight[:, number]]
        places = {"q": (number, 0), "k": (number, q_width), "v": (number, q_width + kv_width)}
        for letter in ("q",) if unit == "query_head" else ("k", "v"):
            head, start = places[letter]
            if hasattr(attention, "qkv_proj"):
                first = start + head * dim
                found += [parameter[first : first + dim] for parameter in attention.qkv_proj.parameters()]
            else:
                projection = getattr(attention, f"{letter}_proj")
                found += [p[head * dim : (head + 1) * dim] for p in projection.parameters()]
        if unit == "query_head":
            return [*found, attention.o_proj.weight[:, number * dim : (number + 1) * dim]]
        for head in range(number * per_group, (number + 1) * per_group):
            found += rows_of("query_head", head)
        return found

    totals = {}
    for unit, count in unit_counts(shape).items():
        if unit == "block":
            continue
        norms = [
            sum(float(w.detach().double().square().sum()) for w in rows_of(unit, number)) ** 0.5
            for number in range(count)
        ]
        found = store.evidence(LAYER, unit).magnitude
        torch.testing.assert_close(found, torch.tensor(norms, dtype=torch.float64), rtol=1e-6, atol=0)
        totals[unit] = sum(norm**2 for norm in norms)
    whole = float(store.evidence(LAYER, "block").magnitude)
    assert whole == pytest.approx((totals["ffn_channel"] + totals["kv_group"]) ** 0.5)


@pytest.mark.parametrize("rule", [f"{n}:0.8" if e.takes_argument else n for n, e in RULES.items()])
def test_stores_joined_are_one_store_of_all_documents(scored: tuple[str, Path], rule: str) -> None:
    _, root = scored
    parts = [root / "first", root / "second"]
    if not parts[0].exists():
        score(root, root / "model", DOCUMENTS[:4], "first")
        score(root, root / "model", DOCUMENTS[4:], "second")
    whole, joined = open_store(root / "whole"), open_store(parts)
    assert joined.documents == whole.documents
    for kind in UNITS:
        ours, theirs = joined.evidence(LAYER, kind, seed=3), whole.evidence(LAYER, kind, seed=3)
        assert ours.dimensions == theirs.dimensions
        torch.testing.assert_close(score_units(rule, ours), score_units(rule, theirs), rtol=1e-4, atol=1e-6)


def test_seeds_differ_between_blocks_and_kinds(scored: tuple[str, Path]) -> None:
    store = open_store(scored[1] / "whole")
    seeds = {store.evidence(layer, kind, seed).seed for layer in (0, 1) for kind in UNITS for seed in (0, 1)}
    assert len(seeds) == 2 * len(UNITS) * 2


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two stores of one small model."""
    model = save_model(tmp_path / "model", num_hidden_layers=2)
    return score(tmp_path, model, DOCUMENTS[:4], "a"), score(tmp_path, model, DOCUMENTS[4:], "b")


def changed(folder: Path, **changes: object) -> None:
    info = load_json(StoreInfo, folder / STORE_FILE)
    dump_json(replace(info, **changes), folder / STORE_FILE)  # type: ignore[arg-type]


def test_stores_of_another_model_other_tokens_or_granularity_are_not_joined(pair: tuple[Path, Path]) -> None:
    _, second = pair
    assert len(open_store(pair).documents) == len(DOCUMENTS)
    before = load_json(StoreInfo, second / STORE_FILE)
    shared = replace(before.documents[0], text_hash=DOCUMENTS[0].text_hash, num_tokens=99)
    for changes, reason in (
        ({"model_hash": "other"}, "different models"),
        ({"documents": (shared, *before.documents[1:])}, "other tokens"),
        ({"granularity": "neuron"}, "each neuron"),
        ({"granularity": "neurone"}, "did you mean 'neuron'"),
        ({"documents": ()}, "no document"),
    ):
        changed(second, **changes)
        with pytest.raises(StoreError, match=reason):
            open_store(pair)
        dump_json(before, second / STORE_FILE)
    with pytest.raises(StoreError, match="no store"):
        open_store([])


def test_a_damaged_store_is_refused(pair: tuple[Path, Path]) -> None:
    first, _ = pair
    with pytest.raises(StoreError, match="kind of unit"):
        open_store(first).evidence(0, "ffn")
    file = first / layer_file(1)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    for read in (ImpactStore.layer, lambda store, layer: store.evidence(layer, "block")):
        with pytest.raises(StoreError, match="layer-00001"):
            read(open_store(first), 1)
    file.write_bytes(whole)
    changed(first, documents=load_json(StoreInfo, first / STORE_FILE).documents[:3])
    with pytest.raises(StoreError, match="does not fit"):
        open_store(first).layer(1)


def test_a_description_that_no_model_can_have_is_refused(pair: tuple[Path, Path]) -> None:
    first, _ = pair
    before = load_json(StoreInfo, first / STORE_FILE)

    def document(**values: object) -> dict[str, object]:
        return {"documents": (replace(before.documents[0], **values), *before.documents[1:])}  # type: ignore[arg-type]

    for changes, reason in (
        ({"shape": replace(before.shape, intermediate_size=-80)}, "intermediate_size is -80"),
        ({"shape": replace(before.shape, num_hidden_layers=10**20)}, "num_hidden_layers is 1000"),
        ({"shape": replace(before.shape, num_key_value_heads=4)}, "do not divide"),
        ({"rotary_dim": 9}, "rotary_dim is 9"),
        (document(num_tokens=0), r"documents\[0\].num_tokens is 0"),
        (document(num_tokens=10**19), "num_tokens is 1000"),
        (document(dimension="domian"), "did you mean 'domain'"),
    ):
        changed(first, **changes)
        with pytest.raises(StoreError, match=reason):
            open_store(first)
        dump_json(before, first / STORE_FILE)


def test_a_file_of_another_block_or_another_store_is_refused(pair: tuple[Path, Path]) -> None:
    """Same names, shapes and types: only the header says that it is not this block's."""
    first, second = pair
    files = [first / layer_file(layer) for layer in (0, 1)]
    whole = [file.read_bytes() for file in files]
    open_store(first).check_files()
    for file, bytes_ in zip(files, reversed(whole), strict=True):
        file.write_bytes(bytes_)
    with pytest.raises(StoreError, match=r"layer-00000.*does not fit"):
        open_store(first).layer(0)
    for file, bytes_ in zip(files, whole, strict=True):
        file.write_bytes(bytes_)
    other = score(second.parent, second.parent / "model", documents(4, 7), "other")
    files[1].write_bytes((other / layer_file(1)).read_bytes())
    with pytest.raises(StoreError, match=r"layer-00001.*does not fit"):
        open_store(first).check_files()


def test_the_same_text_with_other_tokens_is_refused_also_when_there_are_as_many(
    pair: tuple[Path, Path],
) -> None:
    first, _ = pair
    text = DOCUMENTS[0]
    other = replace(text, token_ids=(text.token_ids[0] ^ 1, *text.token_ids[1:]))
    third = score(first.parent, first.parent / "model", (other,), "third")
    with pytest.raises(StoreError, match="other tokens"):
        open_store([first, third])
    store = open_store(first)
    store.require_tokens(DOCUMENTS)
    with pytest.raises(StoreError, match="other tokens"):
        store.require_tokens([other])


def test_a_store_made_with_another_tokenizer_is_refused(pair: tuple[Path, Path]) -> None:
    first, second = pair
    model = first.parent / "model"
    index, digest = open_checkpoint(model), model_hash(open_checkpoint(model))
    (model / "tokenizer.json").write_text("{}")
    one = score(first.parent, model, DOCUMENTS[:4], "one")
    open_store(one).require_model(index, digest)
    (model / "tokenizer.json").write_text("{ }")
    with pytest.raises(StoreError, match="other tokens: the tokenizer"):
        open_store(one).require_model(index, digest)
    two = score(first.parent, model, DOCUMENTS[4:], "two")
    with pytest.raises(StoreError, match="another tokenizer"):
        open_store([one, two])
    open_store([one, second]).require_tokens(DOCUMENTS)  # one was scored without a tokenizer


def test_documents_that_several_stores_hold_count_once(pair: tuple[Path, Path]) -> None:
    first, second = pair
    model = first.parent / "model"
    middle = score(first.parent, model, DOCUMENTS[2:6], "middle")
    whole = score(first.parent, model, DOCUMENTS, "all")
    joined, wanted = open_store([first, middle, second, whole]), open_store(whole)
    assert joined.shares_documents
    assert not open_store(pair).shares_documents
    assert joined.documents == wanted.documents
    for kind in UNITS:
        ours, theirs = joined.evidence(1, kind), wanted.evidence(1, kind)
        torch.testing.assert_close(ours.impacts, theirs.impacts, rtol=1e-4, atol=1e-5)
        assert ours.tokens.equal(theirs.tokens)
        assert ours.dimensions == theirs.dimensions
        assert bool(ours.fluctuation.isnan().all())
    index = open_checkpoint(model)
    options = {"model_hash": model_hash(index), "ratio": 0.25, "targets": ("gguf:f16",)}
    made = make_plan(index, joined, rule="mean", **options)  # type: ignore[arg-type]
    assert made.layers == make_plan(index, wanted, rule="mean", **options).layers  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="share documents, which the rule 'variance"):
        make_plan(index, joined, rule="variance+bias", **options)  # type: ignore[arg-type]
    make_plan(index, open_store(pair), rule="variance+bias", **options)  # type: ignore[arg-type]


def test_the_same_text_in_two_dimensions_counts_for_both(pair: tuple[Path, Path]) -> None:
    first, _ = pair
    text = replace(DOCUMENTS[0], dimension="task")
    third = score(first.parent, first.parent / "model", (text,), "third")
    store = open_store([first, third])
    assert not store.shares_documents
    assert len(store.dimensions["domain"]) == 4
    assert len(store.dimensions["task"]) == 1


def test_a_store_given_twice_is_refused(pair: tuple[Path, Path]) -> None:
    first, second = pair
    with pytest.raises(StoreError, match="given twice"):
        open_store([first, second, second / ".." / first.name])


def test_a_store_of_another_shape_is_refused_although_its_hash_is_the_model_s(
    pair: tuple[Path, Path],
) -> None:
    first, _ = pair
    index = open_checkpoint(first.parent / "model")
    changed(first, shape=replace(index.shape, intermediate_size=40))
    with pytest.raises(PlanError, match="another model"):
        make_plan(index, open_store(first), model_hash=model_hash(index), ratio=0.25)
