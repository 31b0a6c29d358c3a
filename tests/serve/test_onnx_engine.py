"""What the onnx engine starts with, and a folder without a chat template."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from tiny_exports import TinyConfig, byte_level_tokenizer, make_folder

from cusprun.errors import MissingDependencyError, ModelError, UserError
from serve.api.errors import ApiError
from serve.api.requests import CHAT, COMPLETIONS, read
from serve.engines import onnx as engine
from serve.engines.protocol import EngineSettings

for name in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(name)
from exporters.onnx import export  # noqa: E402


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without a template."""
    out = tmp_path_factory.mktemp("onnx")
    tokenizer = byte_level_tokenizer(template="")
    folder = make_folder(out / "m", TinyConfig("llama", {"num_hidden_layers": 1}), tokenizer)
    return export(folder, out / "onnx", quant="fp32")


def test_folder_without_a_template_refuses_chats_and_the_context_is_as_asked(artifact: Path) -> None:
    running = engine.start(EngineSettings(artifact, "tiny", context_tokens=64, num_threads=1))
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    try:
        assert running.context_tokens == 64
        with pytest.raises(ApiError, match="no chat template"):
            asyncio.run(running.backend.answer(read(CHAT, json.dumps(chat).encode())))
        long = read(COMPLETIONS, json.dumps({"prompt": [5] * 64}).encode())
        with pytest.raises(ApiError, match="64 tokens and the context holds 64"):
            asyncio.run(running.backend.answer(long))
    finally:
        running.close()


def test_start_refuses_what_cannot_be(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--nope"):
        engine.start(EngineSettings(artifact, "tiny", options=("--nope",)))
    with pytest.raises(UserError, match="2 to 512, not 513"):
        engine.start(EngineSettings(artifact, "tiny", context_tokens=513))
    broken = tmp_path / "broken"
    shutil.copytree(artifact, broken)
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes()[:500])
    with pytest.raises(ModelError, match="cannot be loaded by onnxruntime-genai"):
        engine.start(EngineSettings(broken, "tiny"))
    engine.require()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cusprun\[onnx\]'"):
        engine.require()
