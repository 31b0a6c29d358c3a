"""The server of ONNX folders through the real front, on a random model, against the parity gate's runtime."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_exports import (
    SENTENCES,
    TinyConfig,
    make_folder,
)

from cusprun.records import Message
from serve.api.errors import ApiError
from serve.api.requests import CHAT, COMPLETIONS, read
from serve.engines import onnx as engine
from serve.engines.protocol import EngineSettings, Running

for name in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "fastapi", "uvicorn"):
    pytest.importorskip(name)
openai = pytest.importorskip("openai")

import uvicorn  # noqa: E402

from exporters.onnx import export  # noqa: E402
from serve.front.app import Front, build_app  # noqa: E402
from serve.front.settings import FrontSettings  # noqa: E402
from serve.onnx_server.backend import OnnxBackend  # noqa: E402
from serve.onnx_server.genai import GenaiGenerator  # noqa: E402
from serve.onnx_server.model import OnnxModel  # noqa: E402
from serve.runtimes.onnx_folder import OnnxFolder  # noqa: E402
from serve.runtimes.onnx_genai import OnnxGenaiRuntime  # noqa: E402

LIMIT_S = 60  # a failing test ends; a passing one waits for events only
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(
        tmp_path_factory.mktemp("onnx") / "tiny", TinyConfig("llama", {"num_hidden_layers": 1})
    )
    return export(folder, folder.parent / "tiny-onnx", quant="fp32")


@pytest.fixture(scope="module")
def runtime(artifact: Path) -> OnnxGenaiRuntime:
    return OnnxGenaiRuntime(artifact, n_threads=1)


@pytest.fixture(scope="module")
def folder(artifact: Path) -> OnnxFolder:
    return OnnxFolder(artifact)


@pytest.fixture(scope="module")
def running(artifact: Path) -> Iterator[Running]:
    made = engine.start(EngineSettings(artifact, "tiny", parallel=2, num_threads=1))
    yield made
    made.close()


@pytest.fixture(scope="module")
def port(running: Running) -> Iterator[int]:
    front = Front(running.backend, FrontSettings("tiny", context_tokens=running.context_tokens))
    config = uvicorn.Config(build_app(front), port=0, log_level="warning")
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    sock.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    yield sock.getsockname()[1]
    server.should_exit = True
    thread.join(LIMIT_S)


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(backend: Any, route: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    """Return the whole answer to one request, without HTTP."""
    request = read(route, json.dumps({"temperature": 0, **fields}).encode(), default_model="tiny")
    answer: dict[str, Any] = json.loads(asyncio.run(backend.answer(request)).body)
    return answer


def greedy(runtime: OnnxGenaiRuntime, folder: OnnxFolder, ids: list[int], count: int) -> str:
    """What the runtime of the parity gate says; an end that is no whole character is left out."""
    return folder.detokenize(list(runtime.generate(ids, count))).rstrip("\ufffd")


@pytest.mark.parametrize("prompt", SENTENCES)
def test_greedy_completion_is_that_of_the_runtime(
    client: Any, runtime: OnnxGenaiRuntime, folder: OnnxFolder, prompt: str
) -> None:
    ids = runtime.tokenize(prompt, True)
    wanted = greedy(runtime, folder, ids, 40)
    num_shown = len(list(runtime.generate(ids, 40)))
    for given_prompt in (prompt, ids):
        answer = client.completions.create(model="tiny", prompt=given_prompt, max_tokens=40, temperature=0)
        assert answer.choices[0].text == wanted
        assert answer.choices[0].finish_reason == ("length" if num_shown == 40 else "stop")
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.completion_tokens == min(num_shown + 1, 40)
    chunks = client.completions.create(model="tiny", prompt=prompt, max_tokens=40, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted


def test_greedy_chat_is_that_of_the_runtime(
    client: Any, runtime: OnnxGenaiRuntime, folder: OnnxFolder
) -> None:
    ids = runtime.chat_token_ids([Message("user", "hi")])
    wanted = greedy(runtime, folder, ids, 30)
    fields = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 30, "temperature": 0}
    answer = client.chat.completions.create(**fields)
    assert answer.choices[0].message.content == wanted
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 30)
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert (
        client.chat.completions.create(**{**fields, "messages": parts}).choices[0].message.content == wanted
    )
    stream = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(ids), 30)


def test_chat_without_a_limit_fills_the_context(
    client: Any, running: Running, runtime: OnnxGenaiRuntime
) -> None:
    def is_endless(content: str) -> bool:
        ids = runtime.chat_token_ids([Message("user", content)])
        return len(ids) + len(list(runtime.generate(ids, 512 - len(ids)))) == 512

    endless = next(content for content in map(str, range(100)) if is_endless(content))
    messages = [{"role": "user", "content": endless}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == running.context_tokens == 512


def test_seeds_and_penalties(client: Any) -> None:
    def text(**fields: Any) -> str:
        said: str = (
            client.completions.create(
                **{"model": "tiny", "prompt": "a", "max_tokens": 30, "temperature": 1.5, **fields}
            )
            .choices[0]
            .text
        )
        return said

    seeds = (0, 7, 2**31 - 1, 2**31 + 1, 2**32 - 2)
    for seed in seeds:
        assert text(seed=seed) == text(seed=seed)
    assert len({text(seed=seed) for seed in seeds}) == 5
    assert text() != text()
    plain = text(temperature=0)
    assert (
        text(seed=1, extra_body={"top_k": 1}) == text(seed=2, top_p=1e-6) == text(temperature=1e-9) == plain
    )
    assert text(seed=1, extra_body={"top_k": -1}) == text(seed=1, extra_body={"top_k": 10**6}) == text(seed=1)
    assert text(temperature=0, extra_body={"repetition_penalty": 5.0}) != plain


def test_neighbours_change_nothing(client: Any) -> None:
    wishes = [
        {"prompt": prompt, "temperature": temperature, "seed": seed}
        for prompt in SENTENCES
        for temperature, seed in ((0, 0), (1, 1), (1, 2))
    ]

    def text(wish: dict[str, Any]) -> str:
        said: str = client.completions.create(model="tiny", max_tokens=30, **wish).choices[0].text
        return said

    alone = [text(wish) for wish in wishes]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(text, wishes)) == alone


def test_several_prompts(client: Any) -> None:
    fields = {"model": "tiny", "max_tokens": 20, "temperature": 0}
    alone = [client.completions.create(prompt=prompt, **fields) for prompt in SENTENCES]
    wanted = [answer.choices[0].text for answer in alone]
    together = client.completions.create(prompt=list(SENTENCES), **fields)
    assert [choice.text for choice in together.choices] == wanted
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert together.usage.total_tokens == sum(answer.usage.total_tokens for answer in alone)
    found = [""] * 4
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = list(client.completions.create(prompt=list(SENTENCES), **fields, **options))
    for chunk in chunks:
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == wanted
    assert last.usage == together.usage


def test_stop_texts_that_span_tokens(running: Running, runtime: OnnxGenaiRuntime, folder: OnnxFolder) -> None:
    ids = runtime.tokenize(SENTENCES[0], True)
    made = list(runtime.generate(ids, 40))
    whole = greedy(runtime, folder, ids, 40)
    spans = [
        (at, text)
        for at in range(1, len(made) - 1)
        if "\ufffd" not in (text := folder.detokenize(made[at : at + 2])) and len(text) > 2
    ]
    assert spans
    for _, text in spans:
        stop = text[1:]
        answer = ask(running.backend, prompt=SENTENCES[0], max_tokens=40, stop=stop)
        assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
        assert answer["choices"][0]["finish_reason"] == "stop"
        ends = [n for n in range(1, 41) if stop in folder.detokenize(made[:n])]
        assert answer["usage"]["completion_tokens"] == ends[0]


def test_ends_at_a_stop_token(
    artifact: Path, runtime: OnnxGenaiRuntime, folder: OnnxFolder, tmp_path: Path
) -> None:
    """The third token of a continuation is made a token that ends a text; it is counted and not shown."""
    prompt = runtime.tokenize(SENTENCES[0], True)
    free = list(runtime.generate(prompt, 8))
    third = next(i for i in range(2, 8) if free[i] not in free[:i])
    changed = tmp_path / "changed"
    shutil.copytree(artifact, changed)
    config = json.loads((changed / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["eos_token_id"].append(free[third])
    (changed / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    running = engine.start(EngineSettings(changed, "tiny", num_threads=1))
    try:
        for limit in (third + 1, 30):
            answer = ask(running.backend, prompt=SENTENCES[0], max_tokens=limit)
            assert answer["choices"][0]["text"] == folder.detokenize(free[:third]).rstrip("\ufffd")
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == third + 1
        assert (
            ask(running.backend, prompt=SENTENCES[0], max_tokens=third)["choices"][0]["finish_reason"]
            == "length"
        )
    finally:
        running.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": [387]}, "no token 387"),
        ({"prompt": ["a"] * 129}, "129 prompts"),
        ({"prompt": [5] * 512}, "512 tokens and the context holds 512"),
    ],
)
def test_prompts_that_cannot_be(running: Running, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError, match=said):
        ask(running.backend, **fields)


def test_context_is_used_to_its_end(running: Running) -> None:
    answer = ask(running.backend, prompt=[5] * 511, max_tokens=99)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "tool_calls": [{}]},
    ],
)
def test_chats_hold_texts_only(running: Running, message: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        ask(running.backend, CHAT, messages=[message])
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_any_text_is_read_to_its_end(running: Running, folder: OnnxFolder) -> None:
    for text in ("a\0b", "a\U000c0000b", "x" * 400):
        usage = ask(running.backend, prompt=text)["usage"]
        assert usage["prompt_tokens"] == len(folder.tokenize(text, True))


@pytest.mark.parametrize("streams", [True, False])
def test_client_that_leaves_frees_its_slot(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """Tokens come one at a time, as the test lets them: the other's answer is there long before 500."""
    permits, reached, made = threading.Semaphore(0), threading.Semaphore(0), GenaiGenerator.next

    def slowly(self: GenaiGenerator) -> int:
        reached.release()
        assert permits.acquire(timeout=LIMIT_S)
        return made(self)

    monkeypatch.setattr(GenaiGenerator, "next", slowly)
    backend = OnnxBackend(OnnxModel(artifact, n_threads=1), "tiny", parallel=1)

    async def leave() -> int:
        body = {"prompt": "a", "max_tokens": 500, "stream": streams}
        request = read(COMPLETIONS, json.dumps(body).encode(), default_model="tiny")
        if streams:
            events = (await backend.answer(request)).events  # type: ignore[union-attr]
            permits.release(20)
            await anext(events)
            await events.aclose()  # type: ignore[attr-defined]
        else:
            task = asyncio.ensure_future(backend.answer(request))
            await asyncio.to_thread(reached.acquire)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        permits.release(30)
        other = read(COMPLETIONS, b'{"prompt": "b", "max_tokens": 3}', default_model="tiny")
        answer = json.loads((await backend.answer(other)).body)  # type: ignore[union-attr]
        return int(answer["usage"]["completion_tokens"])

    try:
        assert asyncio.run(leave()) == 3
        assert "cusprun_prompts_waiting 0" in asyncio.run(backend.metrics())
    finally:
        permits.release(1000)
        backend.stop()


