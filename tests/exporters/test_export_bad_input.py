"""Input that cannot be exported: one sentence, nothing left behind, the input untouched."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import TinyConfig, make_folder, rewrite_config

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import CusprunError, ExportError, ModelError, OutputError, UserError
from exporters import gguf as gguf_exporter
from exporters.gguf import check, export_gguf
from exporters.gguf_tensors import encode, interleave_rope
from exporters.registry import FORMATS, format_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny", TinyConfig("llama", {"num_hidden_layers": 1}))


def change_weights(folder: Path, name: str, value: float) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[3] = value
    save_file(weights, path, metadata={"format": "pt"})


def refused(folder: Path, error: type[CusprunError], match: str, quant: str = "f16") -> None:
    """Export must raise and leave the folder around as it was."""
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    with pytest.raises(error, match=match) as caught:
        export_gguf(folder, folder.parent / "out.gguf", quant=quant)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before


def test_unknown_precision_names_the_nearest(folder: Path) -> None:
    refused(folder, ExportError, "did you mean 'q8_0'", quant="q8")
    with pytest.raises(ExportError, match="f16"):
        check(open_checkpoint(folder), "fp16")


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'gguf'"):
        format_of("ggml")


def test_formats_resolve_to_the_functions_of_their_module() -> None:
    assert FORMATS["gguf"].export is export_gguf
    assert FORMATS["gguf"].check is check


def test_existing_output_is_kept(folder: Path) -> None:
    out = folder.parent / "out.gguf"
    out.write_text("mine", encoding="utf-8")
    refused(folder, OutputError, "exists already")
    assert out.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    change_weights(folder, "model.layers.0.mlp.up_proj.weight", value)
    refused(folder, ModelError, "NaN or infinite")


def test_value_beyond_f16(folder: Path) -> None:
    change_weights(folder, "model.layers.0.mlp.up_proj.weight", 1e5)
    refused(folder, ExportError, "use bf16 or f32")
    export_gguf(folder, folder.parent / "out.gguf", quant="bf16")


def test_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, ExportError, "no tokenizer")


def test_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:100].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(folder, vocab_size=100)
    refused(folder, ExportError, "100 rows")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_settings_that_llama_cpp_lacks(folder: Path, changes: dict[str, Any], match: str) -> None:
    rewrite_config(folder, **changes)
    refused(folder, ExportError, match)


@pytest.mark.parametrize(
    ("model_type", "config", "match"),
    [
        ("mistral", {"sliding_window": 8}, r"sliding_window = 8\).*it to null"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "use_sliding"),
        ("qwen3", {"attention_bias": True}, "without attention biases"),
        ("gemma3_text", {}, "family gemma3_text cannot be written.*supported: llama, mistral"),
        ("phi3", {}, "family phi3 cannot be written"),
    ],
)
def test_families_and_their_features_that_cannot_be_written(
    tmp_path: Path, model_type: str, config: dict[str, Any], match: str
) -> None:
    folder = make_folder(tmp_path / "tiny", TinyConfig(model_type, config))
    with pytest.raises(ExportError, match=match):
        check(open_checkpoint(folder), "f16")
    refused(folder, ExportError, match)


def test_a_window_that_mistral_does_not_state_is_the_stock_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny", TinyConfig("mistral"))
    rewrite_config(folder, sliding_window=None)  # removes the key
    refused(folder, ExportError, "sliding_window = 4096")


def test_old_rope_layout_means_the_same(folder: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    rewrite_config(folder, rope_parameters={**scaling, "rope_theta": 5e5})
    new = gguf.GGUFReader(export_gguf(folder, folder.parent / "new.gguf")).fields
    rewrite_config(
        folder, rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0}
    )
    old = gguf.GGUFReader(export_gguf(folder, folder.parent / "old.gguf")).fields
    for key in ("llama.rope.freq_base", "llama.rope.scaling.type", "llama.rope.scaling.factor"):
        assert old[key].contents() == new[key].contents()
    assert new["llama.rope.freq_base"].contents() == 5e5


def test_full_disk_is_seen_before_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, num_bytes: int) -> None:
        raise OutputError(f"{path} needs {num_bytes} bytes")

    monkeypatch.setattr(gguf_exporter, "require_space", full)
    refused(folder, OutputError, "needs")


@pytest.mark.parametrize("number", [errno.ENOSPC, None])
def test_disk_that_fills_while_writing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, "No space left on device") if number else OSError("10 requested and 0 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    refused(folder, OutputError, "free")


def test_rows_that_do_not_fill_a_block_stay_f16_and_are_reported(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "odd", TinyConfig("llama", {"num_hidden_layers": 1, "intermediate_size": 40})
    )
    losses = check(open_checkpoint(folder), "q8_0")
    assert any("stay f16" in loss and "40" in loss for loss in losses)
    reader = gguf.GGUFReader(export_gguf(folder, tmp_path / "m.gguf", quant="q8_0"))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.ffn_norm.weight"] == "F32"


def test_q8_0_in_row_chunks_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(37, 64, generator=torch.Generator().manual_seed(0))
    whole = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.setattr("exporters.gguf_tensors._CHUNK_ELEMENTS", 64 * 5)
    assert np.array_equal(encode(tensor, gguf.GGMLQuantizationType.Q8_0, "here"), whole)


def test_interleaving_brings_rotated_pairs_together() -> None:
    heads, head_dim = 3, 8
    rows = torch.arange(heads * head_dim)
    for head in range(heads):
        for pair in range(head_dim // 2):
            first = head * head_dim + pair
            found = interleave_rope(rows, heads)[head * head_dim + 2 * pair :][:2].tolist()
            assert found == [first, first + head_dim // 2]


def test_manifest_and_model_card_label_the_file(folder: Path) -> None:
    (folder / "cusprun.json").write_text(
        '{"cusprun_version": "0.1.0", "source": "org/base", "source_hash": "ab", "rule": "mean", '
        '"expert": {"name": "maths-en"}, "plan": {"ratio": 0.25}}',
        encoding="utf-8",
    )
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n", encoding="utf-8")
    fields = gguf.GGUFReader(export_gguf(folder, folder.parent / "m.gguf")).fields
    wanted = {
        "general.name": "maths-en", "general.license": "apache-2.0", "general.base_model.0.name": "org/base",
        "cusprun.source_hash": "ab", "cusprun.ratio": 0.25, "cusprun.version": "0.1.0",
    }  # fmt: skip
    assert {key: fields[key].contents() for key in wanted} == wanted
