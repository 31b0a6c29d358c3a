"""Ranks joined by gloo, as threads: what is added, sent, compared and shared."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranked import Threads, run_ranks, threads_of_ranks
from tiny import documents

from cusprun.codec import Indices
from cusprun.errors import DeviceError, RankError, UserError
from cusprun.records import LayerPlan, LayerRefit, TokenizedDocument
from cusprun.walk import group
from cusprun.walk.batches import make_batches
from cusprun.walk.device import CPU
from cusprun.walk.fallback import Batching, with_smaller_batches
from cusprun.walk.ranks import ALONE, fair_shares
from cusprun.walk.watch import Failure
from cusprun.walk.wire import packed, unpacked


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Threads]:
    with threads_of_ranks(request.param) as threads:
        yield threads


@pytest.fixture(scope="module")
def pair() -> Iterator[Threads]:
    with threads_of_ranks(2) as threads:
        yield threads


@given(st.lists(st.integers(1, 3000), max_size=40), st.integers(1, 9))
def test_shares_are_a_division_and_even(sizes: list[int], count: int) -> None:
    shares = fair_shares(sizes, count)
    assert sorted(position for share in shares for position in share) == list(range(len(sizes)))
    assert all(share == tuple(sorted(share)) for share in shares)
    loads = [sum(sizes[position] for position in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert not sizes or shares[0][0] == 0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8], ids=str
)
def test_a_sum_is_that_of_all_ranks_and_the_same_on_each(ranks, dtype, monkeypatch) -> None:
    monkeypatch.setattr(group, "_CHUNK_BYTES", 100)  # so that one sum takes several collectives
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 60, (7, 13), generator=generator).to(dtype) for _ in ranks.ranks]
    wanted = torch.stack([part.double() for part in parts]).sum(dim=0)
    for found in ranks.call(lambda own: own.add(parts[own.rank].clone())):
        assert found.dtype == dtype
        assert torch.equal(found.double(), wanted)


def test_sums_of_floats_have_the_same_bits_on_every_rank_and_every_time(ranks) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(1000, dtype=torch.float32, generator=generator) for _ in ranks.ranks]
    rounds = [ranks.call(lambda own: own.add(parts[own.rank].clone())) for _ in range(3)]
    first = rounds[0][0]
    assert all(torch.equal(found, first) for found in [*rounds[0], *rounds[1], *rounds[2]])
    wanted = torch.stack(parts).double().sum(dim=0)
    torch.testing.assert_close(first.double(), wanted, rtol=1e-5, atol=1e-6)


def test_what_one_rank_alone_filled_in_keeps_its_bits(ranks) -> None:
    whole = torch.rand(len(ranks.ranks), 50)

    def filled(own: Any) -> torch.Tensor:
        rows = torch.zeros_like(whole)
        rows[own.rank] = whole[own.rank]
        return own.add(rows)

    assert all(torch.equal(found, whole) for found in ranks.call(filled))


def test_no_shape_stands_in_the_way_of_a_sum(pair) -> None:
    for make in (lambda: torch.ones(()), lambda: torch.ones(0, 3), lambda: torch.ones(4, 6).T[1:, :2]):
        found, other = pair.call(lambda own, make=make: own.add(make()))
        assert torch.equal(found, 2 * make())
        assert torch.equal(other, found)
    with torch.inference_mode():
        made = torch.ones(3)
    assert torch.equal(pair.call(lambda own: own.add(made.clone()))[1], torch.full((3,), 2.0))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_every_rank_gets_what_the_first_made(pair: Threads, value: object) -> None:
    calls: list[int] = []

    def work() -> object:
        calls.append(threading.get_ident())
        return value

    first, second = pair.call(lambda own: own.from_first(work))
    assert first is value
    assert second == value
    assert repr(second) == repr(value)  # the kinds of lists and numbers too
    assert len(calls) == 1


def test_records_paths_and_tensors_arrive(ranks) -> None:
    value = {
        "record": LayerPlan(Indices([0, 1, 2, 7]), Indices([1]), Indices([0])),
        "records": (LayerRefit(1, "o", 0.5, 0.25, 1e-3, "calibration"),),
        "text": TokenizedDocument("task", "x", (1, 2, 3)),
        "path": Path("/a/ü"),
        "tensors": [
            torch.tensor(2.5),
            torch.tensor([True, False]),
            torch.randn(3, 4).to(torch.bfloat16),
            torch.zeros(0, 5),
            torch.randn(4, 6, dtype=torch.float64).T,
        ],
    }
    for found in ranks.call(lambda own: own.from_first(lambda: value)):
        assert {**found, "tensors": None} == {**value, "tensors": None}
        assert isinstance(found["record"].ffn_channels, Indices)
        for mine, theirs in zip(found["tensors"], value["tensors"], strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


ON_GPUS = """
import os, torch
from cusprun.walk.shared_run import SharedRun

