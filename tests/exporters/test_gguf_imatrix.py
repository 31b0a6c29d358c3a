"""The importance matrix: that it reaches the right tensor, and that it lowers the error it is there for."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_exports import QWEN2_PATTERN, TinyConfig, make_folder, split_then_bytes

from cusprun.errors import ExportError
from exporters.gguf import Options, export

llama_cpp = pytest.importorskip("llama_cpp")

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
QWEN2 = {"pre": split_then_bytes(QWEN2_PATTERN), "nfc": True, "bos": False}
CONFIGS = {
    "llama": TinyConfig("llama", WIDE),
    "llama tied": TinyConfig("llama", {**WIDE, "tie_word_embeddings": True}),
    "llama biases": TinyConfig("llama", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "qwen3": TinyConfig("qwen3", WIDE, QWEN2),
    "gemma3": TinyConfig(
        "gemma3_text",
        {**WIDE, "tie_word_embeddings": True, "query_pre_attn_scalar": 64, "sliding_window": 16},
    ),
    "phi3": TinyConfig("phi3", {**WIDE, "pad_token_id": 0, "sliding_window": None}),
}
PARTS = {
    "attn_q": ("self_attn.q_proj", "self_attn.qkv_proj"),
    "attn_k": ("self_attn.k_proj", "self_attn.qkv_proj"),
    "attn_v": ("self_attn.v_proj", "self_attn.qkv_proj"),
    "attn_qkv": ("self_attn.qkv_proj",),
    "attn_output": ("self_attn.o_proj",),
    "ffn_gate": ("mlp.gate_proj", "mlp.gate_up_proj"),
    "ffn_up": ("mlp.up_proj", "mlp.gate_up_proj"),
    "ffn_down": ("mlp.down_proj",),
}
"""Modules by GGUF's name of the part, written down apart from the exporter's own table."""


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIGS[request.param])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny", TinyConfig("llama", {**WIDE, "num_hidden_layers": 1}))


def random_importance(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A vector of its own for every matrix, spread over four powers of ten."""
    generator = np.random.default_rng(0)
    widths = {
        name.removesuffix(".weight"): tensor.shape[1]
        for name, tensor in load_file(folder / "model.safetensors").items()
        if tensor.ndim == 2 and "embed" not in name
    }
    widths["lm_head"] = 256
    return {key: (10 ** generator.uniform(-2, 2, n)).astype(np.float32) for key, n in widths.items()}


def module_of(tensor: str, importance: Mapping[str, object]) -> str | None:
    """The module whose input a GGUF tensor multiplies."""
    if tensor in ("output.weight", "token_embd.weight"):
        return "lm_head"
    _, layer, part, _ = tensor.split(".")
    keys = [f"model.layers.{layer}.{module}" for module in PARTS.get(part, ())]
    return next((key for key in keys if key in importance), None)


def matrices(path: Path) -> dict[str, Any]:
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: tensor for tensor in tensors if len(tensor.shape) > 1}


def values(tensor: Any) -> np.ndarray[Any, Any]:
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float64)


def test_every_matrix_is_closer_where_its_own_inputs_are_large(folder: Path, tmp_path: Path) -> None:
    importance = random_importance(folder)
    exact = matrices(export(folder, tmp_path / "f32.gguf", quant="f32"))
    without = matrices(export(folder, tmp_path / "without.gguf", quant="q4_k_s"))
    done = matrices(export(folder, tmp_path / "with.gguf", quant="q4_k_s", importance=importance))
    assert exact.keys() == done.keys()
    tied = "output.weight" not in exact
    for name, tensor in done.items():
        if name == "token_embd.weight" and not tied:
            assert np.array_equal(tensor.data, without[name].data)  # it is only looked up in
            continue
        module = module_of(name, importance)
        assert module is not None, name
        weighted = [
            float((np.square(values(found) - values(exact[name])) * importance[module]).sum())
            for found in (tensor, without[name])
        ]
        # Vectors of another matrix would make it worse; the 6-bit output gains least.
        assert weighted[0] < 0.9 * weighted[1], name


