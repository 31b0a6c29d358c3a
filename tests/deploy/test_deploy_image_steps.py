"""The steps of an image, taken one by one without a container engine, and the server that comes of them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import dockerfiles
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "serve"))
from parrot import CHAT_ANSWER, CONTEXT_TOKENS, make_parrot

PREFIX = "/opt/cusprun"
KEY = "a-key-of-the-test"
LIMIT_S = 120.0
HERE = Path(sys.executable).parent


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporters import gguf

    folder = tmp_path_factory.mktemp("made")
    model = make_parrot(folder / "parrot").folder
    return gguf.export(model, folder / "the parrot's.gguf", quant="f32")


def require_index() -> None:
    """Skip where pip finds no index."""
    command = [sys.executable, "-m", "pip", "index", "versions", "typing-extensions"]
    if subprocess.run(command, capture_output=True, check=False, timeout=60).returncode:
        pytest.skip("pip reaches no index")


def run_steps(stage: dockerfiles.Stage, context: Path, prefix: Path, programs: Path) -> None:
    """Copy and run what a build stage copies and runs, with ``prefix`` in the place of the image's folder.

    ``programs`` has the Python of the base image.
    """
    work = context.parent / "work"
    work.mkdir()
    for step in stage.instructions:
        rest = step.rest.replace(PREFIX, str(prefix))
        if step.name == "COPY":
            source, target = rest.split()
            place = Path(target) if Path(target).is_absolute() else work / target
            if (context / source).is_dir():
                shutil.copytree(context / source, place)
            else:
                shutil.copyfile(context / source, place / source if place.is_dir() else place)
        elif step.name == "RUN":
            words = dockerfiles.Instruction("RUN", rest).words
            shell = ["sh", "-ec", rest.rpartition("/pip ")[2] if rest.startswith("--mount") else rest]
            path = f"{programs}{os.pathsep}{os.environ['PATH']}"
            environment = {"PATH": path, "HOME": str(work), **pip_settings()}
            done = subprocess.run(
                words or shell, cwd=work, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"


def pip_settings() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_")}


@pytest.mark.slow
def test_the_steps_make_a_server_that_answers(artifact: Path, tmp_path: Path) -> None:
    require_index()
    from cusprun.pipeline.deploy import deploy

    context = deploy(
        artifact,
        "docker",
        tmp_path / "out",
        context=CONTEXT_TOKENS,
        parallel=1,
        options={"original": str(artifact)},
    )
    composed = yaml.safe_load((context / "compose.yaml").read_text())
    assert "original" in composed["services"]
    assert (context / "original" / artifact.name).read_bytes() == artifact.read_bytes()
    _, stages = dockerfiles.read((context / "Dockerfile").read_text())
    prefix = tmp_path / "opt"
    run_steps(next(stage for stage in stages if stage.name == "build"), context, prefix, HERE)
    runtime = next(stage for stage in stages if stage.name == "runtime")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def here(words: list[str] | None) -> list[str]:
        assert words is not None
        places = {
            PREFIX: str(prefix),
            "/model/": f"{context}/model/",
            "0.0.0.0": "127.0.0.1",
            "8000": str(port),
        }
        for old, new in places.items():
            words = [word.replace(old, new) for word in words]
        return words

    command = here(runtime.last("ENTRYPOINT").words) + here(runtime.last("CMD").words)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CUSPRUN_API_KEY": KEY}
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        check = here(runtime.last("HEALTHCHECK").words)
        deadline = time.monotonic() + LIMIT_S
        while subprocess.run(check, capture_output=True, check=False).returncode:
            assert server.poll() is None, server.stderr and server.stderr.read()
            assert time.monotonic() < deadline, "the server does not become healthy"
        ask = [str(prefix / "bin" / "python"), str(prefix / "ask.py"), "What?"]
        address = {**environment, "CUSPRUN_URL": f"http://127.0.0.1:{port}"}
        done = subprocess.run(ask, env=address, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, CHAT_ANSWER), done.stderr
        (tmp_path / "wrong").write_text("another")
        refused = subprocess.run(
            [*ask, str(tmp_path / "wrong")], env=address, capture_output=True, text=True, check=False
        )
        assert refused.returncode == 1
        assert "API key" in refused.stderr
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=LIMIT_S) == 0
    finally:
        server.kill()
        server.wait()


def test_an_original_of_another_format_is_refused(artifact: Path, tmp_path: Path) -> None:
    from cusprun.errors import ExportError
    from cusprun.pipeline.deploy import deploy

    folder = artifact.parent / "parrot"
    with pytest.raises(ExportError, match="export the original to gguf as well"):
        deploy(artifact, "docker", tmp_path / "out", options={"original": str(folder)})
    assert not (tmp_path / "out").exists()


@pytest.mark.vllm
def test_cusprun_needs_nothing_that_vllm_does_not_bring(tmp_path: Path) -> None:
    """The steps of the image for a GPU, with the Python that has vLLM in the place of the base image."""
    from container_facts import files_of, make_facts, write

    from serve.runtimes.vllm_process import find_python

    python = find_python()
    context = write(files_of("docker", make_facts("vllm")), tmp_path / "out")
    _, stages = dockerfiles.read((context / "Dockerfile").read_text())
    prefix = tmp_path / "opt"
    run_steps(stages[0], context, prefix, python.parent)
    (check,) = [step.words for step in stages[1].all("RUN") if step.words]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(prefix), "HOME": str(tmp_path)}
    program = (
        "import sys; from serve.engines import vllm; vllm.require(); import serve.front.run, serve.front.app"
    )
    for words in (check[1:], ["-c", program]):
        done = subprocess.run(
            [str(python), *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
