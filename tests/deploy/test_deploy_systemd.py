"""The unit, judged by systemd's own tools, and what a shell makes of the installer."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deployable import SIZING, facts_of

from cusprun.errors import UserError
from deploy import systemd
from deploy.facts import Facts
from deploy.render import systemd_value

ANALYZE = shutil.which("systemd-analyze")
MOST_EXPOSURE = 3.0
OPTIONS: dict[str, str | None] = {"prefix": None, "host": "127.0.0.1", "port": "8000", "vllm": "/opt/vllm"}
ODD_NAME = 'it\'s 100% "odd" $HOME \\ Größe'
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")

Made = Callable[..., Path]


def of_engine(engine: str, **changes: Any) -> Facts:
    return facts_of(engine=engine, format="gguf" if engine == "llamacpp" else engine, **changes)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Writes a service whose prefix is a folder of the test, with a stand-in for its Python."""

    def make(engine: str = "llamacpp", name: str = "maths expert", **options: str) -> Path:
        prefix = tmp_path / "prefix"
        file = f"{name}.gguf"
        facts = of_engine(engine, model=name, artifact_name=file, sha256={file: ""})
        python = prefix / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to("/bin/true")
        for file in systemd.files(facts, {**OPTIONS, "prefix": str(prefix), **options}):
            if isinstance(file.content, bytes):
                (prefix / file.path).write_bytes(file.content)
        return prefix / "maths-expert.service"

    return make


@needs_systemd
@pytest.mark.parametrize("engine", ["llamacpp", "onnx", "vllm"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_systemd_takes_the_unit_and_finds_little_exposed(made: Made, engine: str, host: str) -> None:
    unit = made(engine, host=host)
    done = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        [str(ANALYZE), "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) <= MOST_EXPOSURE


@needs_systemd
def test_systemd_takes_a_name_with_everything_in_it(made: Made) -> None:
    done = subprocess.run(
        [str(ANALYZE), "verify", "--man=no", str(made(name=ODD_NAME))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_word_of_a_unit_loses_every_meaning() -> None:
    """Against systemd.service(5): C-style quotes, ``%%`` and ``$$``."""
    word = systemd_value(ODD_NAME)
    assert word.startswith('"')
    assert word.endswith('"')
    inner = word[1:-1].replace("%%", "%").replace("$$", "$")
    assert re.sub(r"\\(.)", r"\1", inner) == ODD_NAME
    assert not re.search(r"(?<!%)%(?!%)|(?<!\$)\$(?!\$)", word)


def test_resources_are_the_planned_ones(made: Made) -> None:
    unit = made()
    assert f"MemoryMax={SIZING.memory_limit_bytes // 2**20}M" in unit.read_text().splitlines()
    values = dict(
        line.split("=", 1)
        for line in unit.with_suffix(".env").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    assert (values["CONTEXT"], values["PARALLEL"], values["OPTIONS"]) == ("4096", "4", "")


def test_only_vllm_is_told_where_it_is() -> None:
    for engine in ("llamacpp", "vllm"):
        (env,) = [f for f in systemd.files(of_engine(engine), OPTIONS) if f.path.endswith(".env")]
        assert (b"\nCUSPRUN_VLLM=/opt/vllm\n" in env.content) == (engine == "vllm")  # type: ignore[operator]


def test_vllm_is_limited_by_what_was_measured_alone(made: Made) -> None:
    """What is planned was measured without a GPU; and its processes talk by an address that is allowed."""
    unit = made("vllm").read_text()
    assert "MemoryMax" not in unit
    assert re.search(r"^IPAddressDeny=any$", unit, re.MULTILINE)
    assert re.search(r"^Environment=VLLM_HOST_IP=127\.0\.0\.1$", unit, re.MULTILINE)
    measured = of_engine("vllm", sizing=replace(SIZING, source="measured"))
    (file,) = [file for file in systemd.files(measured, OPTIONS) if file.path.endswith(".service")]
    assert f"\nMemoryMax={SIZING.memory_limit_mib}M\n".encode() in file.content  # type: ignore[operator]


@pytest.mark.parametrize(
    ("host", "is_open"), [("127.0.0.1", False), ("127.0.0.2", False), ("::1", False), ("localhost", False),
                          ("0.0.0.0", True), ("192.168.1.5", True), ("::", True), ("box.example", True)],
)  # fmt: skip
def test_an_open_service_waits_for_the_network_and_says_how_to_ask(host: str, is_open: bool) -> None:
    files = {file.path: file.content for file in systemd.files(facts_of(), {**OPTIONS, "host": host})}
    unit, readme = (str(files[name]) for name in ("maths-expert.service", "README.md"))
    assert ("IPAddressDeny" in unit) is not is_open
    assert ("network-online.target" in unit) is is_open
    assert ("Authorization: Bearer $(" in readme) is is_open
    assert f"http://{f'[{host}]' if ':' in host else host}:8000/v1/" in readme


def test_threads_of_a_measurement_are_kept() -> None:
    facts = facts_of(sizing=replace(SIZING, num_threads=6))
    (env,) = [file for file in systemd.files(facts, OPTIONS) if file.path.endswith(".env")]
    assert b"\nOPTIONS=--threads 6\n" in env.content  # type: ignore[operator]


def test_the_installer_is_a_script_that_a_shell_reads(made: Made) -> None:
    script = made().with_name("install.sh")
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix": "opt/x"}, "absolute path"),
        ({"prefix": "/opt/../etc"}, "absolute path"),
        ({"prefix": "/opt/a b"}, "absolute path"),
        ({"prefix": "/home/me/expert"}, "sees nothing below /home"),
        ({"prefix": "/tmp"}, "sees nothing below /tmp"),
        ({"vllm": "/root/vllm"}, "another vllm than"),
        ({"python": "3.9"}, "from 3.10 on"),
        ({"vllm": "vllm"}, "vllm must be an absolute path"),
        ({"port": "0"}, "from 1 to"),
        ({"port": "８000"}, "from 1 to"),
        ({"host": "a b"}, "address or a name"),
        ({"host": "$(id)"}, "address or a name"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        systemd.check(facts_of(), {**OPTIONS, **options})
