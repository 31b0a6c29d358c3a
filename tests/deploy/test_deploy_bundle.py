"""The bundle, installed and asked for real where no network is; its wheel and installer by themselves."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from deployable import facts_of, make_gguf

from cusprun.errors import MissingDependencyError, UserError
from deploy import bundle, wheelhouse
from deploy.own_wheel import own_wheel
from deploy.platforms import MACHINES, marker_environment, this_platform
from deploy.requirements import pinned

NO_NETWORK = ("unshare", "--user", "--map-root-user", "--net", "sh", "-c")
OPTIONS = {"platform": "linux-x86_64", "python": "3.11"}


def test_the_wheel_is_a_wheel_of_what_runs() -> None:
    name, data = own_wheel()
    assert (name, data) == own_wheel()
    assert name.endswith("-py3-none-any.whl")
    import io

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        (record,) = [entry for entry in names if entry.endswith("/RECORD")]
        rows = [line.rsplit(",", 2) for line in archive.read(record).decode().splitlines()]
        assert sorted(row[0] for row in rows) == sorted(names)
        for path, digest, size in rows:
            if path != record:
                held = archive.read(path)
                kind, _, value = digest.partition("=")
                padded = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
                assert (kind, padded, int(size)) == ("sha256", hashlib.sha256(held).digest(), len(held))
        import cusprun

        assert archive.read("cusprun/errors.py") == Path(cusprun.errors.__file__).read_bytes()
        assert {"serve/front/app.py", "deploy/templates/bundle/start.py.j2", "exporters/registry.py"} <= set(
            names
        )
        assert b"cusprun = cusprun.cli:main" in archive.read(record.replace("RECORD", "entry_points.txt"))


def test_pins_are_what_is_installed_and_markers_are_the_targets() -> None:
    linux = pinned(["typer", "tokenizers"], marker_environment("linux-x86_64", "3.11"))
    windows = pinned(["typer", "tokenizers"], marker_environment("windows-x86_64", "3.11"))
    from importlib import metadata

    assert all(metadata.version(name) == version for name, version in linux.items())
    assert {"typer", "rich", "tokenizers"} <= set(linux)
    assert not {"huggingface-hub", "torch", "transformers"} & set(linux)
    assert set(windows) - set(linux) <= {"colorama"}


def test_an_unknown_package_is_said() -> None:
    with pytest.raises(MissingDependencyError, match="no-such-package-of-ours"):
        pinned(["no-such-package-of-ours"], marker_environment("linux-x86_64", "3.11"))


def test_extras_that_come_later_are_needed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy import requirements

    needs = {"a": ["c", "b"], "b": ["c[more]"], "c": ["d; extra == 'more'"], "d": []}
    monkeypatch.setattr(requirements.metadata, "version", lambda _: "1")
    monkeypatch.setattr(requirements.metadata, "requires", needs.get)
    for names in (["a"], ["c", "b"], ["b", "c"]):
        assert "d" in pinned(names, marker_environment("linux-x86_64", "3.11"))


@pytest.mark.slow
def test_an_index_that_cannot_be_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other platform is recommended for it."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"INDEX_URL": "http://127.0.0.1:1/", "RETRIES": "1", "CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(UserError, match="the package index cannot be reached") as caught:
        wheelhouse.fetch({"numpy": "1.26.4"}, "linux-x86_64", "3.12", tmp_path)
    assert "platform" not in str(caught.value)


def test_a_platform_without_wheels_is_refused_with_pips_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(
        UserError, match=r"macos-arm64 with Python 3\.12 .*No matching distribution found for numpy"
    ):
        wheelhouse.fetch({"numpy": "1.0"}, "macos-arm64", "3.12", tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"platform": "linux-x86_64", "python": "3.9"}, "from 3.10 on"),
        ({"platform": "linux-x86_64", "python": "3.11; rm"}, "python must be"),
    ],
)
def test_a_python_that_cannot_be_is_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bundle.check(facts_of(), options)


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for this machine whose wheels are none."""
    from cusprun.pipeline import deploy as pipeline

    monkeypatch.setattr(bundle, "fetch", lambda *_: [])
    artifact = make_gguf(tmp_path / 'it\'s a "model" Größe.gguf')
    return pipeline.deploy(artifact, "bundle", tmp_path / "bundle", platform=this_platform())


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(folder / script)], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_damaged_bundle_is_not_installed(bundled: Path) -> None:
    (model,) = (bundled / "model").iterdir()
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    done = run(bundled, "install.py")
    assert done.returncode == 2
    assert "is damaged" in done.stderr
    assert not (bundled / "venv").exists()


