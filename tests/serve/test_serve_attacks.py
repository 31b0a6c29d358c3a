"""What hostile clients and careless operators may do, against the parts that must stand it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_front import Client, Never, front_of

from cusprun.errors import ModelError, UserError
from cusprun.pipeline.side_by_side import _PROGRAM
from serve.api.errors import ApiError
from serve.api.requests import COMPLETIONS, FIELDS, MAX_DEPTH, read
from serve.child_process import ChildProcess
from serve.child_server import ChildServer, free_port, import_path
from serve.engines import vllm
from serve.front.app import Front, build_app
from serve.front.backend import Stream
from serve.front.protocol import MAX_HEAD_BYTES
from serve.front.proxy import Proxy, Upstream
from serve.front.run import bind, serve_until_signal
from serve.front.settings import FrontSettings
from serve.runtimes.chat_template import render_template

HUGE = 10**400
"""A whole number that no float holds."""


class TestRead:
    @pytest.mark.parametrize("name", FIELDS)
    def test_numbers_that_no_float_holds(self, name: str) -> None:
        for value in (HUGE, -HUGE):
            with pytest.raises(ApiError, match=name):
                read(COMPLETIONS, json.dumps({"prompt": "a", name: value}).encode())

    def test_tokens_of_more_than_31_bits(self) -> None:
        assert read(COMPLETIONS, b'{"prompt": [2147483647]}').fields["prompt"] == [2**31 - 1]
        with pytest.raises(ApiError, match="prompt"):
            read(COMPLETIONS, b'{"prompt": [2147483648]}')

    @pytest.mark.parametrize("pair", ["[]", "{}"])
    def test_depth(self, pair: str) -> None:
        def nested(depth: int) -> bytes:  # the body itself is one level
            inner = b"[" * (depth - 1) + b"]" * (depth - 1)
            if pair == "{}":
                inner = b'{"a":' * (depth - 2) + b"{}" + b"}" * (depth - 2)
            return b'{"prompt": "a", "metadata": ' + inner + b"}"

        read(COMPLETIONS, nested(MAX_DEPTH))
        with pytest.raises(ApiError, match="nested"):
            read(COMPLETIONS, nested(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 400),
        ({"host": "127.0.0.2:8000"}, 400),
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, 400),
        ({"host": "[::1"}, 403),
        ({"host": "["}, 403),
        ({"host": ""}, 403),
        ({"host": "192.0.2.1"}, 403),
        ({"host": "127.0.0.1.example.org"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "http://["}, 403),
        ({"host": "localhost", "origin": "http://localhost.example.org"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8001"}, 403),
    ],
)
def test_hosts_and_origins(headers: dict[str, str], status: int) -> None:
    async def run() -> Client:
        client = Client(front_of()[2])
        client.send(type="http.request", body=b"{}", more_body=False)  # has no prompt: 400
        await client.post(**headers)
        return client

    assert asyncio.run(run()).status == status


def test_client_that_leaves_while_it_sends_is_no_failure() -> None:
    async def run() -> str:
        _, front, app = front_of()
        client = Client(app)
        client.send(type="http.request", body=b"{", more_body=True)
        client.send(type="http.disconnect")
        await client.post()
        return bytes((await front.metrics()).body).decode()

    assert 'cusprun_requests_total{status="499"} 1' in asyncio.run(run())


class TestEngineThatEnds:
    """An engine that closes its connection after ``sent``."""

    def ask(self, sent: bytes, body: bytes) -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(sent)
            await writer.drain()
            writer.close()

        async def run() -> Any:
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            proxy = Proxy(Upstream(f"http://127.0.0.1:{port}", "key", lambda: None))
            try:
                answer = await proxy.answer(read(COMPLETIONS, body))
                if isinstance(answer, Stream):
                    return b"".join([event async for event in answer.events])
                return answer
            finally:
                await proxy.close()
                server.close()

        return asyncio.run(run())

    @pytest.mark.parametrize(
        "sent",
        [
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
            b"HTTP/1.1 500 No\r\nContent-Length: 100\r\n\r\n{",
            b"nonsense\r\n\r\n",
        ],
    )
    def test_whole(self, sent: bytes) -> None:
        with pytest.raises(ApiError) as caught:
            self.ask(sent, b'{"prompt": "a"}')
        assert (caught.value.status, caught.value.code) == (503, "engine_gone")

    @pytest.mark.parametrize("left", [b"", b"data: {", b'data: {"b": 1}\n'])
    def test_stream(self, left: bytes) -> None:
        chunk = b'data: {"a": 1}\n\n' + left
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        text = self.ask(head + b"%x\r\n%s\r\n" % (len(chunk), chunk), b'{"prompt": "a", "stream": true}')
        events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith(b"data:")]
        assert events.pop()["error"]["code"] == "engine_gone"
        assert events[0] == {"a": 1}


class TestServer:
    def serve(self, attack: Callable[[int], None]) -> None:
        """Serve for as long as the attack takes."""
        done: list[str] = []

        class Ends(Never):
            def failure(self) -> str | None:
                return done[0] if done else None

        def run(port: int) -> None:
            try:
                attack(port)
                done.append("attacked")
            except BaseException as error:
                done.append(repr(error))

        front = Front(Ends(), FrontSettings("m"))
        with bind("127.0.0.1", 0) as taken:
            thread = threading.Thread(target=run, args=(taken.getsockname()[1],))
            outcome = serve_until_signal(build_app(front), (front,), taken, 0, thread.start)
            thread.join()
        assert outcome.failure == "attacked"

    def test_endless_head(self) -> None:
        def attack(port: int) -> None:
            for start in (b"GET /", b"GET /health HTTP/1.1\r\nX: ", b"GET /health HTTP/1.1\r\n"):
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    connection.sendall(start)
                    filling = b"a: b\r\n" * 100 if start.endswith(b"\n") else b"a" * 600
                    num_bytes = 0
                    try:
                        while num_bytes < 64 * MAX_HEAD_BYTES:
                            num_bytes += connection.send(filling)
                    except OSError:
                        continue  # it was closed
                    raise AssertionError(f"{num_bytes} bytes were taken")

        self.serve(attack)

    def test_body_beside_the_wish_for_another_protocol(self) -> None:
        def attack(port: int) -> None:
            for name, protocol in ((b"Upgrade", b"h2c"), (b"uPGRADE", b"websocket")):
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    wish = b"Connection: Upgrade\r\n%s: %s\r\n" % (name, protocol)
                    body = b'{"model": "m"}'
                    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n"
                    connection.sendall(head % (wish, len(body)) + body)
                    answer = b""
                    while b"prompt is missing" not in answer:
                        piece = connection.recv(65536)
                        assert piece, answer
                        answer += piece
                        assert b"no valid JSON" not in answer

        self.serve(attack)

    def test_bodies_are_no_heads(self) -> None:
        def attack(port: int) -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                body = json.dumps({"model": "x" * 4 * MAX_HEAD_BYTES, "prompt": "a"}).encode()
                head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
                for _ in range(2):
                    connection.sendall(head % len(body) + body)
                    assert connection.recv(12) == b"HTTP/1.1 404"
                    while b"model_not_found" not in connection.recv(65536):
                        pass

        self.serve(attack)

    def test_ready_that_fails_ends_the_server(self) -> None:
        def fail() -> None:
            raise BrokenPipeError

        _, front, app = front_of()
        with bind("127.0.0.1", 0) as taken, pytest.raises(BrokenPipeError):
            serve_until_signal(app, (front,), taken, 0, fail)

    def test_two_that_bound_the_same_port(self) -> None:
        _, front, app = front_of()
        with bind("127.0.0.1", 0) as first:
            port = first.getsockname()[1]
            with bind("127.0.0.1", port) as second:
                first.listen()
                with pytest.raises(UserError, match=f"port {port}"):
                    serve_until_signal(app, (front,), second, 0, lambda: None)


class TestChildren:
    def test_a_full_pipe_stops_nobody(self) -> None:
        def deaf(_piece: bytes) -> None:
            raise BrokenPipeError

        program = "import sys; sys.stdout.write('x' * 2**20); print('end')"
        with ChildProcess([sys.executable, "-c", program], echo=deaf) as child:
            child._guard.wait(60)
            assert child.exit_code == 0
            assert child.log_tail().endswith("end\n")

    def test_modules_in_the_temporary_folder_are_not_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "socketserver.py").write_text("raise SystemExit('run')", encoding="utf-8")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        port = free_port()
        command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        server = ChildServer(
            "http.server",
            tmp_path,
            [*command, "--directory", str(tmp_path)],
            url=f"http://127.0.0.1:{port}",
            env=os.environ,
            ready="/",
        )
        server.close()

    def test_modules_in_the_current_folder_are_not_run_by_a_side(self, tmp_path: Path) -> None:
        (tmp_path / "typer.py").write_text("raise SystemExit('run')", encoding="utf-8")
        done = subprocess.run(
            [*_PROGRAM, "serve", "--help"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": import_path()},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, "run" in done.stderr) == (0, False)

    def test_import_path_is_absolute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", ["", "here", "/there"])
        folder = str(Path.cwd())
        assert import_path().split(os.pathsep) == [folder, str(Path(folder, "here")), "/there"]


def test_logprobs_that_the_mender_would_leave_out_are_refused() -> None:
    def asked(**fields: Any) -> object:
        return vllm._mender(read(COMPLETIONS, json.dumps({"prompt": "a", **fields}).encode()))

    with pytest.raises(ApiError, match="logprobs"):
        asked(stop=["a", "b"], stream=True, logprobs=1)
    assert asked(stop=["a"], stream=True, logprobs=1) is None
    assert asked(stop=["a", "b"], logprobs=1) is not None
    assert asked(stop=["a", "b"], stream=True) is not None


@pytest.mark.parametrize("template", ["{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% x"])
def test_template_that_raises_is_a_refusal(template: str) -> None:
    with pytest.raises(ModelError, match="the chat template refuses"):
        render_template(template, [], "", "")
