"""When requests are due and whose turn it is, drawn from a seed. Pure."""

from __future__ import annotations

import random
from itertools import accumulate

from serve.bench.endpoint.records import Level


def arrivals(rate: float, count: int, seed: int, key: str) -> list[float]:
    """Return when ``count`` requests are due, in seconds: a Poisson process of ``rate`` requests per second.

    Its gaps are independent and exponential with mean 1 / ``rate``. ``key`` names the run: the same seed and
    key give the same moments.
    """
    generator = random.Random(f"{seed}/{key}/arrivals")
    return list(accumulate(generator.expovariate(rate) for _ in range(count)))


def turns(
    num_endpoints: int, levels: tuple[Level, ...], rounds: int, seed: int
) -> list[tuple[int, int, int]]:
    """Return (round, level, endpoint) of every run in the order in which they are run.

    The endpoints take turns level by level. Each order that is drawn is followed, in the next round of the
    same level, by its reverse, so that no endpoint is first more often than chance and one round allow.
    """
    generator = random.Random(f"{seed}/turns")
    orders: dict[int, list[int]] = {}
    found = []
    for number in range(rounds):
        for level in range(len(levels)):
            if number % 2:
                order = orders[level][::-1]
            else:
                order = generator.sample(range(num_endpoints), num_endpoints)
            orders[level] = order
            found += [(number, level, endpoint) for endpoint in order]
    return found
