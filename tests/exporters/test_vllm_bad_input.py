"""What an export for vLLM refuses, and what is told about a folder that exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import TinyConfig, make_folder, rewrite_config
from tiny_vllm import FAMILIES, QWEN2, SIZES

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ExportError, MissingDependencyError, ModelError, OutputError
from exporters import vllm, vllm_schemes
from exporters.vllm import Options, check, export, locate, quant_of

pytest.importorskip("compressed_tensors")
torch.set_num_threads(1)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "llama", FAMILIES["llama"])


class TestBadInput:
    """Refused before anything is written, with what to do."""

    @pytest.mark.parametrize(
        ("quant", "options", "reason"),
        [
            ("int3", Options(), "did you mean 'int"),
            ("q4_k_m", Options(), "known: bfloat16"),
            ("int4", Options(group_size=100), "128, 64, 32, not 100"),
            ("int8", Options(tensor_parallel=3), "tensor_parallel can be 1, 2, 4"),
            ("int8", Options(tensor_parallel=0), "at least 1"),
            ("int8", Options(tensor_parallel=True), "whole number"),
        ],
    )
    def test_options(self, llama: Path, tmp_path: Path, quant: str, options: Options, reason: str) -> None:
        with pytest.raises(ExportError, match=reason):
            export(llama, tmp_path / "out", quant=quant, options=options)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("quant", ["float32", "int4"])
    def test_weights_that_are_not_finite(self, llama: Path, tmp_path: Path, value: float, quant: str) -> None:
        weights = load_file(llama / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"][3, 4] = value
        save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinite"):
            export(llama, tmp_path / "out", quant=quant)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]

    def test_weights_beyond_float16(self, llama: Path, tmp_path: Path) -> None:
        weights = load_file(llama / "model.safetensors")
        weights["model.norm.weight"][0] = 1e5
        save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ExportError, match="float16 cannot hold"):
            export(llama, tmp_path / "out", quant="float16")
        assert not (tmp_path / "out").exists()

    def test_no_tokenizer(self, llama: Path, tmp_path: Path) -> None:
        (llama / "tokenizer.json").unlink()
        with pytest.raises(ExportError, match="no tokenizer"):
            export(llama, tmp_path / "out")

    def test_damaged_tokenizer_leaves_nothing_behind(self, llama: Path, tmp_path: Path) -> None:
        (llama / "tokenizer.json").write_text("{", encoding="utf-8")
        with pytest.raises(ExportError, match="transformers refuses"):
            export(llama, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]

    def test_output_that_exists_or_does_not_fit(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(OutputError, match="exists already"):
            export(llama, llama)

        def full(path: Path, num_bytes: int) -> None:
            raise OutputError(f"{path} needs {num_bytes} bytes")

        monkeypatch.setattr(vllm, "require_space", full)
        with pytest.raises(OutputError, match="needs"):
            export(llama, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_library_that_is_not_installed(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(vllm_schemes, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'cusprun\[vllm\]'"):
            check(open_checkpoint(llama), "int8")
        check(open_checkpoint(llama), "bfloat16")

    def test_what_vllm_would_drop_or_refuse(self, tmp_path: Path) -> None:
        sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        for name, tiny, reason in (
            ("bias", TinyConfig("qwen3", {**SIZES, "head_dim": 32, "attention_bias": True}, QWEN2), "o_proj"),
            ("gelu", TinyConfig("llama", {**SIZES, "hidden_act": "gelu"}), "silu only"),
            ("mixed", TinyConfig("qwen2", {**SIZES, **sliding}, QWEN2), "in all blocks or in none"),
            ("narrow", TinyConfig("llama", {"hidden_size": 40, "intermediate_size": 80}), "no row length"),
        ):
            folder = make_folder(tmp_path / name, tiny)
            with pytest.raises(ExportError, match=reason):
                check(open_checkpoint(folder), "int4")

    def test_code_of_the_folder_is_left_behind(self, llama: Path, tmp_path: Path) -> None:
        rewrite_config(llama, auto_map={"AutoModelForCausalLM": "evil.Model"})
        (llama / "evil.py").write_text("raise SystemExit", encoding="utf-8")
        out = export(llama, tmp_path / "out")
        assert "auto_map" not in json.loads((out / "config.json").read_text(encoding="utf-8"))
        assert not (out / "evil.py").exists()


class TestArtifact:
    """What is told about a folder that exists."""

    def test_other_artifacts_are_not_ours(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        (tmp_path / "empty").mkdir()
        assert quant_of(tmp_path / "m.gguf") is None
        assert quant_of(tmp_path / "empty") is None
        assert quant_of(tmp_path / "absent") is None
        (llama / "genai_config.json").write_text("{}", encoding="utf-8")
        assert quant_of(llama) is None

    def test_precisions_without_limits_are_named(self, llama: Path) -> None:
        rewrite_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(ExportError, match="'gptq'"):
            quant_of(llama)
        rewrite_config(llama, quantization_config=None, dtype="float64")
        with pytest.raises(ExportError, match="float64"):
            quant_of(llama)

    @pytest.mark.parametrize("quant", ["float32", "bfloat16", "int8", "int4"])
    def test_locate_names_the_first_tensor_that_is_off(self, llama: Path, tmp_path: Path, quant: str) -> None:
        out = export(llama, tmp_path / "out", quant=quant)
        file = out / "model.safetensors"
        weights = load_file(file)
        for layer in (1, 0):  # two are off; the first in the graph is wanted
            stem = f"model.layers.{layer}.self_attn.v_proj.weight"
            name = f"{stem}_scale" if f"{stem}_scale" in weights else stem
            weights[name] = weights[name].roll(7, dims=0)
        save_file(weights, file, metadata={"format": "pt"})
        sentence = locate(llama, out, quant)
        assert sentence is not None
        assert "model.layers.0.self_attn.v_proj.weight" in sentence
        del weights["model.norm.weight"]  # comes after the blocks
        save_file(weights, file, metadata={"format": "pt"})
        assert locate(llama, out, quant) == sentence

    def test_stop_ids_of_the_config_reach_vllm(self, llama: Path, tmp_path: Path) -> None:
        rewrite_config(llama, eos_token_id=[3, 0])
        (llama / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.9}', encoding="utf-8")
        out = export(llama, tmp_path / "out")
        made = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
        assert made == {"eos_token_id": [2, 3, 0], "top_p": 0.9}
        (llama / "generation_config.json").unlink()
        out = export(llama, tmp_path / "again")
        made = json.loads((out / "generation_config.json").read_text(encoding="utf-8"))
        assert made == {"bos_token_id": 1, "eos_token_id": [3, 0]}
