"""One prompt's answer, token by token, as steps for the scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from serve.api.stops import StopFilter
from serve.onnx_server.detokenise import Detokenizer
from serve.onnx_server.model import OnnxModel
from serve.onnx_server.prompts import Prompt
from serve.onnx_server.wishes import Wish

PIECE_INTERVAL_S = 1 / 30
"""Least time between two pieces of a stream, but for the first and the last. An event takes a processor from
the threads that compute: at 100 tokens per second on 2 cores one for each token cost 9 % of the speed."""


@dataclass
class Counts:
    """Tokens since the start; written by the scheduler's thread alone."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


@dataclass(frozen=True)
class Piece:
    """More text of the choice ``index``; the last has a reason, and the number of all its tokens."""

    index: int
    text: str
    num_tokens: int
    finish_reason: str | None = None


def generate(
    model: OnnxModel,
    prompt: Prompt,
    wish: Wish,
    index: int,
    in_pieces: bool,
    counts: Counts,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Piece | None, None, None]:
    """Yield once for each token: the text that can be shown, None while there is none or it comes too soon.

    The first step reads the prompt too. Without ``in_pieces`` all the text comes at the end.
    """
    room = model.context_tokens - len(prompt.token_ids)
    limit = room if wish.max_new_tokens is None else min(room, wish.max_new_tokens)
    generator = model.start(prompt.token_ids, limit, wish.search)
    try:
        counts.num_prompt_tokens += len(prompt.token_ids)
        before = prompt.token_ids if prompt.continues else ()
        detokenizer = Detokenizer(model.folder.detokenize, before)
        stop = StopFilter(wish.stops)
        text = ""
        shown_at = -PIECE_INTERVAL_S
        for num_tokens in range(1, limit + 1):
            token = generator.next()
            counts.num_generated_tokens += 1
            is_end = token in model.stop_ids and not wish.ignore_eos
            if not is_end:
                text += stop.push(detokenizer.push(token))
            if is_end or stop.is_stopped or num_tokens == limit:
                text += stop.push(detokenizer.finish())
                reason = "stop" if is_end or stop.is_stopped else "length"
                yield Piece(index, text + stop.finish(), num_tokens, reason)
                return
            if in_pieces and text and clock() - shown_at >= PIECE_INTERVAL_S:
                shown_at = clock()
                yield Piece(index, text, num_tokens)
                text = ""
            else:
                yield None
    finally:
        generator.close()
