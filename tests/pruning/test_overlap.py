"""Overlaps against sets counted one by one, chance against simulation, stores told apart, bad input."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import cusprun as api
from cusprun.codec import dump_json, from_plain, load_json, to_plain
from cusprun.errors import CorpusError, OutputError, StoreError, UserError
from cusprun.pruning.overlap import (
    OverlapReport,
    chance_jaccard,
    irrelevant_count,
    irrelevant_set,
    kind_overlap,
    layer_groups,
    layer_overlap,
)
from cusprun.pruning.store_layout import StoredDocument, StoreInfo, array_shapes, layer_bytes, layer_file
from cusprun.records import Shape

SHAPE = Shape(3, 24, 40, 6, 3, 4, 96, True)


def write_store(
    folder: Path,
    dimensions: dict[str, int],
    *,
    expert: str = "expert",
    seed: int = 0,
    shape: Shape = SHAPE,
    granularity: str = "unit",
) -> Path:
    """A store of random impacts with so many documents of each dimension."""
    documents = [
        StoredDocument(dimension, f"{expert}-{dimension}-{seed}-{number}", 5 + number, "tokens")
        for dimension, count in dimensions.items()
        for number in range(count)
    ]
    random.Random(seed).shuffle(documents)
    folder.mkdir(parents=True)
    info = StoreInfo("model", f"corpus-{seed}", expert, shape, tuple(documents), "0", granularity)
    dump_json(info, folder / "store.json")
    generator = torch.Generator().manual_seed(seed)
    for layer in range(shape.num_hidden_layers):
        arrays = {
            name: torch.rand(size, generator=generator).to(torch.float64 if "." in name else torch.float32)
            for name, size in array_shapes(shape, len(documents), granularity).items()
        }
        (folder / layer_file(layer)).write_bytes(layer_bytes(info, layer, arrays))
    return folder


def lowest(scores: Sequence[float], count: int) -> set[int]:
    """The units with the lowest scores; of equals, the later ones."""
    return set(sorted(range(len(scores)), key=lambda unit: (scores[unit], -unit))[:count])


def jaccard(one: set[int], other: set[int]) -> float:
    return len(one & other) / len(one | other)


@given(
    scores=st.lists(st.lists(st.integers(0, 6).map(float), min_size=12, max_size=12), min_size=2, max_size=4),
    ratio=st.floats(0.01, 0.99),
)
def test_overlaps_are_those_of_sets_counted_one_by_one(scores: list[list[float]], ratio: float) -> None:
    count = irrelevant_count(12, ratio)
    assert 1 <= count <= 11
    assert abs(count - 12 * ratio) <= 1
    brute = [lowest(row, count) for row in scores]
    found = torch.stack([irrelevant_set(torch.tensor(row), ratio) for row in scores])
    assert [set(torch.nonzero(row).flatten().tolist()) for row in found] == brute
    overlap = layer_overlap(found, 7)
    assert overlap.layer == 7
    assert overlap.jaccard == pytest.approx([jaccard(*pair) for pair in itertools.combinations(brute, 2)])
    assert overlap.intersection == pytest.approx(len(set.intersection(*brute)) / 12)


@pytest.mark.parametrize(("units", "irrelevant"), [(3, 1), (9, 5), (40, 10), (64, 50), (300, 75)])
def test_chance_is_what_random_sets_give(units: int, irrelevant: int) -> None:
    chooser = random.Random(0)
    draws = 6000
    pairs = shared = 0.0
    for _ in range(draws):
        sets = [set(chooser.sample(range(units), irrelevant)) for _ in range(3)]
        pairs += jaccard(sets[0], sets[1]) / draws
        shared += len(set.intersection(*sets)) / units / draws
    made = kind_overlap(
        "ffn_channel",
        [layer_overlap(torch.ones(3, units, dtype=torch.bool), 0)],
        units=units,
        irrelevant=irrelevant,
        dimensions=3,
    )
    assert made.chance_jaccard == pytest.approx(pairs, abs=0.015)
    assert made.chance_intersection == pytest.approx(shared, abs=0.01)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75])
def test_chance_tends_to_the_limit_of_many_units(ratio: float) -> None:
    assert chance_jaccard(16384, round(16384 * ratio)) == pytest.approx(ratio / (2 - ratio), rel=1e-3)


@given(layers=st.integers(1, 100), most=st.integers(1, 8))
def test_layer_groups_hold_every_layer_once(layers: int, most: int) -> None:
    groups = layer_groups(layers, most)
    assert [layer for group in groups for layer in group] == list(range(layers))
    lengths = [len(group) for group in groups]
    assert len(groups) == min(most, layers)
    assert max(lengths) - min(lengths) <= 1


def brute_report(
    rows: list[tuple[Path, str]], ratio: float, score: str
) -> dict[tuple[str, int | None], tuple[list[float], float]]:
    """The same from the files alone: per kind and layer the pairs' overlaps and the intersection."""
    scores: dict[str, list[list[list[float]]]] = {}
    for layer in range(SHAPE.num_hidden_layers):
        for kind in ("ffn_channel", "query_head", "kv_group", "block"):
            per_dimension = []
            for folder, dimension in rows:
                info = load_json(StoreInfo, folder / "store.json")
                impacts = load_file(folder / layer_file(layer))[kind].tolist()
                mine = [
                    [value / document.num_tokens**0.5 for value in row] if score == "mean" else row
                    for row, document in zip(impacts, info.documents, strict=True)
                    if document.dimension == dimension
                ]
                columns = list(zip(*mine, strict=True))
                reduce = max if score == "paper" else lambda column: sum(column) / len(column)
                per_dimension.append([reduce(column) for column in columns])
            scores.setdefault(kind, []).append(per_dimension)
    found: dict[tuple[str, int | None], tuple[list[float], float]] = {}
    for kind, layers in scores.items():
        spans: list[tuple[int | None, list[list[float]]]] = list(enumerate(layers))
        if kind == "block":
            spans = [(None, [[layer[d][0] for layer in layers] for d in range(len(rows))])]
        for span, values in spans:
            units = len(values[0])
            count = min(max(int(units * ratio + 0.5), 1), units - 1)
            sets = [lowest(row, count) for row in values]
            pairs = [jaccard(*pair) for pair in itertools.combinations(sets, 2)]
            found[kind, span] = pairs, len(set.intersection(*sets)) / units
    return found


