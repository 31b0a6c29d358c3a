"""Input that cannot be exported: one sentence, nothing left behind, the input untouched."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import TinyConfig, make_folder, rewrite_config

from cusprun.checkpoint.index import open_checkpoint
from cusprun.checkpoint.safetensors_header import read_header
from cusprun.errors import CusprunError, ExportError, ModelError, OutputError, UserError
from cusprun.version import __version__
from exporters import gguf as gguf_exporter
from exporters.gguf import check, export
from exporters.gguf_encode import encode, read_rows
from exporters.gguf_tensors import QUANTS, interleave_rope
from exporters.registry import FORMATS, format_of

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


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
        export(folder, folder.parent / "out.gguf", quant=quant)
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
    assert FORMATS["gguf"].export is export
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
    export(folder, folder.parent / "out.gguf", quant="bf16")


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
        ({"partial_rotary_factor": 0.5}, "partial_rotary"),
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
        ("phi3", {"sliding_window": 8, "pad_token_id": 0}, r"sliding_window = 8\).*it to null"),
        ("qwen3", {"rope_parameters": LLAMA3_ROPE}, "qwen3 has no llama3 rope scaling"),
        ("gemma3_text", {"rope_parameters": {"full_attention": LLAMA3_ROPE}}, "gemma3 has no llama3"),
        ("gemma3_text", {"attention_bias": True}, "without attention biases"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": YARN_ROPE}},
            "yarn scaling also to the blocks",
        ),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": LINEAR_ROPE}}, "are never scaled"),
    ],
)
def test_features_of_families_that_cannot_be_written(
    tmp_path: Path, model_type: str, config: dict[str, Any], match: str
) -> None:
    folder = make_folder(tmp_path / "tiny", TinyConfig(model_type, config))
    with pytest.raises(ExportError, match=match):
        check(open_checkpoint(folder), "f16")
    refused(folder, ExportError, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_activation": "gelu"}, "gelu_pytorch_tanh only, not with 'gelu'"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "states no rope_theta"),
    ],
)
def test_gemma3_configs_that_llama_cpp_cannot_compute(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    folder = make_folder(tmp_path / "tiny", TinyConfig("gemma3_text"))
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    rewrite_config(folder, **{**kinds, **changes})
    refused(folder, ExportError, match)


def test_gemma3_configs_of_older_versions_mean_the_same(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 2 + ["full_attention"]
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
             "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}  # fmt: skip
    tiny = TinyConfig("gemma3_text", {"num_hidden_layers": 3, "layer_types": kinds, "rope_parameters": ropes})
    folder = make_folder(tmp_path / "tiny", tiny)
    new = gguf.GGUFReader(export(folder, tmp_path / "new.gguf", quant="f16"))
    old_rope = {
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    }
    rewrite_config(folder, rope_parameters=None, layer_types=None, sliding_window_pattern=3, **old_rope)
    old = gguf.GGUFReader(export(folder, tmp_path / "old.gguf", quant="f16"))
    keys = [key for key in new.fields if key.startswith("gemma3.")]
    assert {key: old.fields[key].contents() for key in keys} == {
        key: new.fields[key].contents() for key in keys
    }


def test_a_window_that_mistral_does_not_state_is_the_stock_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny", TinyConfig("mistral", {"max_position_embeddings": 8192}))
    rewrite_config(folder, sliding_window=None)  # removes the key
    refused(folder, ExportError, "sliding_window = 4096")


def test_old_rope_layout_means_the_same(folder: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    rewrite_config(folder, rope_parameters={**scaling, "rope_theta": 5e5})
    new = gguf.GGUFReader(export(folder, folder.parent / "new.gguf", quant="f16")).fields
    rewrite_config(
        folder, rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0}
    )
    old = gguf.GGUFReader(export(folder, folder.parent / "old.gguf", quant="f16")).fields
    for key in ("llama.rope.freq_base", "llama.rope.scaling.type", "llama.rope.scaling.factor"):
        assert old[key].contents() == new[key].contents()
    assert new["llama.rope.freq_base"].contents() == 5e5


def test_full_disk_is_seen_before_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, num_bytes: int) -> None:
        raise OutputError(f"{path} needs {num_bytes} bytes")

    monkeypatch.setattr(gguf_exporter, "require_space", full)
    refused(folder, OutputError, "needs")


def test_disk_that_fills_while_writing(folder: Path) -> None:
    """A limit on the size of files stands for the disk: the system refuses to write beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
        refused(folder, OutputError, "free some space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_that_are_cut_off_after_the_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = folder / "model.safetensors"
    sound = weights.read_bytes()

    def cut(path: Path, num_bytes: int) -> None:
        weights.write_bytes(sound[:-5000])

    monkeypatch.setattr(gguf_exporter, "require_space", cut)
    with pytest.raises(ModelError, match="ended early"):
        export(folder, folder.parent / "out.gguf", quant="f16")
    assert not list(folder.parent.glob("*.gguf*"))


def test_rows_that_do_not_fill_a_block_stay_f16_and_are_reported(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "odd", TinyConfig("llama", {"num_hidden_layers": 1, "intermediate_size": 40})
    )
    losses = check(open_checkpoint(folder), "q8_0")
    assert any("stay f16" in loss and "40" in loss for loss in losses)
    reader = gguf.GGUFReader(export(folder, tmp_path / "m.gguf", quant="q8_0"))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.ffn_norm.weight"] == "F32"


STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("quant", QUANTS)
def test_chunks_are_what_torch_and_gguf_round_to(
    stored: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stored type to every written one, in uneven chunks, against the libraries on the whole."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(37, 64, generator=generator, dtype=torch.float64) * 3e-4
    values[0] *= 1e4
    tensor = values.to(STORED[stored])
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    info = read_header(tmp_path / "w.safetensors")["w"]
    kind = QUANTS[quant][0]
    if quant == "f16" and stored == "F64":
        wanted = tensor.numpy().astype(np.float16)
    elif quant == "f16":
        wanted = tensor.to(torch.float16).numpy()
    elif quant == "bf16":
        wanted = tensor.float().to(torch.bfloat16).view(torch.int16).numpy()
    else:
        wanted = gguf.quants.quantize(tensor.float().numpy(), kind)
    found = [encode(rows, info, kind).copy() for rows in read_rows(info, 0, 37, 5)]
    assert np.concatenate(found).tobytes() == wanted.tobytes()


def test_every_bfloat16_becomes_the_nearest_float16(tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    numbers = numbers[numbers.float().abs() <= 65504]
    save_file({"w": numbers}, tmp_path / "w.safetensors")
    info = read_header(tmp_path / "w.safetensors")["w"]
    (rows,) = read_rows(info, 0, len(numbers), len(numbers))
    found = encode(rows, info, gguf.GGMLQuantizationType.F16)
    assert found.tobytes() == numbers.to(torch.float16).numpy().tobytes()


@pytest.mark.parametrize("rotated", [8, 4])
def test_interleaving_brings_rotated_pairs_together(rotated: int) -> None:
    heads, head_dim = 3, 8
    rows = np.arange(heads * head_dim)
    found = interleave_rope(rows, head_dim, rotated)
    for start in range(0, heads * head_dim, head_dim):
        for pair in range(rotated // 2):
            first = start + pair
            assert found[start + 2 * pair :][:2].tolist() == [first, first + rotated // 2]
        assert (
            found[start + rotated : start + head_dim].tolist()
            == rows[start + rotated :][: head_dim - rotated].tolist()
        )


def test_manifest_and_model_card_label_the_file(folder: Path) -> None:
    (folder / "cusprun.json").write_text(
        '{"cusprun_version": "0.1.0", "source": "org/Base-1B", "source_hash": "ab", "rule": "mean", '
        '"expert": {"name": "maths-en"}, "plan": {"ratio": 0.25}}',
        encoding="utf-8",
    )
    card = "license: other\nlicense_name: own\nlanguage: [en, de]\ntags: maths\nbase_model: org/older"
    (folder / "README.md").write_text(f"---\n{card}\n---\n# Model\n", encoding="utf-8")
    fields = gguf.GGUFReader(export(folder, folder.parent / "m.gguf", quant="f16")).fields
    wanted = {
        "general.architecture": "llama", "general.type": "model", "general.name": "maths-en",
        "general.basename": "Base", "general.finetune": "maths-en", "general.license": "other",
        "general.license.name": "own", "general.languages": ["en", "de"], "general.tags": ["maths"],
        "general.base_model.count": 1, "general.base_model.0.name": "Base-1B",
        "general.base_model.0.organization": "org", "general.quantized_by": f"cusprun {__version__}",
        "cusprun.source_hash": "ab", "cusprun.ratio": 0.25, "cusprun.version": "0.1.0",
    }  # fmt: skip
    assert {key: fields[key].contents() for key in wanted} == wanted
    assert fields["general.size_label"].contents() == f"{open_checkpoint(folder).num_parameters / 1e3:.0f}K"


def test_a_source_on_this_machine_is_named_without_its_place(folder: Path) -> None:
    (folder / "cusprun.json").write_text('{"source": "/home/me/models/mine-1B"}', encoding="utf-8")
    file = export(folder, folder.parent / "m.gguf", quant="f16")
    assert gguf.GGUFReader(file).fields["general.base_model.0.name"].contents() == "mine-1B"
    assert b"/home/me" not in file.read_bytes()


@pytest.mark.parametrize(
    ("model_type", "config", "loss"),
    [
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window_pattern"),
        ("qwen2", {"head_dim": 24}, "says 'llama'"),
        ("phi3", {"head_dim": 24, "pad_token_id": 0}, "says 'llama'"),
    ],
)
def test_another_graph_or_pattern_of_windows_is_reported(
    tmp_path: Path, model_type: str, config: dict[str, Any], loss: str
) -> None:
    folder = make_folder(tmp_path / "tiny", TinyConfig(model_type, config))
    assert any(loss in found for found in check(open_checkpoint(folder), "f16"))
