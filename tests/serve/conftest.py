"""One known model, exported once to what each engine serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from endpoint import Endpoint, serving
from parrot import CONTEXT_TOKENS, Parrot, make_parrot


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Parrot:
    return make_parrot(tmp_path_factory.mktemp("parrot") / "parrot")


@pytest.fixture(scope="session")
def artifacts(parrot: Parrot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each engine serves."""
    from exporters import gguf, onnx

    out = tmp_path_factory.mktemp("artifacts")
    return {
        "llamacpp": gguf.export(parrot.folder, out / "parrot.gguf", quant="f32"),
        "onnx": onnx.export(parrot.folder, out / "parrot-onnx", quant="fp32"),
        "transformers": parrot.folder,
        "vllm": parrot.folder,
    }


ENGINE_OPTIONS = {
    "vllm": ("--", "--enforce-eager"),
    "llamacpp": ("--parallel", "2"),
    "onnx": ("--parallel", "2"),
}


@pytest.fixture(
    scope="session",
    params=["llamacpp", "onnx", "transformers", pytest.param("vllm", marks=pytest.mark.vllm)],
)
def endpoint(request: pytest.FixtureRequest, artifacts: dict[str, Path]) -> Iterator[Endpoint]:
    """A server of each engine."""
    engine = request.param
    options = ("--engine", engine, "--name", "parrot", "--context", str(CONTEXT_TOKENS))
    with serving(str(artifacts[engine]), *options, *ENGINE_OPTIONS.get(engine, ())) as running:
        yield running