def test_closed_connections_end_their_work(
    port: int, client: Any, runtime: OnnxGenaiRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are worked on and six wait; all are gone after far fewer than the 500 tokens that each wants."""
    permits, made = threading.Semaphore(0), GenaiGenerator.next

    def slowly(self: GenaiGenerator) -> int:
        assert permits.acquire(timeout=LIMIT_S)
        return made(self)

    endless = next(token for token in range(4, 387) if len(list(runtime.generate([token], 500))) == 500)
    with monkeypatch.context() as patch:
        patch.setattr(GenaiGenerator, "next", slowly)
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S) for _ in range(8)]
        for number, connection in enumerate(connections):
            body = {"prompt": [endless], "max_tokens": 500, "temperature": 0, "stream": number % 2 == 0}
            connection.request("POST", COMPLETIONS, json.dumps(body))
        for connection in connections:
            connection.close()
        for _ in range(400):
            permits.release()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
            connection.request("GET", "/metrics")
            metrics = connection.getresponse().read().decode()
            connection.close()
            signs = ('total{status="499"} 8\n', "under_way 0\n", "running 0\n", "waiting 0\n")
            if all(sign in metrics for sign in signs):
                break
        else:
            pytest.fail("requests of clients that left are still worked on")
    assert client.completions.create(model="tiny", prompt="a", max_tokens=3).usage.completion_tokens == 3


def test_failure_inside_a_stream_is_an_event(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: GenaiGenerator) -> int:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(GenaiGenerator, "next", broken)
    with pytest.raises(ApiError, match="out of luck"):
        ask(running.backend, prompt="a")

    async def stream() -> list[bytes]:
        request = read(COMPLETIONS, b'{"prompt": "a", "stream": true}', default_model="tiny")
        return [event async for event in (await running.backend.answer(request)).events]  # type: ignore[union-attr]

    (event,) = asyncio.run(stream())
    assert "out of luck" in json.loads(event.removeprefix(b"data: "))["error"]["message"]
    assert running.backend.failure() is None
