"""The refit by sums, by rows and by brute force: the same columns, the same choice, few matrices."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ridges import bottoms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cusprun.errors import OutputError
from cusprun.pruning import inputs as inputs_module
from cusprun.pruning import triangle
from cusprun.pruning.gram import Gram
from cusprun.pruning.inputs import Inputs, TokenCounts, count_tokens
from cusprun.pruning.refit import RIDGES
from cusprun.pruning.refit_documents import TokenWeights
from cusprun.pruning.rows import Rows
from cusprun.walk.ranks import ALONE, Ranks
from cusprun.walk.scratch import IN_MEMORY, Scratch


@dataclass(frozen=True)
class Case:
    """Tokens of one projection: rows [tokens, n], weights, which are judged, drift [tokens, features]."""

    rows: torch.Tensor
    weights: torch.Tensor
    judged: torch.Tensor
    drift: torch.Tensor | None
    weight: torch.Tensor

    def inputs(
        self, few: float, apart: float = 2, ranks: Ranks = ALONE, scratch: Scratch = IN_MEMORY
    ) -> Inputs:
        """Collect them in two batches, as rows where fewer than ``few`` times the channels."""
        counts = TokenCounts((int((~self.judged).sum()),), (int(self.judged.sum()),))
        features = 0 if self.drift is None else self.drift.shape[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inputs_module, "_FEW", few)
            patch.setattr(inputs_module, "_APART", apart)
            inputs = Inputs(self.rows.shape[1], counts, features, scratch=scratch, ranks=ranks)
        half = len(self.rows) // 2
        for part in (slice(0, half), slice(half, None)):
            drift = None if self.drift is None else self.drift[part]
            inputs.add(self.rows[part], self.weights[part], self.judged[part], drift)
        inputs.add_over()
        return inputs


def case(seed: int, tokens: int, n: int, features: int, *, drifts: bool, sinks: bool = True) -> Case:
    """Return correlated channels; two tokens are a thousand times as large, and every third is judged."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows = normal(tokens, n) @ normal(n, n) / n**0.5
    weights = torch.rand(tokens, generator=generator) + 0.1
    judged = torch.arange(tokens) % 3 == 2
    drift = 0.5 * normal(tokens, features) if drifts else None
    if sinks:  # behind the first batch's middle, where the median is sound
        rows[0] *= 1000  # fitted
        rows[5] *= 1000  # judged
        if drift is not None:
            drift[3] *= 1000
    return Case(rows, weights, judged, drift, normal(features, n))


@dataclass(frozen=True)
class Truth:
    """The refit of a case by augmented least squares on the rows themselves, in float64."""

    unit: float
    fit: tuple[torch.Tensor, torch.Tensor]
    apart: tuple[torch.Tensor, torch.Tensor]

    @staticmethod
    def of(given: Case) -> Truth:
        roots = given.weights.double().sqrt().unsqueeze(1)
        rows = given.rows.double() * roots
        target = rows @ given.weight.double().T
        usual = torch.ones(len(rows), dtype=torch.bool)
        half = len(rows) // 2  # limits are those of the first batch
        parts = [rows]
        if given.drift is not None:
            drift = given.drift.double() * roots
            target = target + drift
            parts.append(drift)
        for part in parts:
            squares = part.square().sum(1)
            usual &= squares <= 30 * squares[:half].median()
        fitted, judged = ~given.judged, given.judged & usual
        unit = float(rows[fitted & usual].square().sum() / rows.shape[1])
        return Truth(unit, (rows[fitted], target[fitted]), (rows[judged], target[judged]))

    def solution(self, weight: torch.Tensor, keep: list[int], ridge: float, *, both: bool) -> torch.Tensor:
        root = (ridge * self.unit) ** 0.5
        sides = (self.fit, self.apart) if both else (self.fit,)
        rows = torch.cat(
            [*(rows[:, keep] for rows, _ in sides), root * torch.eye(len(keep), dtype=torch.float64)]
        )
        wanted = torch.cat([*(target for _, target in sides), root * weight.double()[:, keep].T])
        return torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T

    def errors(self, weight: torch.Tensor, keep: list[int]) -> dict[float | None, float]:
        """Return the relative squared error on the tokens that are judged on: by ridge, None for no refit."""
        rows, target = self.apart
        columns = {r: self.solution(weight, keep, r, both=False) for r in RIDGES}
        tried = {None: weight.double()[:, keep], **columns}
        return {
            ridge: float((target - rows[:, keep] @ found.T).square().sum() / target.square().sum())
            for ridge, found in tried.items()
        }


