"""A recipe whose exports cannot be made is refused before anything is scored or pruned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")
pytest.importorskip("compressed_tensors")

RECIPE = """\
model: model
expert: expert.yaml
out: out
ratio: 0.25
verify: false
eval: false
exports: [{exports}]
"""


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        ("{to: gguf, options: {threads: 0}}", "threads must be 1 or more"),
        ("{to: gguf, quant: q4_0, options: {tensor_types: [ffn_down]}}", "must be PATTERN=TYPE"),
        ("{to: onnx, options: {block_size: 33}}", "block_size must be one of"),
        ("{to: onnx, options: {algorithm: k_qant}}", "did you mean 'k_quant'"),
        ("{to: vllm, quant: int4, options: {group_size: 48}}", "group_size must be one of"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(work, cusprun, exports, message) -> None:
    Path("recipe.yaml").write_text(RECIPE.format(exports=exports), encoding="utf-8")
    outcome = cusprun("run", "recipe.yaml")
    assert outcome.code == 2, outcome
    assert message in outcome.err
    assert not Path("out/expert").exists()
    assert "scoring" not in outcome.err


def test_a_model_that_a_format_cannot_hold_is_refused_before_any_work(work, cusprun) -> None:
    path = Path("model/config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    path.write_text(json.dumps({**config, "rope_parameters": rope}), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE.format(exports="{to: gguf}"), encoding="utf-8")
    outcome = cusprun("run", "recipe.yaml")
    assert outcome.code == 2, outcome
    assert "dynamic" in outcome.err
    assert not Path("out/expert").exists()
    assert "scoring" not in outcome.err
