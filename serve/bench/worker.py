"""One measurement in a process of its own: a job as JSON on stdin, one line of JSON on stdout.

``measure`` knows nothing of any runtime or of the real clock; both are handed to it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cusprun.codec import from_plain, to_plain
from cusprun.errors import CusprunError, MissingDependencyError
from serve.bench.energy import machine_meter
from serve.bench.engines import open_engine
from serve.bench.measurement import Fault, Job, Measurement, Memory, Reply, Timing
from serve.bench.memory import own_memory
from serve.bench.stepping import Gauges

WARM_UP_DECODE_TOKENS = 8


class Engine(Protocol):
    """A runtime as the benchmark sees it; ``num_parameters`` and ``context_length`` None where it has none.

    ``pids`` are the processes that it started.
    """

    num_vocabulary: int
    num_parameters: int | None
    context_length: int | None
    library: str
    pids: Sequence[int]

    def load(self, job: Job) -> None:
        """Load the model and make room for the job's largest cache."""

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""

    def run(self, prompt: Sequence[int], continuation: Sequence[int], gauges: Gauges) -> Timing:
        """Read the prompt into an empty cache and go on for as many tokens as ``continuation`` has."""

    def close(self) -> None:
        """Free everything."""


def measure(
    engine: Engine,
    job: Job,
    gauges: Gauges,
    read_memory: Callable[[Path, Sequence[int]], Memory] = own_memory,
) -> Measurement:
    """Load the model, warm up with the longest prompt, and time every point of the job."""
    start = gauges.clock()
    engine.load(job)
    load_s = gauges.clock() - start
    try:
        tokens, continuation = job_tokens(job, engine)
        engine.run(tokens, continuation[:WARM_UP_DECODE_TOKENS], gauges)
        timings = tuple(
            engine.run(tokens[:point], continuation if point in job.context_depths else (), gauges)
            for point in job.points
        )
        return Measurement(
            load_time_ms=1000 * load_s,
            timings=timings,
            num_parameters=engine.num_parameters,
            context_length=engine.context_length,
            memory=read_memory(Path(job.path), engine.pids),
            library=engine.library,
        )
    finally:
        engine.close()


def job_tokens(job: Job, engine: Engine) -> tuple[list[int], list[int]]:
    """Return the longest prompt, of which the shorter ones are the beginning, and the continuation."""
    generator = random.Random(job.seed)
    longest = job.points[-1]
    needed = longest + job.num_decode_tokens
    if job.prompt_text is None:
        tokens = [generator.randrange(engine.num_vocabulary) for _ in range(needed)]
    else:
        text = engine.tokenize(job.prompt_text)
        tokens = (text * (needed // len(text) + 1))[:needed]
    return tokens[:longest], tokens[longest:]


def reply_to(text: str, make_engine: Callable[[str], Engine] = open_engine) -> Reply:
    """Do the job in ``text`` and return the reply; what the input is to blame for becomes a fault."""
    gauges = Gauges(time.perf_counter, machine_meter().read)
    try:
        job: Job = from_plain(Job, json.loads(text))
        return Reply(measurement=measure(make_engine(job.runtime), job, gauges))
    except MissingDependencyError as error:
        return Reply(fault=Fault("dependency", str(error)))
    except CusprunError as error:
        return Reply(fault=Fault("model", str(error)))


def answer(make_engine: Callable[[str], Engine] = open_engine) -> None:
    """Answer one job; nothing but the reply reaches the real stdout, whatever native code prints."""
    reply_fd = os.dup(1)
    os.dup2(2, 1)
    reply = reply_to(sys.stdin.read(), make_engine)
    with os.fdopen(reply_fd, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(to_plain(reply)) + "\n")


if __name__ == "__main__":
    # Only from here on: -m imports from the folder that it was started in, which must not be a user's.
    for folder in sys.argv[1:]:
        os.chdir(folder)
    answer()