FORMS = {"sums": (0.0, 0.0), "sums, judged by rows": (0.0, 1e9), "rows": (1e9, 0.0)}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(24, 60),
    n=st.integers(3, 40),
    features=st.integers(1, 30),
    drifts=st.booleans(),
    block=st.sampled_from((3, 16, 256)),
    data=st.data(),
)
def test_sums_rows_and_brute_force_give_the_same_columns_and_errors(
    seed: int, tokens: int, n: int, features: int, drifts: bool, block: int, data: st.DataObject
) -> None:
    given_case = case(seed, tokens, n, features, drifts=drifts)
    keep = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n)))
    truth, weight = Truth.of(given_case), given_case.weight
    errors = truth.errors(weight, keep)
    ends = bottoms({ridge: errors[ridge] for ridge in RIDGES}, rel=1e-3, absolute=1e-6)
    for name, (few, apart) in FORMS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triangle, "_BLOCK", block)
            inputs = given_case.inputs(few, apart)
            assert isinstance(inputs._fit, Rows if name == "rows" else Gram)
            assert isinstance(inputs._apart, Gram if name == "sums" else Rows)
            assert inputs.unit() == pytest.approx(truth.unit, rel=1e-5)
            fitted = inputs.refitted(weight, keep)
        before = errors[None]
        assert fitted.relative_error_before == pytest.approx(before, rel=1e-4, abs=1e-6), name
        assert fitted.relative_error_after == pytest.approx(errors[fitted.ridge], rel=1e-3, abs=1e-6), name
        if fitted.ridge is None:
            assert torch.equal(fitted.weight, weight[:, keep])
            assert max(errors[end] for end in ends) >= before * (1 - 1e-3) - 1e-6
            continue
        assert fitted.ridge in ends
        wanted = truth.solution(weight, keep, fitted.ridge, both=True)
        apart_by = float((fitted.weight.double() - wanted).norm() / wanted.norm())
        assert apart_by < 1e-4, name


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(24, 60),
    n=st.integers(4, 30),
    drifts=st.booleans(),
    block=st.sampled_from((3, 256)),
    data=st.data(),
)
def test_the_surgeon_chooses_the_same_by_sums_by_rows_and_by_brute_force(
    seed: int, tokens: int, n: int, drifts: bool, block: int, data: st.DataObject
) -> None:
    """One channel a round; the brute force solves for all columns that are left again, on the rows."""
    given_case = case(seed, tokens, n, 5, drifts=drifts)
    count = data.draw(st.integers(max(1, n - 6), n - 1))
    truth = Truth.of(given_case)
    rows, target = truth.fit
    ridge = 1e-2 * truth.unit
    metric = rows.T @ rows + ridge * torch.eye(n, dtype=torch.float64)
    aim = torch.linalg.solve(metric, (target.T @ rows + ridge * given_case.weight.double()).T).T

    def cost(kept: list[int]) -> float:
        solution = torch.linalg.solve(metric[kept][:, kept], (aim @ metric)[:, kept].T).T
        change = aim.clone()
        change[:, kept] -= solution
        return float((change @ metric * change).sum())

    kept = list(range(n))
    while len(kept) > count:
        kept.remove(min(kept, key=lambda channel: cost([k for k in kept if k != channel])))
    for few in (0.0, 1e9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triangle, "_BLOCK", block)
            own = given_case.inputs(few)
            chosen = inputs_module.choose_channels(
                given_case.weight, own._fit.metric(ridge), count, rounds=n - count
            )
        assert chosen == kept


def test_rows_and_sums_choose_the_same_of_many_but_for_what_float32_products_round() -> None:
    given = case(4, 130, 320, 48, drifts=True)
    forms = [given.inputs(few) for few in (0.0, 1e9)]
    first, second = (each.chosen_channels(given.weight, 240) for each in forms)
    assert len(set(first) & set(second)) >= 236
    errors = [each.refitted(given.weight, first).relative_error_after for each in forms]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@dataclass(frozen=True)
class Counted(Scratch):
    """Keeps all that it gave, so that no address is used twice."""

    given: list[torch.Tensor] = field(default_factory=list)

    def zeros(self, *args: Any, **options: Any) -> torch.Tensor:
        self.given.append(super().zeros(*args, **options))
        return self.given[-1]


