"""What the ONNX export refuses, and that it leaves nothing behind."""

from __future__ import annotations

import shutil
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import TinyConfig, make_folder, rewrite_config, unigram_tokenizer

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ExportError, MissingDependencyError, ModelError, OutputError
from exporters.onnx import Options, check, export

for name in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(name)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama") / "tiny", TinyConfig("llama"))


@pytest.mark.parametrize(
    ("quant", "options", "words"),
    [
        ("int44", {}, "did you mean 'int4'"),
        ("int4", {"algorithm": "k_quants"}, "did you mean 'k_quant'"),
        ("int4", {"execution_provider": "cuda12"}, "did you mean 'cuda'"),
        ("int4", {"block_size": 48}, "block_size must be one of 16, 32"),
        ("int4", {"accuracy_level": 5}, "accuracy_level must be from 0 to 4"),
        ("int4", {"context_length": 1024}, "the model's own 512, not 1024"),
        ("int4", {"context_length": "long"}, "context_length must be a whole number"),
    ],
)
def test_wrong_options_are_refused(llama: Path, quant: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        check(open_checkpoint(llama), quant, Options(**options))


@pytest.mark.parametrize(
    ("tiny", "quant", "words"),
    [
        (TinyConfig("llama", {"head_dim": 24}), "fp32", "rotated part that is one of 16, not 24"),
        (TinyConfig("mistral", {"head_dim": 12, "sliding_window": None}), "fp32", "multiples of 8"),
        (TinyConfig("gemma3_text", {"head_dim": 16}), "fp16", "overflow float16"),
    ],
)
def test_what_cannot_be_computed_is_refused(tiny: TinyConfig, quant: str, words: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", tiny)
    with pytest.raises(ExportError, match=words):
        export(folder, tmp_path / "out", quant=quant)
    assert not (tmp_path / "out").exists()


def test_unknown_rope_scaling_and_activation_are_refused(llama: Path, tmp_path: Path) -> None:
    for number, (change, words) in enumerate(
        (
            ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope scaling"),
            ({"hidden_act": "mish"}, "no activation 'mish'"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(llama, folder)
        rewrite_config(folder, **change)
        with pytest.raises(ExportError, match=words):
            check(open_checkpoint(folder), "fp32")


def test_unigram_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", TinyConfig("llama"), unigram_tokenizer())
    with pytest.raises(ExportError, match="no Unigram tokenizer"):
        check(open_checkpoint(folder), "fp32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_refused_before_writing(llama: Path, tmp_path: Path, value: float) -> None:
    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight holds NaN or infinite"):
        export(folder, tmp_path / "out", quant="fp32")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_a_weight_too_large_for_float16_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="too large for fp16"):
        export(folder, tmp_path / "out", quant="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_missing_tokenizer_room_and_place_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="exists already"):
        export(llama, tmp_path, quant="fp32")
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    for path in bare.glob("*token*"):
        path.unlink()
    with pytest.raises(ExportError, match="holds no tokenizer"):
        export(bare, tmp_path / "out", quant="fp32")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OutputError, match="free some space"):
        export(llama, tmp_path / "out", quant="fp32")
    assert {path.name for path in tmp_path.iterdir()} == {"bare"}


@pytest.mark.parametrize("absent", ["onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"])
def test_a_missing_library_is_refused_with_the_command(
    llama: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == absent else real(name, *rest))
    with pytest.raises(MissingDependencyError, match=r"pip install 'cusprun\[onnx\]'"):
        check(open_checkpoint(llama), "fp32")


def test_a_failing_builder_leaves_nothing_and_says_why(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime_genai.models import builder

    def fail(_self: Any, _out: str) -> None:
        print("about to fail")
        raise ValueError("no such thing")

    monkeypatch.setattr(builder.LlamaModel, "save_model", fail)
    with pytest.raises(ExportError, match=r"failed with 'no such thing' after 'about to fail'"):
        export(llama, tmp_path / "out", quant="fp32")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
