"""What a user may call a model, and where it is found; the hub is a small server in this process."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cusprun.cache import cache_folder, cached, file_sha256, remove_leftovers
from cusprun.codec import key_of
from cusprun.errors import ModelError
from cusprun.hub import wanted
from cusprun.resolve import locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that must not be run."""
    folder = tmp_path / "site" / "holds_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_a_package_is_looked_into_and_not_imported(package) -> None:
    (package / "data").mkdir()
    (package / "data" / "m.gguf").write_bytes(b"GGUF")
    found = locate("package:holds_a_model")
    assert (found.path, found.source) == (package / "data" / "m.gguf", "package:holds_a_model")
    assert locate("package:holds-a-model").path == found.path
    assert "holds_a_model" not in sys.modules


def test_a_package_must_hold_one_gguf(package) -> None:
    with pytest.raises(ModelError, match="holds none"):
        locate("package:holds_a_model")
    for name in ("a", "b"):
        (package / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"a\.gguf, b\.gguf"):
        locate("package:holds_a_model")


def test_reports_call_a_local_model_by_its_bare_name(tmp_path) -> None:
    (tmp_path / "team" / "model").mkdir(parents=True)
    assert locate(tmp_path / "team" / "model").source == "model"
    (tmp_path / "w").write_bytes(b"GGUF and more")
    assert locate(str(tmp_path / "w")).source == "w"


def test_only_what_a_model_needs_is_wanted() -> None:
    names = [
        "README.md", "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "original/params.json", "LICENSE",
        "onnx/model.onnx", "chat_template.jinja", "tokenizer.model", "additional_chat_templates/tool.jinja",
    ]  # fmt: skip
    assert wanted(names) == [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "LICENSE",
        "chat_template.jinja", "tokenizer.model", "additional_chat_templates/tool.jinja",
    ]  # fmt: skip


class Hub:
    """The three answers of a hub that a download needs, over a folder of files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.asked: list[str] = []
        asked = self.asked
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                asked.append(path)
                if path.startswith("/api/models/team/model"):
                    info = {"id": "team/model", "modelId": "team/model", "sha": COMMIT, "siblings": siblings}
                    self.reply(200, json.dumps(info).encode(), body)
                elif "/resolve/" in path and path.rpartition("/")[2] in files:
                    data = files[path.rpartition("/")[2]]
                    self.reply(200, data, body)
                else:
                    self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

            def reply(self, code: int, data: bytes, body: bool, more: dict[str, str] | None = None) -> None:
                self.send_response(code)
                headers = {
                    "Content-Length": str(len(data)),
                    "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "X-Repo-Commit": COMMIT,
                    **(more or {}),
                }
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(tiny_models: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in (tiny_models / "llama").iterdir()}
    found = Hub({**files, "pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit"})
    yield found
    found.close()


def inspect(model: str, endpoint: str, work: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(work / "hf"),
    }
    return subprocess.run(
        [sys.executable, "-m", "cusprun", "inspect", model, "--json"],
        cwd=work, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def closed_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_id_is_downloaded_without_code_and_pickles_and_then_works_offline(work, hub) -> None:
    done = inspect("team/model", hub.url, work)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "llama"
    assert not any(path.endswith((".bin", ".py")) for path in hub.asked)
    offline = inspect("team/model", closed_port(), work)
    assert offline.returncode == 0, offline.stderr
    assert "downloaded before" in offline.stderr


def test_a_hub_id_that_is_not_there(work, hub) -> None:
    done = inspect("team/modle", hub.url, work)
    assert done.returncode == 2
    assert "team/modle" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_id_with_pickles_only_downloads_nothing(work) -> None:
    hub = Hub({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    try:
        done = inspect("team/model", hub.url, work)
    finally:
        hub.close()
    assert done.returncode == 2
    assert "pickled" in done.stderr
    assert all(path.startswith("/api/") for path in hub.asked)


def test_a_hub_id_without_a_network(work) -> None:
    done = inspect("team/model", closed_port(), work)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: team/model is no local path, and the hub cannot be reached")


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("CUSPRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "cusprun"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cusprun"


def test_a_stage_is_made_once(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path))
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("done")

    assert cached("kind", "name", make) == (tmp_path / "kind" / "name", False)
    assert cached("kind", "name", make) == (tmp_path / "kind" / "name", True)
    assert len(made) == 1


def test_a_stage_that_another_process_finished_first_is_taken(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUSPRUN_CACHE", str(tmp_path))

    def make(path: Path) -> None:
        path.mkdir()
        (path / "theirs").write_text("")
        raise OSError(39, "Directory not empty")

    assert cached("kind", "name", make) == (tmp_path / "kind" / "name", False)


def test_keys_tell_inputs_apart() -> None:
    assert key_of("a", 1, ("x",)) == key_of("a", 1, ["x"])
    assert len({key_of("a", "b"), key_of("ab"), key_of("a", "b", ""), key_of("a", ["b"])}) == 4


def test_hashes_are_those_of_sha256sum(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5_000_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"x" * 5_000_000).hexdigest()


def test_only_leftovers_of_dead_processes_go(tmp_path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".a.partial-{dead.pid}").mkdir()
    (tmp_path / f".b.gguf.partial-{dead.pid}").write_text("")
    (tmp_path / f".c.partial-{os.getpid()}").write_text("")
    (tmp_path / "d.partial-1").write_text("")
    remove_leftovers(tmp_path, "a")
    assert sorted(path.name[:4] for path in tmp_path.iterdir()) == [".b.g", ".c.p", "d.pa"]
    remove_leftovers(tmp_path)
    assert sorted(path.name[:4] for path in tmp_path.iterdir()) == [".c.p", "d.pa"]
