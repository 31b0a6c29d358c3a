"""Closed forms of single neurons against brute force: remove each from a stock model, run again, compare."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, build_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from cusprun.families import families
from cusprun.pruning.impact import masked_channels
from cusprun.pruning.neuron_impact import (
    estimated_changes,
    first_order_changes,
    query_and_key_impacts,
    rotary_units,
    softmax_changes,
    spread_positions,
    value_and_output_impacts,
)
from cusprun.pruning.neuron_score import SeenAttention, observed_attention

LAYERS = (0, 1)
LENGTHS = (11, 7)
MASK = torch.tensor([[position < length for position in range(11)] for length in LENGTHS])
IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(3))


@dataclass
class Subject:
    """One attention of a stock model in float64."""

    family: str
    model: Any
    attention: Any
    layer: int

    @property
    def head_dim(self) -> int:
        return int(self.attention.head_dim)

    def run(self, **options: Any) -> Any:
        with torch.no_grad():
            return self.model(IDS, use_cache=False, **options)

    def rows(self, letter: str) -> list[torch.Tensor]:
        """The parameters whose first axis is the rows of Q, K or V."""
        heads = self.model.config.num_attention_heads * self.head_dim
        groups = self.model.config.num_key_value_heads * self.head_dim
        if hasattr(self.attention, "qkv_proj"):
            start, size = {"q": (0, heads), "k": (heads, groups), "v": (heads + groups, groups)}[letter]
            return [p.data[start : start + size] for p in self.attention.qkv_proj.parameters()]
        return [p.data for p in getattr(self.attention, f"{letter}_proj").parameters()]

    @contextmanager
    def zeroed(self, views: list[torch.Tensor], positions: list[int]) -> Iterator[None]:
        own = [view.clone() for view in views]
        for view in views:
            view[positions] = 0
        yield
        for view, values in zip(views, own, strict=True):
            view.copy_(values)


@pytest.fixture(scope="module", params=[(family, layer) for family in FAMILIES for layer in LAYERS], ids=str)
def subject(request: pytest.FixtureRequest) -> Subject:
    family, layer = request.param
    model = build_model(family).double()
    return Subject(family, model, model.model.layers[layer].self_attn, layer)


def seen_by(subject: Subject) -> SeenAttention:
    """What the attention function of the one block sees; the rest of the model keeps its own config."""
    shared = subject.attention.config
    subject.attention.config = copy.deepcopy(shared)
    modules = families()[subject.model.config.model_type].modules
    try:
        with observed_attention(subject.model.model.layers[subject.layer], modules) as seen:
            subject.run()
    finally:
        subject.attention.config = shared
    return seen


def our_query_and_key(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    seen = seen_by(subject)
    found = query_and_key_impacts(
        seen.query, seen.key, seen.mask, torch.tensor(LENGTHS), seen.scaling, seen.rotary_dim
    )
    return tuple(part.view(2, -1, subject.head_dim) for part in found)  # type: ignore[return-value]


def pairs_of(subject: Subject) -> list[list[int]]:
    parameters = subject.model.config.rope_parameters
    rotary = int(subject.head_dim * parameters.get("partial_rotary_factor", 1.0))
    half = rotary // 2
    return [[k, k + half] for k in range(half)] + [[k] for k in range(rotary, subject.head_dim)]


def document_norms(change: torch.Tensor) -> torch.Tensor:
    """Norms over real query positions of [documents, heads, tokens, tokens]: [documents, heads]."""
    return (change * MASK[:, None, :, None]).flatten(2).norm(dim=2)


@contextmanager
def attention_as(subject: Subject, edit: Callable[[torch.Tensor, torch.Tensor], None]) -> Iterator[list]:
    """Compute attention by the family's own eager function on edited queries and keys; keeps its weights."""
    weights: list[torch.Tensor] = []
    eager = sys.modules[type(subject.attention).__module__].eager_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if module is not subject.attention:
            return eager(module, query, key, value, mask, **options)
        query, key = query.clone(), key.clone()
        edit(query, key)
        output, probabilities = eager(module, query, key, value, mask, **options)
        weights.append(probabilities)
        return output, probabilities

    AttentionInterface.register("brute", attend)
    AttentionMaskInterface.register("brute", eager_mask)
    own = subject.model.config._attn_implementation
    subject.model.config._attn_implementation = "brute"
    yield weights
    subject.model.config._attn_implementation = own