with SharedRun(os.environ) as run:
    own = run.ranks()
    found = own.add(torch.full((1000, 3), own.rank + 1.5, device=f"cuda:{own.local_rank}"))
    assert own.links.nccl is not None
    assert found.device.index == own.local_rank and bool((found == 4).all()), found
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_add_by_themselves(tmp_path: Path) -> None:
    for done in run_ranks(2, ("-c", ON_GPUS), tmp_path):
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class _Foreign:
    value: int


def test_nothing_of_another_package_is_sent_or_made() -> None:
    with pytest.raises(TypeError, match="_Foreign cannot be sent"):
        packed([_Foreign(1)])
    with pytest.raises(TypeError, match="set cannot be sent"):
        packed({1, 2})
    for name in ("os:system", "pathlib:Path", "cusprun.codec:to_plain", "cusprun.records:missing"):
        header = json.dumps({"tree": ["record", name, {}], "tensors": []}).encode()
        with pytest.raises(ValueError, match="is no record of this package"):
            unpacked(header, lambda tensor: None)


def test_ranks_that_differ_are_named_on_every_rank(pair) -> None:
    pair.call(lambda own: own.require_same({"model": "a", "ratio": "0.25"}))
    errors = pair.errors(lambda own: own.require_same({"model": "a", "ratio": f"0.{own.rank + 2}"}))
    assert {str(error) for error in errors} == {
        "rank 1 differs from rank 0 in the ratio (0.3 and 0.2); give every process the same"
    }
    assert all(isinstance(error, UserError) for error in errors)


def test_batches_are_shared_whole(ranks) -> None:
    batches = make_batches(documents(40), 64)
    shares = ranks.call(lambda own: own.share(batches))
    assert [batch.documents for batch in ALONE.share(batches)] == [batch.documents for batch in batches]
    found = sorted(batch.documents for share in shares for batch in share)
    assert found == sorted(batch.documents for batch in batches)
    assert shares[0][0].documents == batches[0].documents


def test_ranks_with_other_batches_are_refused(pair) -> None:
    errors = pair.errors(lambda own: own.share(make_batches(documents(20), 64 << own.rank)))
    assert all("division of the documents into batches" in str(error) for error in errors)


def test_the_first_of_each_machine_goes_first() -> None:
    done: list[int] = []
    with threads_of_ranks(4, by_machine=2) as threads:

        def work(rank: int) -> str:
            done.append(rank)
            return f"made by {rank}"

        found = threads.call(lambda own: own.one_by_machine(lambda: work(own.rank)))
    assert found == [f"made by {rank}" for rank in range(4)]
    assert set(done[:2]) == {0, 2}


class _OutOfMemory:
    """Work that adds up batches' sizes, and runs out of memory on rank 1 in batches above a size."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tries: list[tuple[int, int]] = []

    def __call__(self, own: Any) -> int:
        def work(batching: Batching) -> int:
            self.tries.append((own.rank, batching.tokens))
            total = int(own.add(torch.tensor([1])))
            if own.rank == 1 and batching.tokens > self.most:
                raise torch.OutOfMemoryError("out of memory")
            return total + int(own.add(torch.tensor([batching.tokens])))

        return with_smaller_batches(CPU, work, Batching(1024), own)


@pytest.mark.parametrize("count", [2, 4])
def test_all_ranks_begin_again_when_one_is_out_of_memory(count: int) -> None:
    work = _OutOfMemory(most=256)
    with threads_of_ranks(count, is_watched=True) as threads:
        for _ in range(2):  # each stage may
            assert threads.call(work) == [count + count * 256] * count
    assert sorted(work.tries) == sorted(
        2 * [(rank, tokens) for rank in range(count) for tokens in (256, 1024)]
    )


def test_a_rank_that_is_out_of_memory_again_ends_all() -> None:
    with threads_of_ranks(2, is_watched=True) as threads:

        def work(own: Any) -> None:
            try:
                _OutOfMemory(most=1)(own)
            except DeviceError as error:
                own.watch.post(Failure(own.rank, error.exit_code, f"rank {own.rank}: {error}"))
                raise

        first, second = threads.errors(work)
    assert isinstance(second, DeviceError)
    assert isinstance(first, RankError)
    assert first.exit_code == 2
    assert "rank 1: cpu has too little memory" in str(first)
