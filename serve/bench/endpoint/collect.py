"""The order of a load test: warm-up, then endpoints in turns, level by level, round by round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cusprun.progress import Advance
from serve.bench.endpoint.client import Client
from serve.bench.endpoint.levels import closed_loop, open_loop, together
from serve.bench.endpoint.prompts import Prompts
from serve.bench.endpoint.records import CONCURRENCY, Level, LevelRun, LoadOptions
from serve.bench.endpoint.schedule import arrivals, turns
from serve.bench.endpoint.summary import summarise
from serve.bench.endpoint.timeline import CountTokens, Timeline, judge


@dataclass(frozen=True)
class Workload:
    """What is sent, and how its answers are counted where the endpoint does not count them."""

    options: LoadOptions
    prompts: Prompts
    count_tokens: CountTokens | None = None


async def warm_up(client: Client, work: Workload, key: str) -> None:
    """Send requests that do not count, all at once; what becomes of them the levels will tell."""
    options = work.options
    prompts = work.prompts.draw(options.warmup, f"{key}/warm-up")
    await together(client.ask(prompt, options.output_tokens) for prompt in prompts)


async def collect(
    clients: Sequence[Client], work: Workload, keep: Callable[[LevelRun], None], advance: Advance
) -> None:
    """Run every level of every endpoint in every round; ``keep`` gets each run as it ends.

    Endpoints get the same prompts at the same moments, except that one that is given twice gets others the
    second time, which it cannot have kept. ``advance`` is called after each request.
    """
    options = work.options
    urls = [client.endpoint.url for client in clients]
    twins = [urls[:place].count(url) for place, url in enumerate(urls)]
    for client, twin in zip(clients, twins, strict=True):
        await warm_up(client, work, f"{twin}")
    rounds = options.num_rounds(len(clients))
    for number, level, endpoint in turns(len(clients), options.levels, rounds, options.seed):
        key = f"{number}/{level}"
        prompts = work.prompts.draw(options.requests, f"{key}/{twins[endpoint]}")
        began_s = clients[endpoint].clock()
        seen = await _run_level(clients[endpoint], options, options.levels[level], prompts, key, advance)
        keep(_reduce(seen, began_s, endpoint, options.levels[level], number, work))


async def _run_level(
    client: Client, options: LoadOptions, level: Level, prompts: Sequence[str], key: str, advance: Advance
) -> list[Timeline]:
    async def ask(prompt: str, due_s: float) -> Timeline:
        seen = await client.ask(prompt, options.output_tokens, due_s)
        advance(1)
        return seen

    if level.kind == CONCURRENCY:
        return await closed_loop(ask, prompts, int(level.value), client.clock)
    due = arrivals(level.value, len(prompts), options.seed, key)
    return await open_loop(ask, prompts, due, client.clock)


def _reduce(
    seen: Sequence[Timeline], began_s: float, endpoint: int, level: Level, number: int, work: Workload
) -> LevelRun:
    """Turn what was seen into records, after the run: counting tokens takes time that the requests need."""
    duration_s = max(one.end_s for one in seen) - began_s
    options = work.options
    records = tuple(judge(one, options.output_tokens, began_s, work.count_tokens) for one in seen)
    summary = summarise(records, duration_s, options.requests, options)
    return LevelRun(endpoint, level, number, duration_s, records, summary)