def probabilities(subject: Subject, edit: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
    with attention_as(subject, edit) as weights:
        subject.run()
    return weights[0]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-13)


def test_query_and_key_impacts_equal_removal_after_rotary_and_norm(subject: Subject) -> None:
    queries, keys = our_query_and_key(subject)
    full = probabilities(subject, lambda _q, _k: None)
    for channels in pairs_of(subject):
        for head in range(queries.shape[1]):

            def drop(query: torch.Tensor, _key: torch.Tensor) -> None:
                query[:, head, :, channels] = 0  # noqa: B023

            norms = document_norms(probabilities(subject, drop) - full)
            assert float(norms[:, [h for h in range(queries.shape[1]) if h != head]].max()) == 0
            for channel in channels:
                close(queries[:, head, channel], norms[:, head])
        for group in range(keys.shape[1]):

            def drop_key(_query: torch.Tensor, key: torch.Tensor) -> None:
                key[:, group, :, channels] = 0  # noqa: B023

            norms = document_norms(probabilities(subject, drop_key) - full).norm(dim=1)
            for channel in channels:
                close(keys[:, group, channel], norms)


def test_query_and_key_impacts_equal_zeroed_weights_where_no_norm_follows(subject: Subject) -> None:
    """Zeroing the rows of a pair in the weights takes exactly the pair's part out of the scores."""
    if hasattr(subject.attention, "q_norm"):
        pytest.skip("a norm follows the projection: a zeroed row changes the scale of the others too")
    queries, keys = our_query_and_key(subject)
    full = probabilities(subject, lambda _q, _k: None)
    for channels in pairs_of(subject)[::3]:
        for head in (0, 3):
            rows = [head * subject.head_dim + channel for channel in channels]
            with subject.zeroed(subject.rows("q"), rows):
                change = probabilities(subject, lambda _q, _k: None) - full
            close(queries[:, head, channels[0]], document_norms(change)[:, head])
        rows = [subject.head_dim + channel for channel in channels]
        with subject.zeroed(subject.rows("k"), rows):
            change = probabilities(subject, lambda _q, _k: None) - full
        close(keys[:, 1, channels[0]], document_norms(change).norm(dim=1))


def test_value_and_output_impacts_equal_zeroed_weights(subject: Subject) -> None:
    kept: dict[str, torch.Tensor] = {}
    projection = subject.attention.o_proj
    handle = projection.register_forward_hook(lambda _m, args, out: kept.update(channels=args[0], out=out))
    subject.run()
    full = kept["out"]
    config = subject.model.config
    values, columns = value_and_output_impacts(
        masked_channels(kept["channels"], MASK),
        projection.weight.detach(),
        subject.head_dim,
        config.num_attention_heads // config.num_key_value_heads,
    )

    def norms(views: list[torch.Tensor], position: int) -> torch.Tensor:
        with subject.zeroed(views, [position]):
            subject.run()
        return ((full - kept["out"]) * MASK.unsqueeze(-1)).flatten(1).norm(dim=1)

    for row in range(0, values.shape[1], 3):
        close(values[:, row], norms(subject.rows("v"), row))
    for column in range(0, columns.shape[1], 5):
        close(columns[:, column], norms([projection.weight.data.T], column))
    handle.remove()


@given(tokens=st.integers(1, 40), count=st.integers(1, 40))
def test_positions_are_distinct_and_evenly_spread(tokens: int, count: int) -> None:
    positions = spread_positions(tokens, count)
    gaps = positions.diff()
    assert len(positions) == min(tokens, count)
    assert int(positions.min()) >= 0
    assert int(positions.max()) < tokens
    assert len(gaps) == 0 or (int(gaps.min()) > 0 and int(gaps.max()) - int(gaps.min()) <= 1)


Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor]


