"""Rules against set definitions and direct computation; unknown and unfit ones refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cusprun.errors import CorpusError, PlanError, UserError
from cusprun.pruning.rules import RULES, Evidence, check_rule, rule_entry, score_units

UNITS = 20
WRITTEN = tuple(f"{name}:0.75" if entry.takes_argument else name for name, entry in RULES.items())

worlds = st.tuples(
    st.integers(0, 10_000), st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda s: sum(s) > 1)
)


def evidence_of(world: tuple[int, list[int]], **changes: object) -> Evidence:
    seed, sizes = world
    generator = torch.Generator().manual_seed(seed)
    dimensions, start = {}, 0
    for number, size in enumerate(sizes):
        dimensions[str(number)] = list(range(start, start + size))
        start += size
    fields: dict[str, object] = {
        "impacts": torch.rand(start, UNITS, generator=generator),
        "tokens": torch.randint(1, 50, (start,), generator=generator),
        "dimensions": dimensions,
        "fluctuation": torch.rand(UNITS, generator=generator),
        "magnitude": torch.rand(UNITS, generator=generator),
        "seed": seed,
        "texts": tuple(str(row) for row in range(start)),
        **changes,
    }
    return Evidence(**fields)  # type: ignore[arg-type]


def irrelevant_sets(evidence: Evidence, threshold: float) -> list[set[int]]:
    return [
        {
            unit
            for unit in range(UNITS)
            if all(float(evidence.impacts[row, unit]) <= threshold for row in rows)
        }
        for rows in evidence.dimensions.values()
    ]


@pytest.mark.parametrize(("rule", "joined"), [("paper", set.intersection), ("union", set.union)])
@settings(deadline=None)
@given(world=worlds, share=st.floats(0.05, 0.95))
def test_set_rules_remove_the_joined_irrelevant_sets(
    rule: str, joined: object, world: tuple[int, list[int]], share: float
) -> None:
    evidence = evidence_of(world)
    scores = score_units(rule, evidence)
    threshold = float(scores.sort().values[int(share * UNITS)])
    gone = set(torch.nonzero(scores <= threshold).flatten().tolist())
    assert gone == joined(*irrelevant_sets(evidence, threshold))  # type: ignore[operator]


@settings(deadline=None)
@given(world=worlds, q=st.floats(0, 1))
def test_quantile_is_the_largest_over_dimensions_of_numpys(world: tuple[int, list[int]], q: float) -> None:
    evidence = evidence_of(world)
    values = evidence.impacts.double().numpy() / np.sqrt(evidence.tokens.numpy())[:, None]
    wanted = np.max([np.quantile(values[rows], q, axis=0) for rows in evidence.dimensions.values()], axis=0)
    found = score_units(f"quantile:{q}", evidence).double().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(world=worlds)
def test_quantile_one_is_the_intersection_rule_with_lengths_divided_out(
    world: tuple[int, list[int]],
) -> None:
    alike = evidence_of(world, tokens=torch.ones(sum(world[1]), dtype=torch.int64))
    torch.testing.assert_close(score_units("quantile:1", alike), score_units("paper", alike))


@settings(deadline=None)
@given(world=worlds)
def test_rules_do_not_mind_the_order_of_documents(world: tuple[int, list[int]]) -> None:
    evidence = evidence_of(world)
    order = list(reversed(range(len(evidence.tokens))))
    turned = Evidence(
        impacts=evidence.impacts[order],
        tokens=evidence.tokens[order],
        dimensions={name: [order.index(row) for row in rows] for name, rows in evidence.dimensions.items()},
        fluctuation=evidence.fluctuation,
        magnitude=evidence.magnitude,
        seed=evidence.seed,
        texts=tuple(reversed(evidence.texts)),
    )
    for rule in WRITTEN:
        torch.testing.assert_close(score_units(rule, evidence), score_units(rule, turned))


def test_mean_rule_weighs_documents_alike_whatever_their_length() -> None:
    impacts = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 18.0]])
    evidence = Evidence(
        impacts, torch.tensor([1, 1, 1, 9]), {"a": [0, 1, 2], "b": [3]}, torch.empty(0), torch.empty(0), 0
    )
    assert score_units("mean", evidence).tolist() == [1.5, 1.5]


def test_random_follows_the_seed_alone() -> None:
    one, other = evidence_of((1, [2])), evidence_of((2, [2]), seed=1)
    assert score_units("random", one).equal(score_units("random", other))
    assert not score_units("random", one).equal(score_units("random", evidence_of((2, [2]))))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("men", "did you mean 'mean'"),
        ("varience", r"did you mean 'variance\+bias'"),
        ("", "unknown rule"),
        ("mean:0.5", "takes no argument"),
        ("mean:", "takes no argument"),
        ("quantile", "'quantile:0.9'"),
        ("quantile:", "'quantile:0.9'"),
        ("quantile:much", "'quantile:0.9'"),
        ("quantile:1.5", "from 0 to 1"),
        ("quantile:nan", "from 0 to 1"),
        ("quantile:-0.1", "from 0 to 1"),
    ],
)
def test_an_unknown_rule_or_a_wrong_argument_is_refused(text: str, hint: str) -> None:
    for refuse in (check_rule, rule_entry, lambda rule: score_units(rule, evidence_of((0, [2])))):
        with pytest.raises(UserError, match=hint):
            refuse(text)


@pytest.mark.parametrize("rule", WRITTEN)
def test_every_rule_scores_each_unit_and_names_its_compensation(rule: str) -> None:
    check_rule(rule)
    assert score_units(rule, evidence_of((0, [2, 3]))).shape == (UNITS,)
    assert rule_entry(rule).compensation == ("bias" if rule == "variance+bias" else "refit")


DOCUMENT_RULES = tuple(rule for rule in WRITTEN if rule not in ("magnitude", "random"))


@pytest.mark.parametrize("rule", DOCUMENT_RULES)
def test_one_text_given_many_times_is_refused(rule: str) -> None:
    with pytest.raises(CorpusError, match=r"same text|different calibration documents"):
        score_units(rule, evidence_of((0, [3, 2]), texts=("one",) * 5))


@pytest.mark.parametrize("rule", DOCUMENT_RULES)
def test_documents_that_leave_all_units_alike_are_refused(rule: str) -> None:
    with pytest.raises(CorpusError, match="told from another"):
        score_units(rule, evidence_of((0, [2, 2]), impacts=torch.full((4, UNITS), 0.5)))


def test_a_dead_sublayer_and_a_block_alone_are_not_refused() -> None:
    for impacts in (torch.zeros(4, UNITS), torch.full((4, 1), 0.5)):
        assert len(score_units("mean", evidence_of((0, [2, 2]), impacts=impacts))) == impacts.shape[1]


def test_a_quantile_of_one_document_is_refused_and_a_mean_is_not() -> None:
    single = evidence_of((0, [1, 1]), texts=("same", "same"))
    with pytest.raises(CorpusError, match="at least 2 different"):
        score_units("quantile:0.9", single)
    one = Evidence(
        torch.rand(1, UNITS), torch.tensor([5]), {"a": [0]}, torch.empty(0), torch.empty(0), 0, ("t",)
    )
    assert score_units("mean", one).shape == (UNITS,)


def test_variance_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(PlanError, match="rows of Q and K"):
        score_units("variance+bias", evidence_of((0, [2, 2]), fluctuation=torch.empty(0)))
