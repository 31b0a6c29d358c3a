"""The thread that generates: turns, ends, failures; and the way of its pieces to the event loop."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator

import pytest

from serve.onnx_server.channel import Channel
from serve.onnx_server.scheduler import Job, Scheduler

LIMIT_S = 60  # a failing test ends; a passing one waits for events only


class Log:
    """What jobs did, in order, and a wait for each of their ends."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.failures: list[Exception] = []
        self.started = threading.Semaphore(0)
        self.closed = threading.Semaphore(0)

    def job(self, name: str, count: int, gate: threading.Event | None = None) -> Job[str]:
        def steps() -> Generator[str | None, None, None]:
            self.started.release()
            try:
                for number in range(count):
                    if gate is not None:
                        assert gate.wait(LIMIT_S)
                    yield f"{name}{number}" if number != 1 else None
            finally:
                self.closed.release()

        return Job(steps, self.seen.append, self.failures.append)

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.closed.acquire(timeout=LIMIT_S)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    made = Scheduler(parallel=2)
    yield made
    made.close()


def test_two_take_turns_and_the_third_waits(scheduler: Scheduler) -> None:
    log, gate = Log(), threading.Event()
    for name in "abc":
        scheduler.submit(log.job(name, 3, gate))
    gate.set()
    log.wait(3)
    # b joins after a's first step; steps that give None deliver nothing
    assert log.seen == ["a0", "b0", "a2", "b2", "c0", "c2"]


def test_cancelled_jobs_give_their_place_up(scheduler: Scheduler) -> None:
    log, gate = Log(), threading.Event()
    jobs = [log.job(name, 10**9, gate) for name in "ab"] + [log.job("c", 1), log.job("d", 1)]
    for job in jobs:
        scheduler.submit(job)
    assert log.started.acquire(timeout=LIMIT_S)  # a is in its first step
    scheduler.cancel(jobs[2])
    scheduler.cancel(jobs[0])
    gate.set()
    log.wait(2)  # a is closed, d has run
    assert "d0" in log.seen
    assert "c0" not in log.seen
    scheduler.cancel(jobs[1])
    log.wait(1)
    assert log.failures == []


def test_a_job_that_fails_ends_alone(scheduler: Scheduler) -> None:
    def steps() -> Generator[str | None, None, None]:
        yield "x0"
        raise ValueError("no more")

    log = Log()
    scheduler.submit(Job(steps, log.seen.append, log.failures.append))
    scheduler.submit(log.job("a", 4))
    log.wait(1)
    assert [str(error) for error in log.failures] == ["no more"]
    assert log.seen.count("a3") == 1
    assert scheduler.failure is None


def test_closing_fails_what_is_left() -> None:
    scheduler, log, gate = Scheduler(parallel=1), Log(), threading.Event()
    scheduler.submit(log.job("a", 10**9, gate))
    scheduler.submit(log.job("b", 1))
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    gate.set()
    closing.join(LIMIT_S)
    assert len(log.failures) == 2
    assert scheduler.num_running == scheduler.num_waiting == 0
    with pytest.raises(RuntimeError, match="ending"):
        scheduler.submit(log.job("c", 1))


def test_channel_loses_nothing_and_hands_over_what_waits_together() -> None:
    async def collect() -> tuple[list[list[int]], list[int]]:
        channel: Channel[int] = Channel()
        for number in range(5):
            channel.put(number)
        first = [await channel.get()]
        thread = threading.Thread(target=lambda: [channel.put(number) for number in range(20_000)])
        thread.start()
        found: list[int] = []
        while len(found) < 20_000:
            found += await asyncio.wait_for(channel.get(), LIMIT_S)
        return first, found

    first, found = asyncio.run(collect())
    assert first == [[0, 1, 2, 3, 4]]
    assert found == list(range(20_000))


def test_putting_after_the_loop_has_ended_is_no_error() -> None:
    async def make() -> Channel[int]:
        return Channel()

    asyncio.run(make()).put(1)


def test_it_rests_once_after_the_last_job_and_again_after_the_next() -> None:
    log, rested = Log(), threading.Semaphore(0)
    scheduler = Scheduler(1, rest=rested.release, rest_after_s=0.01)
    try:
        assert not rested.acquire(timeout=0.1)  # there was no job yet
        for _ in range(2):
            scheduler.submit(log.job("a", 2))
            assert rested.acquire(timeout=LIMIT_S)
            assert scheduler.num_running == 0
        assert not rested.acquire(timeout=0.1)
    finally:
        scheduler.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives memory back itself")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks of 100 kB, too small to be mapped, with one that is kept above them all."""
    source = """
import ctypes, pathlib
from serve.onnx_server.freed import give_back
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])
blocks = [libc.malloc(100_000) for _ in range(500)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:
    libc.free(block)
held = resident()
give_back()
print(held - resident())
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40_000