@pytest.mark.parametrize("rule", ["paper", "mean"])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.6])
def test_a_report_over_several_stores_is_that_of_the_files(tmp_path: Path, rule: str, ratio: float) -> None:
    one = write_store(tmp_path / "one", {"language": 4, "task": 3}, seed=1)
    two = write_store(tmp_path / "two", {"domain": 5}, seed=2)
    report = api.overlap([one, two], ratio=ratio, rule=rule)
    first = [entry.name for entry in report.dimensions][:2]
    rows = [(one, name) for name in first] + [(two, "domain")]
    assert sorted(first) == ["language", "task"]
    assert report.pairs == ((first[0], first[1]), (first[0], "domain"), (first[1], "domain"))
    found = {
        (kind.kind, layer.layer): (list(layer.jaccard), layer.intersection)
        for kind in report.kinds
        for layer in kind.layers
    }
    wanted = brute_report(rows, ratio, rule)
    assert found.keys() == wanted.keys()
    for place, (pairs, shared) in wanted.items():
        assert found[place][0] == pytest.approx(pairs)
        assert found[place][1] == pytest.approx(shared)
    for kind in report.kinds:
        columns = list(zip(*(layer.jaccard for layer in kind.layers), strict=True))
        assert kind.mean_jaccard == pytest.approx([sum(column) / len(column) for column in columns])
    assert [entry.documents for entry in report.dimensions] == [
        {"language": 4, "task": 3}[first[0]], {"language": 4, "task": 3}[first[1]], 5,
    ]  # fmt: skip
    assert from_plain(OverlapReport, to_plain(report)) == report


def test_equal_impacts_overlap_wholly_and_opposite_ones_not_at_all(tmp_path: Path) -> None:
    folders = [write_store(tmp_path / name, {name: 2}, seed=3) for name in ("language", "domain", "task")]
    for layer in range(SHAPE.num_hidden_layers):
        path = folders[2] / layer_file(layer)
        info = load_json(StoreInfo, folders[2] / "store.json")
        opposite = {name: 1 - array for name, array in load_file(path).items()}
        path.write_bytes(layer_bytes(info, layer, opposite))
    report = api.overlap(folders, rule="mean")
    (ffn,) = (kind for kind in report.kinds if kind.kind == "ffn_channel")
    assert ffn.mean_jaccard == (1.0, 0.0, 0.0)
    assert ffn.mean_intersection == 0.0


