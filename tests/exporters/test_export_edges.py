"""Odd but legal folders, names and options: what a careful user may give to every exporter."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_exports import TinyConfig, make_folder, rewrite_config, sentencepiece_tokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import cusprun
from cusprun.cache import fresh_output
from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ExportError, GateError, ModelError, UserError
from cusprun.records import Message
from exporters import gguf as gguf_export
from exporters import onnx as onnx_export
from exporters.registry import FORMATS
from serve.runtimes.llamacpp import LlamaCppRuntime
from serve.runtimes.onnx_genai import OnnxGenaiRuntime
from serve.runtimes.onnx_plain import OnnxRuntime

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")

PHI3 = TinyConfig("phi3", {"pad_token_id": 0, "sliding_window": None})
PHI3_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("edges") / "tiny", TinyConfig("llama"))


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


def report_of(artifact: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(artifact.with_name(f"{artifact.name}.parity.json").read_text())
    return plain


def test_a_gguf_file_may_have_any_name(folder: Path, tmp_path: Path) -> None:
    out = cusprun.export(folder, tmp_path / "model.bin", quant="f32")
    assert report_of(out)["verdict"] == "pass"
    assert cusprun.verify(folder, out)[0].quant == "f32"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Phi-3-chat", "Phi_3-chat"),
        ("myphi3", "myphi_3"),
        ("modern-bert", "modern_bert"),
        ("phi-4", "phi-4"),
    ],
)
def test_a_name_that_llama_cpp_concludes_from_is_spelt_otherwise(
    folder: Path, tmp_path: Path, name: str, written: str
) -> None:
    """By these names llama.cpp looks for tokens that this vocabulary has not, and refuses to load it."""
    named = Path(shutil.copytree(folder, tmp_path / name))
    out = gguf_export.export(named, tmp_path / "m.gguf", quant="f32")
    assert gguf.GGUFReader(out).fields["general.name"].contents() == written


def phi3_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens that swallow the space after them, as Phi 3 has them."""
    tokenizer = sentencepiece_tokenizer()
    texts = ("</s>", "<|user|>", "<|end|>", "<|assistant|>", "<|system|>")
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_tokens(
        [AddedToken(text, rstrip=True, special=True, normalized=False) for text in texts], special_tokens=True
    )
    tokenizer.chat_template = PHI3_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("name", ["Phi-3-mini", "expert"])
def test_tokens_of_phi3_swallow_spaces_under_any_name(tmp_path: Path, name: str) -> None:
    model = make_folder(tmp_path / name, PHI3, phi3_tokenizer())
    out = gguf_export.export(model, tmp_path / "m.gguf", quant="f32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    runtime = LlamaCppRuntime(out, n_threads=1)
    chat = [Message("user", "Hello, add two")]
    prompt = str(runtime.render_chat(chat))
    for text in (prompt, "a<|end|>   b", "<s> a", "<|endoftext|> a", "</s>\n\nb"):
        assert runtime.tokenize(text, False) == tokenizer(text, add_special_tokens=False)["input_ids"], text
    runtime.close()


@pytest.mark.parametrize("context", [8, 64])
def test_a_short_context_is_proven_on_texts_that_fit(folder: Path, tmp_path: Path, context: int) -> None:
    options = {"context_length": context}
    out = cusprun.export(folder, tmp_path / "short", to="onnx", quant="fp32", options=options)
    assert report_of(out)["verdict"] == "pass"
    assert OnnxGenaiRuntime(out).max_tokens == context


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_share_that_stock_code_ignores_is_refused(own: Path, format_name: str) -> None:
    """Stock llama rotates whole heads whatever this says; the runtimes do as it says."""
    rewrite_config(
        own, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    )
    chosen = FORMATS[format_name]
    with pytest.raises(
        ExportError, match=r"partial_rotary_factor is 0\.5, which stock code of llama ignores"
    ):
        chosen.check(open_checkpoint(own), chosen.quants[0])


@pytest.mark.parametrize("architectures", [None, ["GPT2LMHeadModel"], []])
def test_the_family_decides_on_the_graph(own: Path, tmp_path: Path, architectures: Any) -> None:
    rewrite_config(own, architectures=architectures)
    out = cusprun.export(own, tmp_path / "out", to="onnx", quant="fp32")
    assert report_of(out)["verdict"] == "pass"


def test_a_model_without_an_end_is_refused(tmp_path: Path) -> None:
    """llama.cpp would end texts at a token of its own choice."""
    qwen = make_folder(tmp_path / "qwen2", TinyConfig("qwen2"))
    rewrite_config(qwen, eos_token_id=None)
    (qwen / "generation_config.json").unlink()
    config = json.loads((qwen / "tokenizer_config.json").read_text(encoding="utf-8"))
    (qwen / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}), encoding="utf-8")
    for name in ("gguf", "onnx"):
        with pytest.raises(ExportError, match="names no eos_token_id"):
            FORMATS[name].check(open_checkpoint(qwen), FORMATS[name].quants[0])


