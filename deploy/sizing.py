"""Context, requests at once and memory: what fits, or the least that would do. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cusprun.errors import UserError
from deploy.facts import Sizing

DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_PARALLEL = 4
MIN_CONTEXT_TOKENS = 512
"""The shortest context worth serving: a question and an answer."""

SHARED_BYTES: Mapping[str, int] = {"vllm": 2**30}
"""``/dev/shm`` of a container, by format: vLLM's processes pass tensors by it, and it counts as memory."""

_CHECK_BYTES = 32 * 2**20
"""The Python of a health check or of ``ask.py``, which count as the container's memory: 19 MiB resident."""

IN_A_CONTAINER: Mapping[str, int] = {
    name: _CHECK_BYTES + SHARED_BYTES.get(name, 0) for name in ("gguf", "onnx", "vllm")
}
"""What counts as the memory of a server in a container besides its own, by format."""

_STEP_TOKENS = 256  # llama.cpp rounds the cells of its cache up to this
_HEADROOM = 1.1  # of the need: allocators and page tables, and what one machine's plan misses on another
_MIB = 2**20


class TooLittleMemoryError(UserError):
    """The memory that may be used does not hold the model; ``least_bytes`` would do."""

    def __init__(self, text: str, least_bytes: int) -> None:
        self.least_bytes = least_bytes
        super().__init__(text)


def plan(
    weights_bytes: int,
    cache_bytes_per_token: int,
    overhead_bytes: int,
    context_limit: int,
    *,
    budget_bytes: int | None = None,
    context_tokens: int | None = None,
    parallel: int | None = None,
    num_threads: int | None = None,
    buffer_bytes_per_token: int = 0,
    source: str = "planned",
    measured_in: str | None = None,
) -> Sizing:
    """Return context, requests at once and memory.

    Without a budget: 4,096 tokens, at most the model's ``context_limit``, for 4 requests, unless asked
    otherwise. With a budget: as many of the 4 requests as keep that context, then the longest context that
    fits, be it shorter or longer; what is asked for is kept. ``buffer_bytes_per_token`` is what each token of
    the context takes once, however many requests there are.

    Raises:
        UserError: the context or the number of requests cannot be.
        TooLittleMemoryError: it does not fit in ``budget_bytes``; the text says what would do.
    """
    _check(context_limit, context_tokens, parallel, budget_bytes)
    fixed = weights_bytes + overhead_bytes

    def limit(context: int, requests: int) -> int:
        return _grant(fixed + context * (requests * cache_bytes_per_token + buffer_bytes_per_token))

    usual = min(context_tokens or DEFAULT_CONTEXT_TOKENS, context_limit)
    chosen = (usual, parallel or DEFAULT_PARALLEL)
    if budget_bytes is not None:
        budget = budget_bytes // _MIB * _MIB
        least = (context_tokens or min(MIN_CONTEXT_TOKENS, context_limit), parallel or 1)
        if limit(*least) > budget:
            raise _too_little(budget_bytes, limit(*least), *least)
        asked = range(DEFAULT_PARALLEL, 0, -1) if parallel is None else [parallel]
        requests = next((count for count in asked if limit(usual, count) <= budget), asked[-1])
        longest = context_tokens or _longest(
            budget,
            fixed,
            cache_bytes_per_token * requests + buffer_bytes_per_token,
            least[0],
            context_limit,
        )
        chosen = (longest, requests)
    context, requests = chosen
    cache = context * requests * cache_bytes_per_token
    overhead = overhead_bytes + context * buffer_bytes_per_token
    return Sizing(
        context_tokens=context,
        parallel=requests,
        num_threads=num_threads,
        weights_bytes=weights_bytes,
        cache_bytes=cache,
        overhead_bytes=overhead,
        memory_bytes=weights_bytes + cache + overhead,
        memory_limit_bytes=limit(context, requests),
        source=source,
        measured_in=measured_in,
    )


def _grant(need_bytes: int) -> int:
    return math.ceil(need_bytes * _HEADROOM / _MIB) * _MIB


def _longest(budget: int, fixed: int, bytes_per_token: int, least: int, most: int) -> int:
    """Return the most tokens, in steps, whose grant is within the budget; at least ``least``, which fits."""
    if bytes_per_token == 0:
        return most
    fitting = int((budget / _HEADROOM - fixed) // bytes_per_token)
    tokens = most if fitting >= most else max(least, fitting // _STEP_TOKENS * _STEP_TOKENS)
    while tokens > least and _grant(fixed + tokens * bytes_per_token) > budget:
        tokens = max(least, tokens - _STEP_TOKENS)  # a rounding at the edge
    return tokens


def _check(context_limit: int, context: int | None, parallel: int | None, budget: int | None) -> None:
    for name, value in (("context", context), ("parallel", parallel), ("memory", budget)):
        if value is not None and value < 1:
            raise UserError(f"the {name} must be at least 1, not {value}")
    if context is not None and context > context_limit:
        raise UserError(
            f"the context of {context:,} tokens is over the model's {context_limit:,}; ask for at most that"
        )


def _too_little(budget: int, least_bytes: int, context: int, parallel: int) -> TooLittleMemoryError:
    requests = f"{parallel} requests" if parallel > 1 else "one request"
    return TooLittleMemoryError(
        f"{budget / 1e6:,.0f} MB are too little: with a context of {context:,} tokens for {requests} at once "
        f"the server needs {least_bytes / 1e6:,.0f} MB; give --memory {math.ceil(least_bytes / 1e6)}MB or "
        "more, or export a smaller precision",
        least_bytes,
    )