def raw(source: Path, out: Path, ftype: str, imatrix: Mapping[str, np.ndarray[Any, Any]]) -> Path:
    """Call the quantiser by hand, without anything of the exporter."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}"), 2
    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
    for number, (name, vector) in enumerate(imatrix.items()):
        entries[number].name, entries[number].size = name.encode(), len(vector)
        entries[number].data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if imatrix:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return out


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quant", ["q4_k_m", "q2_k", "iq4_nl"])
def test_the_bytes_are_those_of_llama_cpp_called_by_hand(
    llama: Path, tmp_path: Path, quant: str, dtype: str
) -> None:
    import torch

    path = llama / "model.safetensors"
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(path).items()}
    save_file(cast, path, metadata={"format": "pt"})
    importance = random_importance(llama)
    source = export(llama, tmp_path / "f32.gguf", quant="f32")
    vectors = {
        name: importance[str(module_of(name, importance))]
        for name in matrices(source)
        if name != "token_embd.weight"
    }
    wanted = matrices(raw(source, tmp_path / "raw.gguf", quant.upper(), vectors))
    found = matrices(
        export(llama, tmp_path / "x.gguf", quant=quant, importance=importance, options=Options(threads=1))
    )
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.tensor_type == wanted[name].tensor_type
        assert np.array_equal(tensor.data, wanted[name].data), name


def test_the_file_says_how_many_matrices_had_an_importance(llama: Path, tmp_path: Path) -> None:
    key = "quantize.imatrix.entries_count"
    for importance, count in ((random_importance(llama), 8), (None, None)):
        path = export(llama, tmp_path / f"{count}.gguf", quant="q4_0", importance=importance)
        entry = gguf.GGUFReader(path).fields.get(key)
        assert (entry and entry.contents()) == count


def test_it_can_be_refused_and_is_not_needed_at_8_bits(llama: Path, tmp_path: Path) -> None:
    plain = export(llama, tmp_path / "a.gguf", quant="q4_0")
    off = export(
        llama, tmp_path / "b.gguf", quant="q4_0",
        importance=random_importance(llama), options=Options(imatrix=False),
    )  # fmt: skip
    assert off.read_bytes() == plain.read_bytes()
    eight = [
        export(llama, tmp_path / f"{n}.gguf", quant="q8_0", importance=given).read_bytes()
        for n, given in enumerate((None, random_importance(llama)))
    ]
    assert eight[0] == eight[1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda v: v[:-1], r"shape \(511,\)"),
        (lambda v: np.full_like(v, np.nan), "not finite"),
        (lambda v: np.full_like(v, np.inf), "not finite"),
        (lambda v: -v, "negative"),
        (lambda v: v[None], r"shape \(1, 512\)"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_before_writing(
    llama: Path, tmp_path: Path, change: Any, match: str
) -> None:
    key = "model.layers.0.mlp.down_proj"
    importance = random_importance(llama)
    importance[key] = change(importance[key])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=match) as caught:
        export(llama, tmp_path / "x.gguf", quant="q4_0", importance=importance)
    assert key in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_matrices_without_importance_are_named(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    importance = random_importance(llama)
    del importance["model.layers.0.self_attn.o_proj"]
    importance["model.layers.0.mlp.down_proj"][:] = 0
    path = export(llama, tmp_path / "x.gguf", quant="q4_k_s", importance=importance)
    assert "2 of 8 matrices (blk.0.attn_output.weight, ...) have no importance" in caplog.text or (
        "2 of 8 matrices (blk.0.ffn_down.weight, ...) have no importance" in caplog.text
    )
    plain, found = matrices(export(llama, tmp_path / "y.gguf", quant="q4_k_s")), matrices(path)
    same = {name for name in found if np.array_equal(found[name].data, plain[name].data)}
    assert same == {"blk.0.attn_output.weight", "blk.0.ffn_down.weight", "token_embd.weight"}


def test_inputs_that_no_document_used_keep_their_weights(llama: Path, tmp_path: Path) -> None:
    importance = random_importance(llama)
    importance["model.layers.0.mlp.down_proj"][32:96] = 0
    for quant in ("q4_0", "q4_k_s", "iq4_nl", "q2_k"):
        path = export(llama, tmp_path / f"{quant}.gguf", quant=quant, importance=importance)
        found = values(matrices(path)["blk.0.ffn_down.weight"])[:, 32:96]
        exact = load_file(llama / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].numpy()[
            :, 32:96
        ]
        assert np.linalg.norm(found - exact) < 0.6 * np.linalg.norm(exact), quant
