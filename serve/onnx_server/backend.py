"""The backend of an ONNX folder: checked requests to jobs, and their pieces to answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from serve.api.answers import Answer, Choice, Usage, answer_to
from serve.api.errors import ApiError
from serve.api.events import event
from serve.api.requests import Request
from serve.front.backend import Stream, Whole
from serve.onnx_server.channel import Channel
from serve.onnx_server.freed import give_back
from serve.onnx_server.generation import Counts, Piece, generate
from serve.onnx_server.model import OnnxModel
from serve.onnx_server.prompts import Prompt, read_prompts
from serve.onnx_server.scheduler import Job, Scheduler
from serve.onnx_server.wishes import Wish, read_wish

_LONG_BODY_BYTES = 32768
"""Bodies above are tokenised beside the event loop, which takes 4 ms for so much text."""


class OnnxBackend:
    """Answers from one model, at most ``parallel`` prompts at once, one token of each in turn."""

    def __init__(self, model: OnnxModel, name: str, parallel: int) -> None:
        self._model = model
        self._name = name
        self._scheduler = Scheduler(parallel, rest=give_back)
        self._counts = Counts()

    async def answer(self, request: Request) -> Whole | Stream:
        """Answer one request."""
        wish = read_wish(request, self._model.vocab_size)
        read = partial(read_prompts, request, self._model.folder, self._model.context_tokens)
        prompts = await asyncio.to_thread(read) if len(request.body) > _LONG_BODY_BYTES else read()
        answer = answer_to(request, self._name)
        if request.is_stream:
            return Stream(self._events(answer, prompts, wish))
        return Whole(await self._whole(answer, prompts, wish))

    async def metrics(self) -> str:
        """Return tokens and jobs in Prometheus' text format."""
        counts, jobs = self._counts, self._scheduler
        rows = (
            ("prompt_tokens_total", "counter", "Tokens of prompts that were read.", counts.num_prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens generated.", counts.num_generated_tokens),
            ("prompts_running", "gauge", "Prompts that are being answered.", jobs.num_running),
            ("prompts_waiting", "gauge", "Prompts that wait for one of those to end.", jobs.num_waiting),
        )
        return "".join(
            f"# HELP cusprun_{name} {text}\n# TYPE cusprun_{name} {kind}\ncusprun_{name} {value}\n"
            for name, kind, text, value in rows
        )

    def failure(self) -> str | None:
        """Return why the thread that generates has ended; None while it lives."""
        return self._scheduler.failure

    async def close(self) -> None:
        """End unfinished work."""
        await asyncio.to_thread(self._scheduler.close)

    def stop(self) -> None:
        """End unfinished work and free the model."""
        self._scheduler.close()
        self._model.close()

    async def _whole(self, answer: Answer, prompts: Sequence[Prompt], wish: Wish) -> bytes:
        found: dict[int, Piece] = {}
        async with self._work(prompts, wish, in_pieces=False) as batches:
            async for batch in batches:
                found.update((piece.index, piece) for piece in batch)
        choices = [Choice(found[i].text, found[i].finish_reason or "") for i in range(len(prompts))]
        body = answer.whole(choices, _usage(prompts, [piece.num_tokens for piece in found.values()]))
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    async def _events(self, answer: Answer, prompts: Sequence[Prompt], wish: Wish) -> AsyncIterator[bytes]:
        """Yield the events, those that are ready at once together."""
        num_tokens: list[int] = []
        opened: set[int] = set()
        try:
            async with self._work(prompts, wish, in_pieces=True) as batches:
                async for batch in batches:
                    events = b""
                    for piece in batch:
                        if piece.index not in opened:
                            opened.add(piece.index)
                            events += answer.opening(piece.index)
                        if piece.text:
                            events += answer.piece(piece.index, piece.text)
                        if piece.finish_reason:
                            events += answer.closing(piece.index, piece.finish_reason)
                            num_tokens.append(piece.num_tokens)
                    if len(num_tokens) == len(prompts):
                        events += answer.end(_usage(prompts, num_tokens))
                    yield events
        except ApiError as error:
            yield event(error.body())

    @asynccontextmanager
    async def _work(
        self, prompts: Sequence[Prompt], wish: Wish, *, in_pieces: bool
    ) -> AsyncGenerator[AsyncIterator[list[Piece]], None]:
        """Have the prompts answered and give all their pieces in batches; the work ends on leaving."""
        channel: Channel[Piece | Exception] = Channel()
        jobs: list[Job[Piece]] = []
        for index, prompt in enumerate(prompts):
            steps = partial(generate, self._model, prompt, wish, index, in_pieces, self._counts)
            jobs.append(Job(steps, channel.put, channel.put))
        try:
            for job in jobs:
                self._submit(job)
            yield _batches(channel, len(jobs))
        finally:
            for job in jobs:
                self._scheduler.cancel(job)

    def _submit(self, job: Job[Piece]) -> None:
        try:
            self._scheduler.submit(job)
        except RuntimeError as error:
            raise _failed(error) from None


async def _batches(channel: Channel[Piece | Exception], num_jobs: int) -> AsyncIterator[list[Piece]]:
    """Yield what has come, until every job has ended."""
    while num_jobs:
        batch: list[Piece] = []
        for item in await channel.get():
            if isinstance(item, Exception):
                raise _failed(item)
            batch.append(item)
            num_jobs -= item.finish_reason is not None
        yield batch


def _failed(error: Exception) -> ApiError:
    return ApiError(503, f"the answer cannot go on ({str(error).strip() or type(error).__name__})")


def _usage(prompts: Sequence[Prompt], num_tokens: Sequence[int]) -> Usage:
    return Usage(sum(len(prompt.token_ids) for prompt in prompts), sum(num_tokens))
