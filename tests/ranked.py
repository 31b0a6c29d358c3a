"""Ranks for tests: as threads of this process, and as processes that a launcher would start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed

from cusprun.walk.group import GroupRanks, Links
from cusprun.walk.launch import Launch
from cusprun.walk.watch import Watch

T = TypeVar("T")
ROOT = Path(__file__).parent.parent


class Threads:
    """Ranks that are threads; :meth:`call` calls a function with each, at the same time."""

    def __init__(self, ranks: Sequence[GroupRanks], pool: ThreadPoolExecutor) -> None:
        self.ranks, self._pool = ranks, pool

    def call(self, function: Callable[[GroupRanks], T]) -> list[T]:
        return list(self._pool.map(function, self.ranks))

    def errors(self, function: Callable[[GroupRanks], object]) -> list[Exception]:
        def failing(ranks: GroupRanks) -> Exception:
            try:
                function(ranks)
            except Exception as error:
                return error
            raise AssertionError(f"rank {ranks.rank} met no error")

        return self.call(failing)


@contextmanager
def threads_of_ranks(
    count: int, by_machine: int | None = None, *, is_watched: bool = False
) -> Iterator[Threads]:
    """Yield ranks joined by gloo, ``by_machine`` of them said to be on one machine.

    Where they are watched, they learn of one another's failures.
    """
    store: Any = torch.distributed.HashStore()

    def join(rank: int) -> GroupRanks:
        launch = Launch(rank, count, rank, count, "127.0.0.1", 1)
        links = Links(store, launch, timedelta(seconds=60))
        local = rank % (by_machine or count)
        watch = Watch(store, rank, count, beat_s=0.05)
        watch.begin()
        return GroupRanks(rank, count, local, links, watch)

    with ThreadPoolExecutor(count) as pool:
        ranks = list(pool.map(join, range(count)))
        for own in ranks if is_watched else ():
            own.watch.start()
        yield Threads(ranks, pool)
        for own in ranks:
            own.watch.close()
            if is_watched:  # else the end of one group waits for that of the other threads'
                own.links.abandon()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets, for a run whose first process holds the store."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_ranks(
    size: int, arguments: Sequence[object], cwd: Path, own: Mapping[int, Sequence[object]] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run Python with ``arguments`` in ``size`` processes, with others for the ranks in ``own``.

    One process runs without a launcher's variables.
    """
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, (own or {}).get(rank, arguments))],
            cwd=cwd,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                **(launched(rank, size, port) if size > 1 else {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    ended = []
    for process in started:
        out, err = process.communicate()
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended
