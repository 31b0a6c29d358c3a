"""One measurement in a process of its own: a job as JSON on stdin, one line of JSON on stdout.

``measure`` knows nothing of llama.cpp or of the real clock; both are handed to it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from cusprun.codec import from_plain, to_plain
from cusprun.errors import CusprunError, MissingDependencyError
from serve.bench.memory import own_memory
from serve.bench.records import Fault, Job, Measurement, Memory, Reply

WARM_UP_DECODE_TOKENS = 8


class Engine(Protocol):
    """A runtime as the benchmark sees it; each call returns when its work is really done."""

    num_vocabulary: int
    num_parameters: int
    context_length: int
    runtime: str

    def load(self, job: Job) -> None:
        """Load the model and make a context that holds the whole job."""

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""

    def forward(self, tokens: Sequence[int]) -> None:
        """Append tokens to the cache and compute the logits of the last one."""

    def choose(self) -> int:
        """Return the most probable next token."""

    def clear(self) -> None:
        """Empty the cache."""

    def close(self) -> None:
        """Free everything."""


def measure(
    engine: Engine,
    job: Job,
    clock: Callable[[], float] = time.perf_counter,
    read_memory: Callable[[], Memory] = own_memory,
) -> Measurement:
    """Load the model, warm up, and time one prompt and its continuation; ``clock`` gives seconds.

    The continuation is drawn from the seed and not from the model, so that both files do the same work; the
    choice is made all the same, because a user waits for it too.
    """
    start = clock()
    engine.load(job)
    load_s = clock() - start
    try:
        prompt, fill, continuation = job_tokens(job, engine)
        engine.forward(prompt)
        for token in continuation[:WARM_UP_DECODE_TOKENS]:
            engine.forward([token])
            engine.choose()
        engine.clear()

        start = clock()
        engine.forward(prompt)
        prefill_s = clock() - start
        engine.choose()
        first_token_s = clock() - start
        if fill:
            engine.forward(fill)
        latencies = []
        for token in continuation:
            start = clock()
            engine.forward([token])
            engine.choose()
            latencies.append(1000 * (clock() - start))
        return Measurement(
            load_time_ms=1000 * load_s,
            prefill_ms=1000 * prefill_s,
            time_to_first_token_ms=1000 * first_token_s,
            inter_token_latencies_ms=tuple(latencies),
            num_prompt_tokens=len(prompt),
            num_parameters=engine.num_parameters,
            context_length=engine.context_length,
            memory=read_memory(),
            runtime=engine.runtime,
        )
    finally:
        engine.close()


def job_tokens(job: Job, engine: Engine) -> tuple[list[int], list[int], list[int]]:
    """Return the prompt, what fills the cache up to the decode depth, and the continuation."""
    generator = random.Random(job.seed)
    needed = job.decode_depth + job.num_decode_tokens
    if job.prompt_text is None:
        tokens = [generator.randrange(engine.num_vocabulary) for _ in range(needed)]
    else:
        text = engine.tokenize(job.prompt_text)
        tokens = (text * (needed // len(text) + 1))[:needed]
    return (
        tokens[: job.num_prompt_tokens],
        tokens[job.num_prompt_tokens : job.decode_depth],
        tokens[job.decode_depth :],
    )


def reply_to(text: str, make_engine: Callable[[], Engine]) -> Reply:
    """Do the job in ``text`` and return the reply; what the input is to blame for becomes a fault."""
    try:
        job: Job = from_plain(Job, json.loads(text))
        return Reply(measurement=measure(make_engine(), job))
    except MissingDependencyError as error:
        return Reply(fault=Fault("dependency", str(error)))
    except CusprunError as error:
        return Reply(fault=Fault("model", str(error)))


def _llama_cpp_engine() -> Engine:
    from serve.bench.llamacpp_engine import LlamaCppEngine

    return LlamaCppEngine()


def main() -> None:
    """Answer one job; nothing but the reply reaches the real stdout, whatever native code prints."""
    reply_fd = os.dup(1)
    os.dup2(2, 1)
    reply = reply_to(sys.stdin.read(), _llama_cpp_engine)
    with os.fdopen(reply_fd, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(to_plain(reply)) + "\n")


if __name__ == "__main__":
    main()
