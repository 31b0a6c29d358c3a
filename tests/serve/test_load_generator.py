"""vLLM's load generator, from outside, against every engine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from endpoint import ROOT, Endpoint
from parrot import Parrot

pytestmark = pytest.mark.vllm


def test_load_generator_of_vllm(endpoint: Endpoint, parrot: Parrot, tmp_path: Path) -> None:
    from serve.runtimes.vllm_process import find_python

    command = [
        str(find_python()), str(ROOT / "benchmarks" / "serve_load.py"), "--backend", "openai",
        "--base-url", endpoint.url.removesuffix("/v1"), "--endpoint", "/v1/completions",
        "--model", "parrot", "--tokenizer", str(parrot.folder), "--dataset-name", "random",
        "--random-input-len", "12", "--random-output-len", "8", "--num-prompts", "12",
        "--max-concurrency", "4", "--temperature", "0", "--disable-tqdm",
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json",
    ]  # fmt: skip
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (result["completed"], result["failed"]) == (12, 0)
    assert result["total_output_tokens"] > 0
