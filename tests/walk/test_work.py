"""What a walk keeps: generations of streams, commits, damage, owners, leftovers."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import documents

from cusprun.errors import OutputError
from cusprun.walk import spill
from cusprun.walk.batches import make_batches
from cusprun.walk.device import CPU, Device
from cusprun.walk.ranks import ALONE, Ranks
from cusprun.walk.stream import Stream
from cusprun.walk.work import MARKER, Work
from cusprun.walk.work_folder import walk_key, working
from cusprun.walk.workspace import Workspace

BATCHES = make_batches(documents(9), 60)
WIDTH = 3
KEY = "0" * 32
OTHER = "1" * 32


def fill(stream: Stream, value: float) -> None:
    """Pass a stream on to a generation whose batches hold ``value`` and their own numbers."""
    for position, batch in enumerate(BATCHES):
        stream.write(position, torch.full((*batch.token_ids.shape, WIDTH), value + position / 100))
    stream.turn()


def value_of(stream: Stream) -> float:
    rows = [stream.read(position) for position in range(len(BATCHES))]
    first = float(rows[0].flatten()[0])
    for position, (batch, found) in enumerate(zip(BATCHES, rows, strict=True)):
        assert found.shape == (*batch.token_ids.shape, WIDTH)
        assert torch.allclose(found, torch.tensor(first + position / 100))
    return first


def open_work(folder: Path, key: str = KEY, ranks: Ranks = ALONE) -> tuple[Work, Stream]:
    folder.mkdir(exist_ok=True)
    work = Work(folder, key, ranks)
    return work, work.stream("hidden", BATCHES, WIDTH)


def step(work: Work, stream: Stream, **options: Any) -> None:
    """Do one step, whose number the stream and a file hold from then on."""
    number = work.steps + 1
    fill(stream, number)
    with work.adding(f"file-{number}") as path:
        path.write_text(str(number) * 10)
    work.commit({"number": number}, **options)


def begun(folder: Path, steps: int) -> None:
    work, stream = open_work(folder)
    assert work.settle() == 0
    for _ in range(steps):
        step(work, stream)
    work.close()


@settings(max_examples=25)
@given(turns=st.lists(st.integers(1, 4), max_size=6), torn=st.integers(0, 4))
def test_what_was_held_is_found_however_often_a_step_turns_the_stream(
    tmp_path_factory: pytest.TempPathFactory, turns: list[int], torn: int
) -> None:
    folder = tmp_path_factory.mktemp("work")
    work, stream = open_work(folder)
    assert work.settle() == 0
    for number, count in enumerate(turns, 1):
        for turn in range(count):
            fill(stream, -turn)
        fill(stream, number)
        work.commit()
    for turn in range(torn):  # a step that does not come to its end
        fill(stream, 1000 + turn)
    work.close()
    again, found = open_work(folder)
    assert again.settle() == len(turns)
    if turns:
        assert value_of(found) == len(turns)
    assert len(list(folder.glob("*.rows"))) <= 3
    again.close()


def test_one_turn_a_step_takes_two_files(tmp_path: Path) -> None:
    begun(tmp_path / "work", 5)
    assert len(list((tmp_path / "work").glob("*.rows"))) == 2


def test_a_walk_goes_on_with_files_and_facts(tmp_path: Path) -> None:
    begun(tmp_path / "work", 2)
    (tmp_path / "work" / "file-3").write_text("half a st")  # of a step that was not committed
    work, stream = open_work(tmp_path / "work")
    assert work.settle() == 2
    assert (value_of(stream), work.facts) == (2, {"number": 2})
    assert [work.path(f"file-{number}").read_text()[0] for number in (1, 2)] == ["1", "2"]
    step(work, stream, is_last=True)
    assert not list((tmp_path / "work").glob("*.rows"))
    work.close()
    work, _ = open_work(tmp_path / "work")
    assert work.settle() == 3
    assert work.facts == {"number": 3}
    work.close()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def without_checks(path: Path) -> None:
    plain = json.loads(path.read_text())
    plain["marks"][0]["streams"]["hidden"]["check_sums"].pop()
    path.write_text(json.dumps(plain))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the stream": lambda folder: flip(folder / "hidden-1.rows", 100),
    "the stream is cut off": lambda folder: os.truncate(folder / "hidden-1.rows", 64),
    "the stream is gone": lambda folder: (folder / "hidden-1.rows").unlink(),
    "a bit of a file": lambda folder: flip(folder / "file-1", 3),
    "a file is longer": lambda folder: (folder / "file-2").write_text("2" * 11),
    "a file is gone": lambda folder: (folder / "file-1").unlink(),
    "a file is a folder": lambda folder: ((folder / "file-1").unlink(), (folder / "file-1").mkdir()),
    "the marker is cut off": lambda folder: os.truncate(folder / MARKER, 40),
    "the marker is empty": lambda folder: os.truncate(folder / MARKER, 0),
    "the marker is no record": lambda folder: (folder / MARKER).write_text('{"marks": 3}'),
    "the marker is of another version": lambda folder: (folder / MARKER).write_text(
        (folder / MARKER).read_text().replace('"schema_version": 1', '"schema_version": 99')
    ),
    "the marker names too few batches": lambda folder: without_checks(folder / MARKER),
    "the marker names a file elsewhere": lambda folder: (folder / MARKER).write_text(
        (folder / MARKER).read_text().replace('"file-1"', '"../elsewhere/file-1"')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_again(damage: str, tmp_path: Path) -> None:
    begun(tmp_path / "work", 2)
    DAMAGE[damage](tmp_path / "work")
    work, stream = open_work(tmp_path / "work")
    assert work.settle() == 0
    assert work.facts == {}
    assert not list((tmp_path / "work").iterdir())
    step(work, stream)
    assert value_of(stream) == 1
    work.close()


def test_the_folder_of_another_walk_is_not_gone_on_with(tmp_path: Path) -> None:
    begun(tmp_path / "work", 2)
    work, _ = open_work(tmp_path / "work", OTHER)
    assert work.settle() == 0
    work.close()
    begun(tmp_path / "others", 1)
    work = Work(tmp_path / "others", KEY)
    work.stream("dense", BATCHES, WIDTH)
    assert work.settle() == 0


def test_everything_that_decides_the_bits_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = documents(2)
    inputs: tuple[Any, ...] = ("model", (one, two), 2048, CPU, Ranks(), "more")
    other: tuple[Any, ...] = ("else", (two, one), 512, Device("cuda:0"), Ranks(0, 2), "less")
    keys = [walk_key(*inputs[:place], other[place], *inputs[place + 1 :]) for place in range(len(inputs))]
    keys += [walk_key(*inputs[:4], Ranks(1, 2), "more"), walk_key(*inputs)]
    monkeypatch.setattr("cusprun.walk.work_folder.__version__", "0.0")
    keys.append(walk_key(*inputs))
    assert len(set(keys)) == len(keys)
    assert walk_key(*inputs) == keys[-1]


def fill_disk(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: int) -> None:
    """Let every call of a function fail as on a full disk, but for the first ones."""
    own, calls = getattr(owner, name), [0]

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return own(*args, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(spill.os, "posix_fallocate", 0), (spill.os, "posix_fallocate", 1), (Path, "write_bytes", 3)],
)
def test_a_full_disk_is_told_and_what_was_finished_is_found(
    owner: Any, name: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(steps: int) -> int:
        with working(Workspace(folder=tmp_path), "score", KEY) as work:
            stream = work.stream("hidden", BATCHES, WIDTH)
            found = work.settle()
            for _ in range(steps):
                step(work, stream)
        return found

    with monkeypatch.context() as full:
        fill_disk(full, owner, name, after)
        with pytest.raises(OutputError, match=r"No space left.*free some space.*--workdir"):
            run(6)
    assert run(1) == after  # each step asks once
    assert not list((tmp_path / "work").iterdir())


def test_the_folder_goes_with_the_end_and_stays_with_an_error(tmp_path: Path) -> None:
    workspace, folder = Workspace(folder=tmp_path), tmp_path / "work" / f"score-{KEY}"

    def run(error: BaseException | None, steps: int) -> int:
        with working(workspace, "score", KEY) as work:
            stream = work.stream("hidden", BATCHES, WIDTH)
            found = work.settle()
            for _ in range(steps):
                step(work, stream)
            if error is not None:
                raise error
        return found

    for error, steps, stays in (
        (KeyboardInterrupt(), 0, False),  # with nothing to go on from
        (KeyboardInterrupt(), 2, True),
        (ValueError(), 1, True),
        (torch.OutOfMemoryError(), 0, False),  # the next try has other batches
    ):
        with pytest.raises(type(error)):
            run(error, steps)
        assert folder.exists() is stays
    assert run(None, 2) == 0
    assert not folder.exists()


def test_a_second_owner_works_apart_and_finds_nothing(tmp_path: Path) -> None:
    workspace = Workspace(folder=tmp_path)
    with pytest.raises(KeyboardInterrupt), working(workspace, "score", KEY) as work:  # noqa: PT012
        stream = work.stream("hidden", BATCHES, WIDTH)
        work.settle()
        step(work, stream)
        with working(workspace, "score", KEY) as second:
            own = second.stream("hidden", BATCHES, WIDTH)
            assert second.folder != work.folder
            assert second.settle() == 0
            step(second, own)
            step(second, own)
            assert value_of(own) == 2
            assert second.path("file-1").read_text() == "1" * 10
        assert not second.folder.exists()
        assert value_of(stream) == 1
        raise KeyboardInterrupt
    with working(workspace, "score", KEY) as work:
        work.stream("hidden", BATCHES, WIDTH)
        assert work.settle() == 1


def test_what_nobody_will_look_into_is_removed(tmp_path: Path) -> None:
    parent = tmp_path / "work"
    old = time.time() - 40 * 86_400
    for name in (f"score-{OTHER}", f"score-{OTHER}.abc", f"refit-{OTHER}", "mine", "score-1"):
        (parent / name).mkdir(parents=True)
        (parent / name / "file").write_text("x")
    for name in (f"refit-{OTHER}", "mine", "score-1"):
        os.utime(parent / name, (old, old))
    with working(Workspace(folder=tmp_path), "score", KEY):
        assert {path.name for path in parent.iterdir()} == {
            f"score-{KEY}", f"score-{OTHER}", "mine", "score-1",
        }  # fmt: skip


def test_without_a_folder_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), working(Workspace(), "score", KEY) as work:  # noqa: PT012
        stream = work.stream("hidden", BATCHES, WIDTH)
        assert work.settle() == 0
        step(work, stream)
        step(work, stream)
        assert value_of(stream) == 2
        assert not list(tmp_path.rglob("*.rows"))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


class Threads(Ranks):
    """Ranks that are threads of this process."""

    meetings: dict[int, tuple[threading.Barrier, list[torch.Tensor]]]

    @classmethod
    def make(cls, size: int) -> list[Threads]:
        ranks = [cls(rank, size) for rank in range(size)]
        shared = (threading.Barrier(size, timeout=60), [torch.zeros(0)] * size)
        for each in ranks:
            object.__setattr__(each, "meetings", shared)
        return ranks

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        barrier, places = self.meetings  # type: ignore[misc]
        places[self.rank] = tensor.clone()  # type: ignore[index]
        barrier.wait()
        total = torch.stack(list(places)).sum(dim=0)  # type: ignore[arg-type]
        barrier.wait()
        return total


def on_all(size: int, work: Callable[[Threads], object]) -> list[Any]:
    found: list[Any] = [None] * size

    def run(rank: Threads) -> None:
        try:
            found[rank.rank] = work(rank)
        except KeyboardInterrupt:
            found[rank.rank] = "ended"

    threads = [threading.Thread(target=run, args=(rank,)) for rank in Threads.make(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_ranks_go_on_from_the_step_that_all_have(behind: int, tmp_path: Path) -> None:
    """One rank ends before it has committed its third step, the others behind it."""

    def first(rank: Threads) -> None:
        work, stream = open_work(tmp_path / str(rank.rank), ranks=rank)
        work.settle()
        step(work, stream)
        step(work, stream)
        fill(stream, 3)
        if rank.rank != behind:
            # What waits for the others comes after the marker.
            object.__setattr__(rank, "add", lambda _tensor: (_ for _ in ()).throw(KeyboardInterrupt()))
            work.commit({"number": 3})

    def second(rank: Threads) -> tuple[int, float, Any]:
        work, stream = open_work(tmp_path / str(rank.rank), ranks=rank)
        steps = work.settle()
        found = value_of(stream), work.facts["number"]
        step(work, stream)
        step(work, stream, is_last=True)
        work.close()
        return steps, *found

    def third(rank: Threads) -> int:
        return open_work(tmp_path / str(rank.rank), ranks=rank)[0].settle()

    on_all(3, first)
    assert on_all(3, second) == [(2, 2, 2)] * 3
    assert on_all(3, third) == [4] * 3
    flip(tmp_path / str(behind) / "file-1", 2)
    assert on_all(3, third) == [0] * 3
