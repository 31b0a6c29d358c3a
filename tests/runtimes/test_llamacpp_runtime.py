"""What is special to transformers and llama.cpp as runtimes; see also ``test_runtime_contract.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_exports import TinyConfig, make_folder

from cusprun.errors import MissingDependencyError, ModelError, UserError
from cusprun.records import Message
from exporters.gguf import export
from serve.runtimes import llamacpp
from serve.runtimes.chat_template import render_template
from serve.runtimes.llamacpp import LlamaCppRuntime
from serve.runtimes.torch_runtime import TorchRuntime

pytest.importorskip("llama_cpp")
CHAT = (Message("user", "hi"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("runtime") / "tiny", TinyConfig("llama"))


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    return export(folder, folder.parent / "m.gguf", quant="f32")


def test_template_runs_in_a_sandbox() -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ModelError, match="refuses"):
        render_template(escape, CHAT, "", "")
    with pytest.raises(ModelError, match="only users"):
        render_template("{{ raise_exception('only users') }}", CHAT, "", "")
    assert render_template("{{ messages | tojson }}", (Message("user", "<ü>"),), "", "") == (
        '[{"role": "user", "content": "<ü>"}]'
    )


def test_llama_cpp_is_quiet(folder: Path, artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    runtime = LlamaCppRuntime(artifact, n_threads=1)
    runtime.logits([1, 2, 3])
    runtime.close()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_damaged_file_gives_the_reason_of_llama_cpp(artifact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(artifact.read_bytes()[:3000])
    with pytest.raises(ModelError, match="cannot be loaded by llama") as caught:
        LlamaCppRuntime(broken)
    assert "no reason" not in str(caught.value)
    with pytest.raises(ModelError, match="is not a file"):
        LlamaCppRuntime(tmp_path / "absent.gguf")


def test_unknown_cache_type_is_refused(artifact: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'f16'"):
        LlamaCppRuntime(artifact, kv_cache="fp16")


def test_missing_library_names_the_command(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cusprun\[llamacpp\]'"):
        LlamaCppRuntime(artifact)


def test_folder_that_transformers_cannot_load(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded by transformers"):
        TorchRuntime(tmp_path)