def test_the_start_script_finds_its_folder_and_installs_first(bundled: Path) -> None:
    (bundled / "requirements.txt").unlink()
    done = subprocess.run(
        ["sh", str(bundled / "start.sh")],
        capture_output=True, text=True, check=False, cwd="/", env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "requirements.txt is missing" in done.stderr


def test_a_file_that_is_missing_is_named(bundled: Path) -> None:
    (bundled / "requirements.txt").unlink()
    done = run(bundled, "install.py")
    assert done.returncode == 2
    assert "requirements.txt is missing" in done.stderr


def test_another_machine_is_refused(bundled: Path) -> None:
    settings = json.loads((bundled / "bundle.json").read_text())
    (bundled / "bundle.json").write_text(json.dumps({**settings, "machine": "vax"}))
    done = run(bundled, "install.py")
    assert done.returncode == 2
    assert "on vax with" in done.stderr


@pytest.mark.parametrize(
    ("libraries", "said"), [("libgomp1", r"\(.*no_such.*\); install libgomp1"), ("", r"\(.*no_such")]
)
def test_an_engine_that_cannot_be_used_is_said(bundled: Path, libraries: str, said: str) -> None:
    program = (
        "import sys, install; install.PYTHON = sys.executable; "
        f"install.check_engine({{'module': 'no_such', 'libraries': '{libraries}'}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=bundled
    )
    assert done.returncode == 2
    assert re.search(said, done.stderr)


def test_options_hold_any_name_and_what_was_planned(bundled: Path) -> None:
    settings = json.loads((bundled / "bundle.json").read_text())
    name = 'it\'s a "model" Größe'
    assert settings["artifact"] == f"model/{name}.gguf"
    assert settings["options"] == ["--name", name, "--context", "4096", "--parallel", "4"]
    assert (bundled / settings["artifact"]).is_file()


@pytest.mark.parametrize("platform", sorted(MACHINES))
def test_each_system_gets_its_start_script(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "fetch", lambda *_: [])
    names = {file.path for file in bundle.files(facts_of(), {"platform": platform, "python": "3.11"})}
    is_windows = platform.startswith("windows")
    assert ("start.bat" in names) == ("start.ps1" in names) == is_windows
    assert ("start.sh" in names) is not is_windows


@pytest.mark.parametrize(
    "name", ['a "b".gguf', "aux.gguf", "NUL", "com1.x.gguf", "model.", "a ", "x/con.json", "x /y", "a\\b"]
)
def test_a_name_that_windows_cannot_have_is_refused_there_alone(name: str) -> None:
    facts = facts_of(artifact_name="model", sha256={name: ""})
    bundle.check(facts, OPTIONS)
    with pytest.raises(UserError, match="Windows has no files"):
        bundle.check(facts, {**OPTIONS, "platform": "windows-x86_64"})


def test_names_that_windows_can_have() -> None:
    for name in ("console.gguf", "a.b c.gguf", "模型 & 100%!.gguf", "x/auxiliary/com.json", ".x"):
        bundle.check(facts_of(artifact_name=name), {**OPTIONS, "platform": "windows-x86_64"})


def _can_be_tried() -> bool:
    if sys.platform != "linux" or shutil.which(NO_NETWORK[0]) is None or shutil.which("ip") is None:
        return False
    return (
        subprocess.run([*NO_NETWORK, "ip link set lo up"], check=False, capture_output=True).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_a_bundle_installs_and_answers_without_a_network(kind: str, tmp_path: Path) -> None:
    if not _can_be_tried():
        pytest.skip("no network namespace can be made here")
    sys.path.insert(0, str(Path(__file__).parent.parent / "serve"))
    from parrot import make_parrot

    from cusprun import deploy
    from exporters import gguf, onnx

    model = make_parrot(tmp_path / "parrot").folder
    artifact = (
        gguf.export(model, tmp_path / "my expert 模型.gguf", quant="f32")
        if kind == "gguf"
        else onnx.export(model, tmp_path / "my expert 模型-onnx", quant="fp32")
    )
    try:
        out = deploy(artifact, "bundle", tmp_path / "the bundle", memory=500_000_000)
    except UserError as error:
        pytest.skip(f"the package index cannot be asked: {error}")
    moved = out.rename(tmp_path / "moved where it's used")
    # Where it is started from, and how that prints, is of no matter.
    (tmp_path / "cusprun.py").write_text("raise SystemExit('another cusprun')")
    settings = {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(tmp_path), "CUSPRUN_API_KEY": "another"}
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), **settings}
    python = str(Path(sys.base_prefix) / "bin" / "python3")
    done = subprocess.run(
        [*NO_NETWORK, 'ip link set lo up && exec "$0" "$1"', python, str(moved / "smoke.py")],
        capture_output=True, text=True, check=False, timeout=120, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "passed"
    listed = subprocess.run(
        [moved / "venv" / "bin" / "python", "-m", "pip", "list", "--format", "json"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert not {"torch", "transformers"} & {entry["name"] for entry in json.loads(listed.stdout)}


@pytest.mark.parametrize(("folder", "file"), [("x.dist-info", "METADATA"), ("x.egg-info", "PKG-INFO")])
def test_the_own_wheel_says_its_version_however_cusprun_is_installed(
    folder: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip refuses a wheel whose metadata names no version."""
    import io
    import zipfile
    from email import message_from_bytes
    from importlib import metadata

    from deploy.own_wheel import own_wheel

    (tmp_path / folder).mkdir()
    (tmp_path / folder / file).write_text("Metadata-Version: 2.1\nName: cusprun\nVersion: 7.8\n")
    monkeypatch.setattr(metadata, "distribution", lambda _: metadata.PathDistribution(tmp_path / folder))
    name, data = own_wheel()
    assert name == "cusprun-7.8-py3-none-any.whl"
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        found = message_from_bytes(wheel.read("cusprun-7.8.dist-info/METADATA"))
    assert (found["Name"], found["Version"]) == ("cusprun", "7.8")