def test_neuron_stores_are_compared_by_their_own_kinds(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", {"language": 3}, granularity="neuron")
    two = write_store(tmp_path / "two", {"domain": 3}, granularity="neuron", seed=1)
    report = api.overlap([one, two])
    names = {kind.kind for kind in report.kinds}
    assert {"query_row", "key_row", "value_row", "output_column", "ffn_channel"} <= names
    assert all(len(kind.layers) == SHAPE.num_hidden_layers for kind in report.kinds)


def test_one_kv_head_in_a_layer_is_judged_over_all_layers(tmp_path: Path) -> None:
    shape = Shape(5, 24, 40, 6, 1, 4, 96, True)
    one = write_store(tmp_path / "one", {"language": 3, "domain": 3}, shape=shape)
    kinds = {kind.kind: kind for kind in api.overlap(one).kinds}
    for name in ("kv_group", "block"):
        assert (kinds[name].units, len(kinds[name].layers)) == (5, 1)
        assert kinds[name].layers[0].layer is None
    assert len(kinds["query_head"].layers) == 5


def test_names_tell_experts_and_stores_apart(tmp_path: Path) -> None:
    english = write_store(tmp_path / "en", {"language": 2, "task": 2}, expert="English")
    german = write_store(tmp_path / "de", {"language": 2}, expert="German", seed=1)
    again = write_store(tmp_path / "de2", {"language": 2}, expert="German", seed=2)
    assert {entry.name for entry in api.overlap([english, german]).dimensions} == {
        "language (English)", "language (German)", "task",
    }  # fmt: skip
    assert {entry.name for entry in api.overlap([english, german, again]).dimensions} == {
        "language (English)", "language (German, store 2)", "language (German, store 3)", "task",
    }  # fmt: skip


def test_pictures_are_drawn_and_are_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stores = [
        write_store(
            tmp_path / str(seed), {"language": 2, "domain": 2, "task": 2}, expert=f"$e{seed}", seed=seed
        )
        for seed in range(3)
    ]
    for ending, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        paths = [tmp_path / f"{name}{ending}" for name in ("a", "b")]
        for path in paths:
            api.overlap(stores, plot=path)
        first, second = (path.read_bytes() for path in paths)
        assert first.startswith(start)
        assert first == second
    text = (tmp_path / "a.svg").read_text()
    assert "<svg" in text


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ratio": 0.0}, UserError, "between 0 and 1"),
        ({"ratio": 1.0}, UserError, "between 0 and 1"),
        ({"ratio": float("nan")}, UserError, "between 0 and 1"),
        ({"rule": "papre"}, UserError, "did you mean 'paper'"),
        ({"rule": "quantile"}, UserError, "quantile:0.9"),
        ({"rule": "magnitude"}, UserError, "looks at no document"),
        ({"rule": "random"}, UserError, "looks at no document"),
        ({"rule": "variance+bias"}, UserError, "score each dimension on its own"),
        ({"plot": "a.pdf"}, UserError, ".png or .svg"),
        ({"plot": "there.png"}, OutputError, "exists already"),
    ],
)
def test_bad_wishes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    error: type[UserError],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.png").write_text("mine")
    store = write_store(tmp_path / "store", {"language": 3, "domain": 3})
    with pytest.raises(error, match=words.replace("+", r"\+").replace(".", r"\.")):
        api.overlap(store, **options)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "there.png"]
    assert Path("there.png").read_text() == "mine"


def test_statistics_of_a_store_of_one_dimension_are_its_own(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", {"language": 3})
    two = write_store(tmp_path / "two", {"domain": 3}, seed=1)
    assert api.overlap([one, two], rule="variance+bias").rule == "variance+bias"


def test_a_dimension_with_too_few_documents_is_named(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", {"language": 3, "task": 1})
    with pytest.raises(CorpusError, match=r"task: .*at least 2"):
        api.overlap(one, rule="quantile:0.9")


def test_bad_stores(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", {"language": 3})
    two = write_store(tmp_path / "two", {"domain": 3}, seed=1)
    with pytest.raises(UserError, match="one dimension"):
        api.overlap(one)
    with pytest.raises(StoreError, match="given twice"):
        api.overlap([one, two, tmp_path / "two" / ".." / "one"])
    with pytest.raises(StoreError, match="not a store of scores"):
        api.overlap([one, tmp_path])
    with pytest.raises(StoreError, match="nowhere does not exist"):
        api.overlap([one, tmp_path / "nowhere"])
    (two / layer_file(1)).write_bytes(b"no")
    with pytest.raises(StoreError, match="cannot be read"):
        api.overlap([one, two])


def test_without_matplotlib_a_picture_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    store = write_store(tmp_path / "store", {"language": 3, "domain": 3})
    (store / layer_file(0)).write_bytes(b"no")  # work would meet this
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'cusprun\[plot\]'"):
        api.overlap(store, plot=tmp_path / "a.png")
