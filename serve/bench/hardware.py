"""What memory and processor do with a number of threads, measured in a process of its own with numpy.

``python -m serve.bench.hardware`` reads a job as JSON from stdin and prints a ``Speeds`` for each number of
bytes. Memory is read over and over in a buffer of the model's size, since a cache that holds the model holds
the buffer too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cusprun.codec import from_plain, to_plain
from cusprun.errors import CusprunError
from serve.bench.roofline import Speeds

_PASSES = 5
_PASS_S = 0.15
_BLOCK_BYTES = 1 << 20
_MOST_BYTES = 1 << 31
_MATRIX = 768
_LIMIT_S = 120.0
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"), "1"
)


@dataclass(frozen=True)
class HardwareJob:
    """Sizes in bytes to read, and how many threads do it."""

    sizes: tuple[int, ...]
    num_threads: int


def measure_hardware(sizes: Sequence[int], num_threads: int) -> dict[int, Speeds] | None:
    """Return the speeds for each size, or None where they cannot be measured."""
    job = HardwareJob(tuple(sizes), num_threads)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "serve.bench.hardware"],
            input=json.dumps(to_plain(job)),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, **_ONE_THREAD},  # the threads are ours, each with its own part
            check=True,
        )
        found = [from_plain(Speeds, plain) for plain in json.loads(done.stdout)]
    except (subprocess.SubprocessError, OSError, ValueError, CusprunError):
        return None
    return dict(zip(sizes, found, strict=True))


def bytes_per_second(num_bytes: int, pool: ThreadPoolExecutor, num_threads: int) -> float:
    """Return the rate at which threads together read a buffer, the median of some passes."""
    import numpy as np

    size = max(_BLOCK_BYTES, min(num_bytes, _MOST_BYTES) // num_threads)
    parts = [np.ones(size // 4, np.float32) for _ in range(num_threads)]
    step = _BLOCK_BYTES // 4

    def read(part: Any) -> None:
        for start in range(0, len(part), step):
            block = part[start : start + step]
            np.dot(block, block)

    return sum(part.nbytes for part in parts) * _rate(lambda: list(pool.map(read, parts)))


def flops_per_second(pool: ThreadPoolExecutor, num_threads: int) -> float:
    """Return the rate of float32 operations of threads that multiply matrices of their own."""
    import numpy as np

    pairs = [[np.ones((_MATRIX, _MATRIX), np.float32) for _ in range(2)] for _ in range(num_threads)]
    return (
        2.0 * _MATRIX**3 * num_threads * _rate(lambda: list(pool.map(lambda pair: pair[0] @ pair[1], pairs)))
    )


def _rate(work: Callable[[], object]) -> float:
    """Return how often work is done per second: the median of passes, each long enough for the clock."""
    work()
    rates = []
    for _ in range(_PASSES):
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < _PASS_S:
            work()
            count += 1
        rates.append(count / passed)
    return sorted(rates)[_PASSES // 2]


def main() -> None:
    """Answer one job."""
    job: HardwareJob = from_plain(HardwareJob, json.loads(sys.stdin.read()))
    with ThreadPoolExecutor(job.num_threads) as pool:
        flops = flops_per_second(pool, job.num_threads)
        found = [Speeds(bytes_per_second(size, pool, job.num_threads), flops) for size in job.sizes]
    sys.stdout.write(json.dumps(to_plain(found)))


if __name__ == "__main__":
    main()