class Largest(TorchDispatchMode):
    """Keeps the addresses of the memory behind every tensor that an operation gives, from a size on."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes, self.addresses = num_bytes, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() >= self.num_bytes:
                self.addresses.add(leaf.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize(("form", "squares"), [("sums", 2), ("sums, judged by rows", 1)])
def test_beside_the_sums_a_refit_holds_one_matrix_of_the_survivors_for_each_kind_of_tokens(
    form: str, squares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And choosing the channels none; what else is made is no larger than a projection."""
    monkeypatch.setattr(triangle, "_BLOCK", 16)
    n, features, count = 192, 12, 144
    scratch = Counted()
    inputs = case(4, 120, n, features, drifts=True).inputs(*FORMS[form], scratch=scratch)
    sums = len(scratch.given)
    weight = torch.randn(features, n, generator=torch.Generator().manual_seed(0))
    with Largest(8 * count * count) as largest:
        inputs.chosen_channels(weight, count)
        chosen = len(scratch.given)
        inputs.refitted(weight, list(range(count)))
    known = {tensor.untyped_storage().data_ptr() for tensor in scratch.given}
    assert largest.addresses <= known

    def square(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
        return [tuple(each.shape) for each in tensors if min(each.shape) >= count]

    assert set(square(scratch.given[:sums])) == {(n, n)}
    assert square(scratch.given[sums:chosen]) == []
    assert square(scratch.given[chosen:]) == [(count, count)] * squares


class _Shared:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.slots: list[Any] = [None] * size


@dataclass(frozen=True)
class Together(Ranks):
    """Ranks that are threads of one process."""

    shared: _Shared = field(default_factory=lambda: _Shared(1))

    def _exchanged(self, own: Any) -> list[Any]:
        self.shared.slots[self.rank] = own
        self.shared.barrier.wait()
        slots = list(self.shared.slots)
        self.shared.barrier.wait()
        return slots

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(tensor)
        for each in self._exchanged(tensor.clone()):
            total += each
        return total

    def from_first(self, work: Any) -> Any:
        return self._exchanged(work() if self.is_first else None)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shares", [((0, 1), (2, 3)), ((0, 1, 2, 3), ()), ((0, 2), (1,), (3,))])
def test_ranks_that_share_the_batches_find_what_one_alone_does(
    form: str, shares: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "_FEW", FORMS[form][0])
    monkeypatch.setattr(inputs_module, "_APART", FORMS[form][1])
    given = case(11, 80, 20, 6, drifts=True)
    spans = [slice(start, start + 20) for start in range(0, 80, 20)]

    def collected(ranks: Ranks, own: Sequence[int]) -> Inputs:
        weights = [
            torch.where(given.judged, 0.0, given.weights),
            torch.where(given.judged, given.weights, 0.0),
        ]
        parts = [tuple(each[spans[batch]] for batch in own) for each in weights]
        counts = count_tokens(TokenWeights(parts[0], parts[1]), ranks)
        inputs = Inputs(20, counts, 6, ranks=ranks)
        assert given.drift is not None
        for span in (spans[batch] for batch in own):
            inputs.add(given.rows[span], given.weights[span], given.judged[span], given.drift[span])
        inputs.add_over()
        return inputs

    shared = _Shared(len(shares))
    ranks = [Together(rank, len(shares), shared=shared) for rank in range(len(shares))]
    with ThreadPoolExecutor(len(shares)) as pool:
        found = list(pool.map(collected, ranks, shares))
    alone, keep = collected(ALONE, range(4)), list(range(0, 20, 2))
    wanted = alone.refitted(given.weight, keep)
    for each in found:
        torch.testing.assert_close(each.means(), alone.means(), rtol=1e-6, atol=1e-6)
        assert each.unit() == pytest.approx(alone.unit(), rel=1e-6)
        fitted = each.refitted(given.weight, keep)
        assert fitted.ridge == wanted.ridge
        assert fitted.relative_error_after == pytest.approx(wanted.relative_error_after, rel=1e-5)
        torch.testing.assert_close(fitted.weight, wanted.weight, rtol=1e-5, atol=1e-5)
        assert each.chosen_channels(given.weight, 12) == alone.chosen_channels(given.weight, 12)


def test_a_first_batch_without_tokens_leaves_the_limit_to_the_next_and_none_at_all_gives_no_outliers() -> (
    None
):
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    rows[7] *= 1000
    inputs = Inputs(6, TokenCounts((40,), (0,)))
    for part in (rows[:0], torch.zeros(4, 6), rows):
        inputs.add(part, torch.ones(len(part)), torch.zeros(len(part), dtype=torch.bool))
    inputs.add_over()
    rows[7] = 0
    assert inputs.unit() == pytest.approx(float(rows.square().sum()) / 6, rel=1e-5)
    nothing = Inputs(6, TokenCounts((0,), (0,)))
    nothing.add_over()
    assert nothing.unit() == 0
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(nothing.refitted(weight, [1, 4]).weight, weight[:, [1, 4]])


def test_large_tensors_are_files_without_a_name_and_give_the_same_bits(tmp_path: Path) -> None:
    given = case(5, 40, 24, 8, drifts=True)
    for few in (0.0, 1e9):
        plain = given.inputs(few)
        mapped = given.inputs(few, scratch=Scratch(tmp_path, limit_bytes=100))
        assert mapped.chosen_channels(given.weight, 15) == plain.chosen_channels(given.weight, 15)
        found, wanted = (each.refitted(given.weight, list(range(15))) for each in (mapped, plain))
        assert torch.equal(found.weight, wanted.weight)
        assert found.relative_error_after == wanted.relative_error_after
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel says what memory is anonymous")
def test_a_mapped_tensor_takes_no_anonymous_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
        return 1024 * int(line.split()[1])

    before = anonymous()
    tensor = Scratch(tmp_path, limit_bytes=1000).zeros((4000, 1000))
    tensor += 1
    assert float(tensor.sum()) == 4e6
    assert anonymous() - before < 8e6 < tensor.numel() * 8
    assert Scratch(tmp_path, limit_bytes=1000).copied(torch.ones(3)).tolist() == [1, 1, 1]


def test_a_folder_that_cannot_hold_a_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"{tmp_path} cannot hold .* MB .*larger disk") as caught:
        Scratch(tmp_path, limit_bytes=0).zeros((10**9, 10**7))
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())
