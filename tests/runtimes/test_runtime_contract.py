"""What every runtime in this process promises, on tiny models against stock transformers.

vLLM's server is held to the same in ``test_vllm_runtime.py``, one start for many questions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_exports import SENTENCES, TinyConfig, byte_level_tokenizer, make_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from cusprun.errors import ModelError
from cusprun.records import Message
from exporters import gguf, onnx
from serve.runtimes.llamacpp import LlamaCppRuntime
from serve.runtimes.onnx_genai import OnnxGenaiRuntime
from serve.runtimes.onnx_plain import OnnxRuntime
from serve.runtimes.protocol import Runtime
from serve.runtimes.torch_runtime import TorchRuntime

torch.set_num_threads(1)

CHAT = (Message("user", "hi"),)
CONTEXT_TOKENS = 1024
ONE_LAYER = TinyConfig("llama", {"num_hidden_layers": 1})


def as_gguf(folder: Path) -> Path:
    pytest.importorskip("llama_cpp")
    out = folder.with_name(f"{folder.name}.gguf")
    return out if out.exists() else gguf.export(folder, out, quant="f32")


def as_onnx(folder: Path) -> Path:
    for library in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"):
        pytest.importorskip(library)
    out = folder.with_name(f"{folder.name}-onnx")
    return out if out.exists() else onnx.export(folder, out, quant="fp32")


KINDS: dict[str, Callable[[Path], Runtime]] = {
    "torch": TorchRuntime,
    "llamacpp": lambda folder: LlamaCppRuntime(as_gguf(folder), n_threads=1, kv_cache="f32"),
    "onnx_genai": lambda folder: OnnxGenaiRuntime(as_onnx(folder), n_threads=1),
    "onnx_plain": lambda folder: OnnxRuntime(as_onnx(folder), n_threads=1),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[[Path], Runtime]:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyConfig("llama", {"max_position_embeddings": CONTEXT_TOKENS})
    return make_folder(tmp_path_factory.mktemp("contract") / "tiny", tiny)


@pytest.fixture
def runtime(kind: Callable[[Path], Runtime], folder: Path) -> Any:
    made = kind(folder)
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
    few = runtime.logits(ids[:5].tolist())
    assert few.shape == (5, runtime.vocab_size)
    assert np.abs(few - wanted[:5]).max() < 1e-3
    assert runtime.logits([]).shape == (0, runtime.vocab_size)


def test_greedy_continuation_is_that_of_transformers(runtime: Runtime, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stop = runtime.special_ids.stop
    for text in SENTENCES:
        prompt = runtime.tokenize(text, True)
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0,
            eos_token_id=list(stop),
        )[0, len(prompt) :].tolist()  # fmt: skip
        wanted = wanted[: next((i for i, token in enumerate(wanted) if token in stop), len(wanted))]
        assert list(runtime.generate(prompt, 24)) == wanted
        assert list(runtime.generate(prompt, 24)) == wanted


def test_generation_ends_before_a_stop_token(
    kind: Callable[[Path], Runtime], folder: Path, tmp_path: Path
) -> None:
    """The third token of a continuation is made a token that ends a text."""
    reference = TorchRuntime(folder)
    prompt = reference.tokenize(SENTENCES[0], True)
    free = list(reference.generate(prompt, 8))
    third = next(i for i in range(2, 8) if free[i] not in free[:i])
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    path = changed / "generation_config.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(plain | {"eos_token_id": [*reference.special_ids.stop, free[third]]}))
    assert list(kind(changed).generate(prompt, 8)) == free[:third]


def test_chat_prompt_has_one_bos(runtime: Runtime, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = "<|begin|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert runtime.render_chat(CHAT) == wanted
    ids = runtime.chat_token_ids(CHAT)
    assert ids == tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_model_without_a_template_or_bos(kind: Callable[[Path], Runtime], tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(bos=False, template="")
    tokenizer.bos_token = None
    runtime = kind(make_folder(tmp_path / "m", ONE_LAYER, tokenizer))
    assert runtime.render_chat(CHAT) is None
    assert runtime.chat_token_ids(CHAT) == []
    assert runtime.tokenize("x", True) == runtime.tokenize("x", False)


def test_template_that_refuses_is_an_error_of_ours(kind: Callable[[Path], Runtime], tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(template="{{ raise_exception('only users') }}")
    with pytest.raises(ModelError, match="chat template refuses"):
        kind(make_folder(tmp_path / "m", ONE_LAYER, tokenizer)).render_chat(CHAT)
