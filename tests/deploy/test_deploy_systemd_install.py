"""The installer of a service, run for real, with stand-ins for systemctl and the environment's Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from deployable import make_gguf

from cusprun.pipeline.deploy import deploy

SYSTEMCTL = """#!/bin/sh
printf '%s\\n' "systemctl $*" >> "$STATE/log"
case "$1" in
    show) cat "$STATE/loaded" 2> /dev/null || true ;;
    enable) printf '%s\\n' "$2" > "$STATE/loaded" ;;
    is-active) test ! -e "$STATE/ended" ;;
esac
"""
PYTHON = """#!/bin/sh
printf '%s\\n' "python $*" >> "$STATE/log"
case "$*" in
    "-m venv --clear venv") mkdir -p venv/bin && cp -- "$0" venv/bin/python ;;
    "-c import xllamacpp") test ! -e "$STATE/useless" ;;
    -m*) ;;
    *) exec "$REAL" "$@" ;;
esac
"""
Install = Callable[..., subprocess.CompletedProcess[str]]


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a server that is healthy."""
    with HTTPServer(("127.0.0.1", 0), _Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    for name, text in (("systemctl", SYSTEMCTL), ("python", PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def install(tmp_path: Path, state: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Deploys with options and runs the installer; deploys once only."""
    monkeypatch.setattr("deploy.systemd._HIDDEN", ())  # the folder of the test is below /tmp
    artifact = make_gguf(tmp_path / "an expert's.gguf")
    out = tmp_path / "out put"
    environment = {
        "PATH": f"{state}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(state / "python"),
        "REAL": sys.executable,
        "STATE": str(state),
    }

    def run(**options: str) -> subprocess.CompletedProcess[str]:
        if not out.exists():
            given = {"prefix": str(tmp_path / "prefix"), "port": str(port), **options}
            deploy(artifact, "systemd", out, options=given)
        return subprocess.run(
            ["sh", "-c", 'umask 077 && exec sh "$0"', str(out / "install.sh")],
            env=environment, capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip

    return run


def actions(state: Path) -> list[str]:
    return [line.split()[1] for line in (state / "log").read_text().splitlines() if "systemctl" in line]


def test_a_service_is_installed_where_its_own_user_reads_it(install: Install, tmp_path: Path) -> None:
    """Whatever the mask of root's shell is; the environment file stays root's."""
    done = install()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "an-expert-s answers\n"
    prefix = tmp_path / "prefix"
    for path in (prefix, prefix / "venv", prefix / "model", *(prefix / "model").iterdir()):
        assert path.stat().st_mode & 0o044 == 0o044, path
    assert (prefix / "an-expert-s.env").stat().st_mode & 0o777 == 0o600
    assert (prefix / "model" / "an expert's.gguf").stat().st_size > 0


def test_an_update_keeps_the_environment_and_starts_the_server_anew(
    install: Install, tmp_path: Path, state: Path
) -> None:
    assert install().returncode == 0
    assert actions(state) == ["show", "enable", "restart"]
    env = tmp_path / "prefix" / "an-expert-s.env"
    env.write_text(env.read_text() + "CUSPRUN_API_KEY=mine\n")
    (state / "log").unlink()
    assert install().returncode == 0
    assert actions(state) == ["show", "stop", "enable", "restart"], "a running server has the model mapped"
    assert "CUSPRUN_API_KEY=mine" in env.read_text()


def test_the_installed_folder_installs_itself_again(install: Install, tmp_path: Path, state: Path) -> None:
    assert install().returncode == 0
    out, env = tmp_path / "out put", tmp_path / "prefix" / "an-expert-s.env"
    env.write_text(env.read_text().replace("PARALLEL=4", "PARALLEL=2"))
    shutil.rmtree(out)
    (tmp_path / "prefix").rename(out)
    (tmp_path / "prefix").symlink_to(out)
    done = install()
    assert (done.returncode, done.stderr) == (0, "")
    assert "PARALLEL=2" in env.read_text()


def test_what_is_not_ours_is_left_alone(install: Install, tmp_path: Path, state: Path) -> None:
    (tmp_path / "prefix").mkdir()
    (tmp_path / "prefix" / "theirs").touch()
    done = install()
    assert done.returncode == 2
    assert "holds something else" in done.stderr
    assert [path.name for path in (tmp_path / "prefix").iterdir()] == ["theirs"]
    (tmp_path / "prefix" / "theirs").unlink()
    (state / "loaded").write_text("/lib/systemd/system/an-expert-s.service\n")
    done = install()
    assert done.returncode == 2
    assert "another an-expert-s.service" in done.stderr
    assert not list((tmp_path / "prefix").iterdir())


def test_a_damaged_folder_is_not_installed(install: Install, tmp_path: Path) -> None:
    assert install().returncode == 0
    (tmp_path / "out put" / "requirements.txt").write_text("another\n")
    done = install()
    assert done.returncode == 2
    assert "requirements.txt" in done.stdout
    assert "damaged" in done.stderr


def test_another_python_is_refused(install: Install, tmp_path: Path) -> None:
    done = install(python="3.10" if sys.version_info[:2] != (3, 10) else "3.11")
    assert done.returncode == 2
    assert "is needed" in done.stderr
    assert not (tmp_path / "prefix").exists()


def test_an_open_service_gets_a_key_once(install: Install, tmp_path: Path) -> None:
    keys = []
    for _ in range(2):
        done = install(host="0.0.0.0")
        assert (done.returncode, done.stderr) == (0, "")
        text = (tmp_path / "prefix" / "an-expert-s.env").read_text()
        keys += re.findall(r"^CUSPRUN_API_KEY=([0-9a-f]{48})$", text, re.MULTILINE)
        assert keys[-1] not in done.stdout
    assert len(keys) == 2
    assert keys[0] == keys[1]


@pytest.mark.parametrize(("file", "said"), [("ended", "journalctl"), ("useless", "libgomp1")])
def test_a_service_that_cannot_be_is_said(file: str, said: str, install: Install, state: Path) -> None:
    (state / file).touch()
    install_port = "1"  # where nobody listens
    done = install(port=install_port)
    assert done.returncode == 2
    assert said in done.stderr