def test_ids_without_a_row_end_nothing(own: Path, tmp_path: Path) -> None:
    path = own / "generation_config.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**plain, "eos_token_id": [3, 88888, -1]}), encoding="utf-8")
    for to, quant in (("gguf", "f32"), ("onnx", "fp32")):
        out = cusprun.export(own, tmp_path / f"out.{to}", to=to, quant=quant)
        assert report_of(out)["text"]["missing_stop_ids"] == []


def test_a_row_that_no_text_meets_is_compared_too(folder: Path, tmp_path: Path) -> None:
    out = gguf_export.export(folder, tmp_path / "m.gguf", quant="f32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from exporters.parity_text import probe_texts

    met = {token for text in probe_texts() for token in tokenizer(text)["input_ids"]}
    row = next(token for token in range(len(tokenizer)) if token not in met)
    reader = gguf.GGUFReader(out, "r+")
    data = next(tensor.data for tensor in reader.tensors if tensor.name == "token_embd.weight")
    data[row] *= 1.5
    data.flush()
    with pytest.raises(GateError, match=r"its weights are not those of the checkpoint \(token_embd\.weight"):
        cusprun.verify(folder, out)


def test_a_damaged_rotary_table_is_named(folder: Path, tmp_path: Path) -> None:
    import onnx

    out = onnx_export.export(folder, tmp_path / "out", quant="fp32")
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    table = next(tensor for tensor in graph.initializer if tensor.name == "sin_cache")
    offset = next(int(entry.value) for entry in table.external_data if entry.key == "offset")
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[offset + 4 * 100 + 3] ^= 0x40
    (out / "model.onnx.data").write_bytes(data)
    assert "sin_cache is off by" in str(onnx_export.locate(folder, out, "fp32"))


def test_a_second_rejected_folder_takes_the_place_of_the_first(
    own: Path, folder: Path, tmp_path: Path
) -> None:
    from cusprun.pipeline.proof import prove
    from cusprun.progress import SILENT

    rewrite_config(own, eos_token_id=1)
    for _ in range(2):
        out = onnx_export.export(folder, tmp_path / "out", quant="fp32")
        with pytest.raises(GateError, match=r"renamed to out\.rejected"):
            prove(own, [out], [], SILENT)
        assert not out.exists()
        assert (tmp_path / "out.rejected" / "model.onnx").is_file()


@pytest.mark.parametrize("damage", [{}, {"model": []}, {"model": {"decoder": {}}}])
def test_genai_config_that_says_too_little(folder: Path, tmp_path: Path, damage: Any) -> None:
    out = onnx_export.export(folder, tmp_path / "out", quant="fp32")
    (out / "genai_config.json").write_text(json.dumps(damage), encoding="utf-8")
    for kind in (OnnxGenaiRuntime, OnnxRuntime):
        with pytest.raises(ModelError, match=r"genai_config\.json has no model\."):
            kind(out)


@pytest.mark.parametrize("given", [None, 5, "", [None], [""], [b"x"]])
def test_what_is_no_path_is_refused(folder: Path, given: Any) -> None:
    with pytest.raises(UserError, match="a path must be text or a Path"):
        cusprun.verify(folder, given)


@pytest.mark.parametrize("given", [None, 5, "", b"x"])
def test_a_model_or_output_that_is_no_path_is_refused(folder: Path, tmp_path: Path, given: Any) -> None:
    with pytest.raises(UserError, match="a path must be text or a Path"):
        cusprun.export(given, tmp_path / "m.gguf")
    with pytest.raises(UserError, match="a path must be text or a Path"):
        cusprun.export(folder, given)


@pytest.mark.parametrize("given", [5, "threads=1", [("threads", 1)]])
def test_options_that_are_no_mapping_are_refused(folder: Path, tmp_path: Path, given: Any) -> None:
    with pytest.raises(ExportError, match="options must be a mapping of names to values"):
        cusprun.export(folder, tmp_path / "m.gguf", options=given)


def test_verify_says_what_is_wrong_with_the_folder(folder: Path, tmp_path: Path) -> None:
    out = gguf_export.export(folder, tmp_path / "m.gguf", quant="f16")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty has no config\.json"):
        cusprun.verify(tmp_path / "empty", out)


@pytest.mark.parametrize("given", [[], ()])
def test_nothing_to_verify_is_refused(folder: Path, given: Any) -> None:
    with pytest.raises(UserError, match="name at least one"):
        cusprun.verify(folder, given)


def test_leftovers_of_a_killed_quantisation_are_removed(tmp_path: Path) -> None:
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    left = [tmp_path / f".m.gguf.partial-{dead}", tmp_path / f".m.gguf.partial-{dead}-bf16"]
    other = [tmp_path / f".n.gguf.partial-{dead}-bf16", tmp_path / f".m.gguf.partial-{os.getpid()}-f32"]
    for path in (*left, *other):
        path.touch()
    fresh_output(tmp_path / "m.gguf")
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in other)
