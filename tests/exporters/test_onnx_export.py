"""The ONNX export: the same logits in onnxruntime and onnxruntime-genai as in transformers, or a reason."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import (
    QWEN2_PATTERN,
    SENTENCES,
    TinyConfig,
    documents,
    make_folder,
    split_then_bytes,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from cusprun.checkpoint.index import open_checkpoint
from cusprun.errors import ExportError, ModelError
from exporters.onnx import ALGORITHMS, Options, check, export, locate, quant_of
from exporters.onnx_build import BUILDERS
from exporters.parity import compare
from exporters.parity_records import limits_for
from exporters.parity_text import probe_texts
from serve.runtimes.onnx_genai import OnnxGenaiRuntime
from serve.runtimes.onnx_plain import OnnxRuntime
from serve.runtimes.torch_runtime import TorchRuntime

onnx = pytest.importorskip("onnx")
for name in ("onnx_ir", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(name)
torch.set_num_threads(1)

QWEN = {"pre": split_then_bytes(QWEN2_PATTERN), "nfc": True, "bos": False}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "attention_factor": 1.5,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
GEMMA = {
    "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
FAMILIES = {
    "llama": TinyConfig("llama"),
    "llama tied, biases": TinyConfig(
        "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "llama llama3 rope": TinyConfig("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": TinyConfig("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama yarn rope": TinyConfig("llama", {"rope_parameters": YARN_ROPE}),
    "llama padded vocabulary": TinyConfig("llama", padded_vocab=24),
    "llama as wide as its vocabulary": TinyConfig("llama", {"intermediate_size": 387}),
    "mistral odd heads": TinyConfig(
        "mistral",
        {"sliding_window": None, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
    ),
    "mistral sliding": TinyConfig("mistral", {"sliding_window": 8}),
    "qwen2 one group": TinyConfig("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}, QWEN),
    "qwen3 wide heads": TinyConfig("qwen3", {"head_dim": 32, "num_attention_heads": 6}, QWEN),
    "qwen3 sliding, biases": TinyConfig(
        "qwen3",
        {
            "head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
            "attention_bias": True,
        },
        QWEN,
    ),
    "phi3": TinyConfig("phi3", {"pad_token_id": 0}),
    "phi3 partial rotary, sliding": TinyConfig(
        "phi3",
        {
            "pad_token_id": 0, "head_dim": 32, "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "gemma3": TinyConfig("gemma3_text", {**GEMMA, "hidden_size": 72}),
    "gemma3 linear rope": TinyConfig(
        "gemma3_text",
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}  # fmt: skip
"""Every family, in the shapes that pruning leaves; the hidden size 72 has no whole root."""


def files_of(folder: Path) -> Mapping[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def logits_of(folder: Path, token_ids: list[int]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama") / "tiny", FAMILIES["llama tied, biases"])


@pytest.fixture(scope="module")
def llama_fp32(llama: Path) -> Path:
    return export(llama, llama.parent / "fp32", quant="fp32")


def test_every_family_that_can_be_written_is_tested() -> None:
    assert {tiny.model_type for tiny in FAMILIES.values()} == BUILDERS.keys()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: re.sub(r"\W+", "-", family))
def test_fp32_is_the_checkpoint_in_both_runtimes(family: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", FAMILIES[family])
    before = files_of(folder)
    out = export(folder, tmp_path / "m-onnx", quant="fp32")
    assert files_of(folder) == before
    ids = documents(TorchRuntime(folder).vocab_size, count=1, length=200)[0]
    wanted = logits_of(folder, ids)
    assert np.abs(wanted).max() > 1
    reference = TorchRuntime(folder)
    for candidate in (OnnxGenaiRuntime(out, n_threads=1), OnnxRuntime(out, n_threads=1)):
        assert np.abs(candidate.logits(ids) - wanted).max() <= 1e-3
        report = compare(reference, candidate, probe_texts(), [ids[:100]], limits_for("onnx", "fp32"))
        candidate.close()
        assert report.failures == ()
        assert report.logits.greedy_agreement == 1.0
        assert report.text.mismatch_count == 0
    assert locate(folder, out, "fp32") is None
    onnx.checker.check_model(str(out / "model.onnx"))


@pytest.mark.parametrize("quant", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama tied, biases", "mistral sliding", "phi3", "qwen3 sliding, biases"])
def test_smaller_precisions_keep_their_limits(family: str, quant: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", FAMILIES[family])
    out = export(folder, tmp_path / "out", quant=quant)
    reference, candidate = TorchRuntime(folder), OnnxGenaiRuntime(out, n_threads=1)
    limits = limits_for("onnx", quant)
    report = compare(reference, candidate, SENTENCES, documents(reference.vocab_size, 6), limits)
    assert report.failures == ()
    assert quant_of(out) == quant
    assert locate(folder, out, quant) is None


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_gemma_keeps_the_limits_of_integers(quant: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", FAMILIES["gemma3"])
    out = export(folder, tmp_path / "out", quant=quant)
    reference, candidate = TorchRuntime(folder), OnnxGenaiRuntime(out, n_threads=1)
    report = compare(
        reference, candidate, SENTENCES, documents(reference.vocab_size, 6), limits_for("onnx", quant)
    )
    assert report.failures == ()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("quant", "block_size", "bound"), [("int4", 32, 0.2), ("int8", 64, 0.01)])
def test_every_algorithm_stores_weights_within_its_rounding(
    llama: Path, tmp_path: Path, algorithm: str, quant: str, block_size: int, bound: float
) -> None:
    """Each matrix is read back through the runtime: identity in, matrix out, in a graph of that node alone.

    The FFN has 96 channels: an odd number of blocks, on which k_quant's own packing fails.
    """
    out = export(
        llama, tmp_path / "out", quant=quant, options=Options(algorithm=algorithm, block_size=block_size)
    )
    weights = load_file(llama / "model.safetensors")
    for node_name, tensor in (
        ("/model/layers.1/mlp/down_proj/MatMul", "model.layers.1.mlp.down_proj.weight"),
        ("/model/layers.0/attn/o_proj/MatMul", "model.layers.0.self_attn.o_proj.weight"),
        ("/lm_head/MatMul", "model.embed_tokens.weight"),
    ):
        wanted = weights[tensor].numpy()
        found = matrix_in_runtime(out, node_name, wanted.shape[1]).T
        assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted)


def matrix_in_runtime(artifact: Path, node_name: str, width: int) -> Any:
    """Return what a quantised product gives for the identity, computed by onnxruntime in float32."""
    import onnxruntime

    model = onnx.load(artifact / "model.onnx")
    (node,) = [node for node in model.graph.node if node.name.startswith(node_name)]
    for attribute in node.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 1
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info(node.input[0], kind, [width, width])],
        [onnx.helper.make_tensor_value_info(node.output[0], kind, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in node.input],
    )
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {node.input[0]: np.eye(width, dtype=np.float32)})[0]


def test_a_tied_int8_embedding_is_stored_once(llama: Path, tmp_path: Path) -> None:
    out = export(llama, tmp_path / "out", quant="int8")
    shape = open_checkpoint(llama).shape
    largest = max(
        np.prod(tensor.dims)
        for tensor in onnx.load(out / "model.onnx").graph.initializer
        if tensor.data_type == 1
    )
    assert largest < shape.vocab_size * shape.hidden_size


def test_weights_of_bfloat16_norms_are_added_to_in_float32(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", FAMILIES["gemma3"])
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    out = export(folder, tmp_path / "out", quant="fp32")
    ids = documents(300, count=1)[0]
    assert np.abs(OnnxRuntime(out, n_threads=1).logits(ids) - logits_of(folder, ids)).max() <= 1e-3


@pytest.mark.parametrize(
    ("quant", "tensor", "name"),
    [
        ("fp32", "model.layers.1.mlp.up_proj.MatMul.weight", "model.layers.1.up_proj.weight"),
        ("fp32", "model.layers.0.attn.qkv_proj.Add.bias", "model.layers.0.attn.qkv_proj.Add.bias"),
        ("fp32", "model.layers.2.final_norm_layernorm.weight", "model.layers.2.final_norm_layernorm.weight"),
        ("int8", "model.layers.0.mlp.down_proj.MatMul.weight_Q8", "model.layers.0.down_proj.weight"),
        ("int4", "lm_head.MatMul.weight_Q8G32", "lm_head.weight"),
    ],
)
def test_a_broken_tensor_fails_the_gate_and_is_named(
    llama: Path, tmp_path: Path, quant: str, tensor: str, name: str
) -> None:
    """The halves of one tensor change places."""
    out = export(llama, tmp_path / "out", quant=quant)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    (broken,) = [entry for entry in graph.initializer if entry.name == tensor]
    where = {entry.key: entry.value for entry in broken.external_data}
    offset, length = int(where["offset"]), int(where["length"])
    with (out / "model.onnx.data").open("r+b") as stream:
        stream.seek(offset)
        content = stream.read(length)
        stream.seek(offset)
        stream.write(content[length // 2 :] + content[: length // 2])
    reference, candidate = TorchRuntime(llama), OnnxGenaiRuntime(out, n_threads=1)
    report = compare(
        reference, candidate, SENTENCES, documents(reference.vocab_size, 6), limits_for("onnx", quant)
    )
    assert report.verdict == "fail"
    found = locate(llama, out, quant)
    assert found is not None
    assert re.search(rf"{name}\b.* is off by", found)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_blocks_of_zeros_stay_zeros(llama: Path, tmp_path: Path, algorithm: str) -> None:
    """Neurons that pruning has zeroed leave whole blocks without a range."""
    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][:, 32:64] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    out = export(folder, tmp_path / "out", quant="int4", options=Options(algorithm=algorithm))
    found = matrix_in_runtime(out, "/model/layers.0/mlp/down_proj/MatMul", 96)
    assert np.array_equal(found[32:64], np.zeros((32, 64), dtype=np.float32))


def test_genai_config_is_that_of_the_folder(llama: Path, llama_fp32: Path, tmp_path: Path) -> None:
    config = json.loads((llama_fp32 / "genai_config.json").read_text(encoding="utf-8"))
    stock, tokenizer = (
        AutoModelForCausalLM.from_pretrained(llama).config,
        AutoTokenizer.from_pretrained(llama),
    )
    assert (
        config["model"]["context_length"] == config["search"]["max_length"] == stock.max_position_embeddings
    )
    assert config["model"]["decoder"]["num_key_value_heads"] == stock.num_key_value_heads
    assert config["model"]["bos_token_id"] == tokenizer.bos_token_id
    changed = tmp_path / "changed"
    shutil.copytree(llama, changed)
    (changed / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}), encoding="utf-8")
    out = export(changed, tmp_path / "out", quant="fp32")
    config = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["eos_token_id"] == [tokenizer.eos_token_id, 0, 2]
    assert OnnxGenaiRuntime(out).special_ids == TorchRuntime(changed).special_ids


def test_licence_manifest_and_record_go_along(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(llama, folder)
    (folder / "LICENSE").write_text("free", encoding="utf-8")
    (folder / "cusprun.json").write_text("{}", encoding="utf-8")
    out = export(folder, tmp_path / "out", quant="int4", options=Options(algorithm="rtn", context_length=64))
    assert (out / "LICENSE").read_text(encoding="utf-8") == "free"
    assert (out / "cusprun.json").is_file()
    record = json.loads((out / "cusprun-export.json").read_text(encoding="utf-8"))
    assert record["quant"] == "int4"
    assert record["options"]["algorithm"] == "rtn"
    assert {path.name for path in tmp_path.iterdir()} == {"m", "out"}


def test_context_length_is_that_of_the_tables(llama: Path, tmp_path: Path) -> None:
    out = export(llama, tmp_path / "out", quant="fp32", options=Options(context_length=64))
    tables = [t for t in onnx.load(out / "model.onnx").graph.initializer if t.name == "cos_cache"]
    assert [next(iter(table.dims)) for table in tables] == [64]
    assert any(
        "64 tokens" in note for note in check(open_checkpoint(llama), "fp32", Options(context_length=64))
    )
    runtime = OnnxGenaiRuntime(out)
    ids = documents(300, count=1, length=65)[0]
    assert np.abs(runtime.logits(ids[:64]) - logits_of(llama, ids[:64])).max() <= 1e-3
    with pytest.raises(ModelError, match="takes 64 tokens"):
        runtime.logits(ids)


def test_the_builder_is_silent(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    export(llama, tmp_path / "out", quant="int4")
    assert capfd.readouterr() == ("", "")


def test_a_graph_for_another_provider_is_written_and_not_tried(llama: Path, tmp_path: Path) -> None:
    options = Options(execution_provider="cuda")
    assert any("cuda" in note for note in check(open_checkpoint(llama), "fp16", options))
    out = export(llama, tmp_path / "out", quant="fp16", options=options)
    config = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    providers = config["model"]["decoder"]["session_options"]["provider_options"]
    assert [list(entry) for entry in providers] == [["cuda"]]


def test_precision_of_other_folders(llama: Path, llama_fp32: Path, tmp_path: Path) -> None:
    assert quant_of(llama_fp32) == "fp32"
    assert quant_of(llama) is None
    assert quant_of(llama / "config.json") is None
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ExportError, match="it was not made by cusprun"):
        quant_of(tmp_path)
    (tmp_path / "cusprun-export.json").write_text('{"quant": "int3"}', encoding="utf-8")
    with pytest.raises(ExportError, match="did you mean 'int"):
        quant_of(tmp_path)


def test_the_loop_of_the_page_gives_the_text_of_the_checkpoint(llama: Path, llama_fp32: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    (loop,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "InferenceSession" in code]
    names: dict[str, Any] = {}
    exec(compile(loop, "docs/onnx.md", "exec"), names)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    prompt = tokenizer(SENTENCES[0], return_tensors="pt")["input_ids"]
    wanted = model.generate(
        prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
    )[0, prompt.shape[1] :]
    found = names["generate"](str(llama_fp32), SENTENCES[0], 20)
    assert found == tokenizer.decode(wanted, skip_special_tokens=True)
    assert found
