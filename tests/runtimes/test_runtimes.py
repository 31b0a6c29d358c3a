"""Both runtimes behind the protocol, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_exports import SENTENCES, TinyConfig, make_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from cusprun.errors import MissingDependencyError, ModelError, UserError
from cusprun.records import Message
from exporters.gguf import export
from serve.runtimes import llamacpp
from serve.runtimes.chat_template import render_template
from serve.runtimes.llamacpp import LlamaCppRuntime
from serve.runtimes.protocol import Runtime
from serve.runtimes.torch_runtime import TorchRuntime

pytest.importorskip("llama_cpp")
CHAT = (Message("user", "hi"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("runtime") / "tiny", TinyConfig("llama"))


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    return export(folder, folder.parent / "m.gguf", quant="f32")


@pytest.fixture(params=["torch", "llamacpp"])
def runtime(request: pytest.FixtureRequest, folder: Path, artifact: Path) -> Any:
    made: Runtime = (
        TorchRuntime(folder)
        if request.param == "torch"
        else LlamaCppRuntime(artifact, n_threads=1, kv_cache="f32")
    )
    yield made
    made.close()


def test_tokens_and_special_ids(runtime: Runtime, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (*SENTENCES, "", "<|im_start|>x", "😀"):
        assert runtime.tokenize(text, True) == tokenizer(text)["input_ids"]
        assert runtime.tokenize(text, False) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert runtime.special_ids.bos == tokenizer.bos_token_id
    assert runtime.special_ids.eos == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in runtime.special_ids.stop
    assert set(runtime.special_texts) == set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    assert runtime.vocab_size == len(tokenizer)


def test_logits_of_every_position_beyond_one_batch(runtime: Runtime, folder: Path) -> None:
    ids = torch.randint(0, runtime.vocab_size, (700,), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(ids[None]).logits[0].numpy()
    found = runtime.logits(ids.tolist())
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-3
    assert np.array_equal(runtime.logits(ids[:5].tolist()).shape, (5, runtime.vocab_size))
    assert np.abs(runtime.logits(ids[:5].tolist()) - wanted[:5]).max() < 1e-3
    assert runtime.logits([]).shape == (0, runtime.vocab_size)


def test_greedy_continuation_is_that_of_transformers(runtime: Runtime, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = runtime.tokenize(SENTENCES[0], True)
    wanted = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0,
        eos_token_id=list(runtime.special_ids.stop),
    )[0, len(prompt) :].tolist()  # fmt: skip
    wanted = wanted[: next((i for i, t in enumerate(wanted) if t in runtime.special_ids.stop), len(wanted))]
    assert list(runtime.generate(prompt, 12)) == wanted
    assert list(runtime.generate(prompt, 12)) == wanted


def test_generation_ends_before_a_stop_token(runtime: Runtime, folder: Path) -> None:
    prompt = runtime.tokenize(SENTENCES[0], True)
    free = list(runtime.generate(prompt, 3))
    assert len(free) <= 3
    assert not set(free) & set(runtime.special_ids.stop)


def test_chat_prompt_has_one_bos(runtime: Runtime, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = "<|begin|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert runtime.render_chat(CHAT) == wanted
    ids = runtime.chat_token_ids(CHAT)
    assert ids == tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_model_without_a_template_has_no_chat(tmp_path: Path) -> None:
    plain = make_folder(tmp_path / "m", TinyConfig("llama", {"num_hidden_layers": 1}, {"template": ""}))
    reference = TorchRuntime(plain)
    candidate = LlamaCppRuntime(export(plain, tmp_path / "m.gguf", quant="f16"), n_threads=1)
    for runtime in (reference, candidate):
        assert runtime.render_chat(CHAT) is None
        assert runtime.chat_token_ids(CHAT) == []
    candidate.close()


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
