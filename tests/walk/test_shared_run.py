"""What a launcher says, how processes meet, and how each learns why the run failed."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch.distributed
from ranked import ROOT, free_port, launched

from cusprun.errors import RankError, UserError
from cusprun.walk import shared_run
from cusprun.walk.launch import launch_of
from cusprun.walk.ranks import ALONE
from cusprun.walk.shared_run import SharedRun
from cusprun.walk.watch import Failure, Watch

BEAT_S = 0.02


def store() -> Any:
    made: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]
    return made


class Pair:
    """Two ranks that watch each other; what one hears of is in its queue."""

    def __init__(self, silent_s: float = 60.0) -> None:
        self.store = store()
        self.heard: list[queue.Queue[Failure]] = [queue.Queue(), queue.Queue()]
        self.watches = [
            Watch(self.store, rank, 2, on_failure=self.heard[rank].put, beat_s=BEAT_S, silent_s=silent_s)
            for rank in range(2)
        ]
        for watch in self.watches:
            watch.begin()

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.watches[rank].start()

    def close(self) -> None:
        for watch in self.watches:
            watch.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_posted_failure_reaches_the_other_rank(rank: int) -> None:
    pair = Pair()
    pair.start(0, 1)
    failure = Failure(rank, 2, "the model is gone")
    assert pair.watches[rank].post(failure) == failure
    assert pair.heard[1 - rank].get(timeout=120) == failure
    with pytest.raises(RankError, match="the model is gone") as caught:
        pair.watches[1 - rank].check()
    assert caught.value.exit_code == 2
    pair.close()


def test_the_first_failure_is_the_one_that_counts() -> None:
    pair = Pair()
    first = pair.watches[1].post(Failure(1, 2, "first"))
    assert pair.watches[0].post(Failure(0, 1, "second")) == first
    pair.close()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_does_not_beat_is_lost(lost: int) -> None:
    pair = Pair(silent_s=0.2)
    pair.start(1 - lost)
    failure = pair.heard[1 - lost].get(timeout=120)
    assert failure.rank == lost
    assert failure.is_silent
    assert f"rank {lost} ended without a word" in failure.text
    pair.close()


def test_after_a_broken_connection_silence_is_noticed_at_once() -> None:
    pair = Pair()  # which would wait a minute
    pair.start(0)
    cause = pair.watches[0].explain()
    assert cause is not None
    assert cause.rank == 1
    pair.close()


def test_nobody_is_blamed_while_all_beat() -> None:
    pair = Pair()
    pair.start(0, 1)
    assert pair.watches[0].explain() is None
    pair.watches[0].check()
    pair.close()


class _Gone:
    """A store whose holder has left."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_arguments: object) -> None:
            raise RuntimeError("Broken pipe")

        return refuse


@pytest.mark.parametrize("ending", [False, True])
def test_a_store_that_goes_is_a_failure_but_at_the_end(ending: bool) -> None:
    heard: queue.Queue[Failure] = queue.Queue()
    watch = Watch(_Gone(), 1, 2, on_failure=heard.put, beat_s=BEAT_S)
    if ending:
        watch.expect_the_end()
    watch.start()
    if not ending:
        assert "cannot be reached" in heard.get(timeout=120).text
    watch.close()
    assert heard.empty()


def test_whoever_finds_the_store_gone_keeps_knowing_it() -> None:
    watch = Watch(_Gone(), 1, 2)
    cause = watch.explain()
    assert cause is not None
    assert cause.is_silent
    watch.close()
    assert watch.post(Failure(1, 3, "an echo of it")) == cause


def test_without_a_launcher_a_process_is_alone() -> None:
    for environment in ({}, {"WORLD_SIZE": "4"}, launched(0, 1, 29500)):
        with SharedRun(environment) as run:
            assert run.ranks() is ALONE


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "2"}, "contradict one another"),
        ({"RANK": "-1"}, "RANK must be a whole number, not '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"MASTER_PORT": "99999999999999"}, "MASTER_PORT must be a whole number"),
        ({"MASTER_PORT": "70000"}, "contradict one another"),
        ({"LOCAL_RANK": "5"}, "contradict one another"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SharedRun({**launched(0, 2, 29500), **variables})


def test_other_launchers_need_no_local_rank() -> None:
    four = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    here = launch_of({**four, "MASTER_ADDR": "localhost"})
    assert here is not None
    assert (here.local_rank, here.is_on_one_machine) == (1, True)
    there = launch_of({**four, "MASTER_ADDR": "node-0"})
    assert there is not None
    assert (there.local_rank, there.is_on_one_machine) == (0, False)


def meet(count: int, versions: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Open a run in threads, each with its version; return ranks or errors."""
    port, results = free_port(), [None] * count
    own = threading.local()
    monkeypatch.setattr(shared_run, "version_of_this", lambda: versions.get(own.rank, "1.0"))

    def open_one(rank: int) -> None:
        own.rank = rank
        try:
            with SharedRun(launched(rank, count, port)) as run:
                results[rank] = run.ranks().size
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=open_one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meet(3, {}, monkeypatch) == [3, 3, 3]


def test_another_version_is_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = meet(3, {2: "0.9"}, monkeypatch)
    assert {str(error) for error in errors} == {
        "rank 2 differs from rank 0 in the version of cusprun (0.9 and 1.0); give every process the same"
    }


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_run, "START_S", 0.2)
    with pytest.raises(RankError, match="of 3 processes rank 1, 2 did not come"):
        SharedRun(launched(0, 3, free_port())).ranks()


def test_a_launcher_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_run, "START_S", 0.2)
    with pytest.raises(RankError, match=r"rank 1 cannot reach the launcher's store at 127\.0\.0\.1"):
        SharedRun(launched(1, 2, free_port())).ranks()


# Each rank waits for what the other is to send; then both fail, as when a signal ends them.
UNFINISHED = """
import os, sys, torch
from cusprun.errors import ModelError
from cusprun.walk.shared_run import SharedRun

again = sys.argv[1] == "again"
try:
    with SharedRun(os.environ) as run:
        ranks = run.ranks()
        ranks.links.gloo.broadcast(torch.zeros(1), 1 - ranks.rank)
        if again:
            ranks.begin_again()
            ranks.meet()
        del ranks  # so that the run holds the last reference
        if not again:
            raise ModelError("x")
except ModelError:
    pass
print("ended")
"""


@pytest.mark.parametrize("how", ["failed", "again"])
def test_a_collective_that_never_ends_does_not_keep_its_process(how: str) -> None:
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", UNFINISHED, how],
            env={**os.environ, **launched(rank, 2, port), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [process.communicate(timeout=120)[0] for process in started] == ["ended\n"] * 2
        assert [process.returncode for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
