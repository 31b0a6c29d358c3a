"""What a deployment reads of an artifact: cards, sampling, BOS, and which files are part of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from deployable import make_gguf, manifest_of, tree

from cusprun.errors import ModelError
from cusprun.pipeline.deploy import deploy
from cusprun.pipeline.deploy_facts import gather
from cusprun.pipeline.deploy_sizing import Request
from deploy import bundle
from deploy.targets import TARGETS


@pytest.fixture(autouse=True)
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "fetch", lambda *_: [])


@pytest.mark.parametrize("target", TARGETS)
def test_a_card_of_several_lines_breaks_no_file(target: str, tmp_path: Path) -> None:
    keys = {
        "general.base_model.0.name": "a\nb",
        "general.base_model.0.organization": "c\u2028d\x00",
        "cusprun.model_hash": "0",
        "general.finetune": "maths\n\nand more\u200b",
    }
    artifact = make_gguf(tmp_path / "model.gguf", license_="my\n  licence\n", keys=keys)
    options = {"image": "registry.example/expert:1"} if target == "kubernetes" else {}
    facts = manifest_of(deploy(artifact, target, tmp_path / "out", options=options))
    assert (facts["license"], facts["source"], facts["expert"]) == ("my licence", "c d/a b", "maths and more")


@pytest.mark.parametrize(
    ("adds_bos", "pre", "expected"),
    [(True, "gpt-2", True), (False, "llama-bpe", False), (None, "gpt-2", False), (None, "llama-bpe", True)],
)
def test_bos_is_added_where_llama_cpp_adds_it(
    adds_bos: bool | None, pre: str, expected: bool, tmp_path: Path
) -> None:
    artifact = make_gguf(tmp_path / "model.gguf", keys={"tokenizer.ggml.pre": pre}, adds_bos=adds_bos)
    assert gather(artifact, "gguf", Request()).adds_bos is expected


def test_sampling_is_what_the_file_states(tmp_path: Path) -> None:
    keys = {"general.sampling.temp": 0.6, "general.sampling.top_k": 2e6, "general.sampling.top_p": math.nan}
    out = deploy(make_gguf(tmp_path / "model.gguf", keys=keys), "ollama", tmp_path / "out")
    lines = (out / "Modelfile").read_text().splitlines()
    stated = [line for line in lines if line.startswith(("PARAMETER t", "PARAMETER m"))]
    assert stated == ["PARAMETER temperature 0.6", "PARAMETER top_k 2000000"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for vLLM, as far as headers tell."""
    import numpy as np
    from safetensors.numpy import save_file

    config = {
        "model_type": "llama", "dtype": "float32", "hidden_size": 4, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config))
    (made / "tokenizer.json").write_text("{}")
    save_file({"model.embed_tokens.weight": np.zeros((2, 4), np.float32)}, made / "model.safetensors")
    return made


def test_hidden_files_are_no_part_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("password")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").touch()
    out = deploy(folder, "systemd", tmp_path / "out")
    listed = {name for name in tree(out) if name.startswith("model/")}
    names = ("config.json", "model.safetensors", "sub/notes.txt", "tokenizer.json")
    assert listed == {f"model/model/{name}" for name in names}


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        deploy(folder, "systemd", tmp_path / "out")


@pytest.mark.parametrize(
    "card", ["---\nlicense: " + "[" * 400, "---\nlicense: [a]\n---\n", "---", "---\n- a\n---"]
)
def test_a_card_that_says_nothing_is_no_reason_to_refuse(card: str, folder: Path) -> None:
    (folder / "README.md").write_text(card)
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": [], "content": "x"}, 7]}')
    assert gather(folder, "vllm", Request()).license is None


@pytest.mark.parametrize(("ours", "expert"), [(True, "maths"), (False, None)])
def test_an_expert_is_what_was_made_here(ours: bool, expert: str | None, tmp_path: Path) -> None:
    """A fine-tune of others has a name too, and is no expert."""
    keys = {"general.finetune": "maths", **({"cusprun.model_hash": "0"} if ours else {})}
    artifact = make_gguf(tmp_path / "model.gguf", keys=keys)
    assert gather(artifact, "gguf", Request()).expert == expert
