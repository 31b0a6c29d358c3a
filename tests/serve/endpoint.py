"""A server as its users start it: the command line, a port, and an exit code."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
START_S = 300


class Endpoint:
    """A running ``cusprun serve``; the port is read from the line that says where it serves."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output: list[str] = []
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.output.append(line)
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (line := lines.get(timeout=START_S)) is not None:
            if line.startswith("serving "):
                self.port = int(line.rpartition(":")[2].split("/")[0])
                return
        raise AssertionError(f"it ended with {process.wait()}: {''.join(self.output)}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def request(
        self, route: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Return the status and the answer: parsed when it is JSON, else its text."""
        connection = self.connect()
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", route, data, headers or {})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def complete(self, **fields: Any) -> tuple[int, Any]:
        return self.request("/v1/completions", {"temperature": 0, "max_tokens": 64, **fields})

    def events(self, route: str, body: dict[str, Any]) -> list[Any]:
        """Return the events of a streamed answer; the last is ``[DONE]``."""
        status, text = self.request(route, {"stream": True, **body})
        assert status == 200, text
        datas = [line[5:].strip() for line in text.split("\n") if line.startswith("data:")]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def under_way(self) -> int:
        """Return how many requests are being answered."""
        _, text = self.request("/metrics")
        (line,) = [line for line in text.splitlines() if line.startswith("cusprun_requests_under_way")]
        return int(line.split()[1])

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


@contextmanager
def serving(*arguments: str, **variables: str) -> Iterator[Endpoint]:
    """Run ``cusprun serve`` on a free port for as long as the context lasts."""
    process = start(arguments, variables)
    try:
        yield Endpoint(process)
    finally:
        process.terminate()
        process.wait(timeout=120)


def start(arguments: Sequence[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cusprun", "serve", "--port", "0", "--threads", "1", *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