def given_attention(seed: int, tokens: int, rotary: int, scale: float = 1.0, window: int = 99) -> Given:
    generator = torch.Generator().manual_seed(seed)
    query = scale * torch.randn(4, tokens, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, tokens, 8, generator=generator, dtype=torch.float64) + 3
    bias = torch.full((1, tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    bias = bias.masked_fill(torch.ones(tokens, tokens).tril(-window).bool(), -torch.inf)
    return query, key, bias, 0.3, rotary_units(8, rotary)


def changes_by_definition(given_: Given) -> torch.Tensor:
    """[heads, tokens, units], with every score written out."""
    query, key, bias, scaling, units = given_
    found = torch.zeros(4, query.shape[1], int(units.max()) + 1, dtype=torch.float64)
    for head in range(4):
        scores = scaling * query[head] @ key[head // 2].T + bias[0]
        for unit in range(found.shape[2]):
            chosen = units == unit
            without = scores - scaling * query[head][:, chosen] @ key[head // 2][:, chosen].T
            found[head, :, unit] = (without.softmax(-1) - scores.softmax(-1)).square().sum(dim=1)
    return found


WORLDS = {
    "seed": st.integers(0, 1000), "tokens": st.integers(2, 150),
    "rotary": st.sampled_from([0, 4, 8]), "window": st.sampled_from([3, 99]),
}  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(**WORLDS)
def test_changes_at_chosen_positions_are_those_of_these_rows(
    seed: int, tokens: int, rotary: int, window: int
) -> None:
    attention = given_attention(seed, tokens, rotary, window=window)
    wanted = changes_by_definition(attention)
    positions = spread_positions(tokens, 5)
    close(softmax_changes(*attention, positions), wanted[:, positions].sum(dim=1))
    close(softmax_changes(*attention), wanted.sum(dim=1))


@settings(max_examples=30, deadline=None)
@given(**WORLDS)
def test_the_first_order_is_the_limit_of_small_changes(
    seed: int, tokens: int, rotary: int, window: int
) -> None:
    attention = given_attention(seed, tokens, rotary, 1e-5, window)
    torch.testing.assert_close(
        first_order_changes(*attention), changes_by_definition(attention), rtol=1e-3, atol=1e-18
    )


@settings(max_examples=30, deadline=None)
@given(**WORLDS)
def test_the_estimate_is_exact_at_all_positions_and_for_small_changes(
    seed: int, tokens: int, rotary: int, window: int
) -> None:
    large = given_attention(seed, tokens, rotary, window=window)
    wanted = softmax_changes(*large)
    torch.testing.assert_close(estimated_changes(*large, tokens, tokens), wanted, rtol=1e-6, atol=1e-9)
    small = given_attention(seed, tokens, rotary, 1e-4, window)
    found = estimated_changes(*small, tokens, 5)
    torch.testing.assert_close(found, softmax_changes(*small), rtol=1e-2, atol=1e-12)


def test_the_estimate_ranks_like_the_exact_change_where_changes_are_large() -> None:
    query, *rest = given_attention(0, 150, 8, 2.0)
    attention = (query * torch.tensor([0.1, 0.4, 1.0, 2.0] * 2), *rest)
    exact = softmax_changes(*attention).flatten()
    for rough_positions, accuracy in ((150, 0.1), (75, 0.3)):
        found = estimated_changes(*attention, rough_positions).flatten()
        ranks = torch.stack([values.argsort().argsort().double() for values in (exact, found)])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
        assert float((found / exact - 1).abs().median()) < accuracy


def test_rotary_units_pair_the_halves_of_the_rotated_part() -> None:
    assert rotary_units(8, 8).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert rotary_units(8, 4).tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert rotary_units(4, 0).tolist() == [0, 1, 2, 3]
