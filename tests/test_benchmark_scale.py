"""The parts of the benchmark of scale, against what stock code and the kernel say, and a smoke run of it."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cusprun.checkpoint.index import open_checkpoint
from cusprun.corpus import build_corpora, load_expert

ROOT = Path(__file__).parent.parent
HELD_BYTES = 64 << 20
FILE_BYTES = 8 << 20


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import modules of the benchmarks, which are scripts in one folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_a_random_model_is_one_for_stock_transformers(module: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    scale_model = module("scale_model")
    for name, layers in (("tiny", 2), ("qwen2.5-1.5b", 1)):
        small = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 2048}
        config = {**scale_model.MODELS[name], **small, "num_key_value_heads": 2, "num_hidden_layers": layers}
        folder = scale_model.random_model(tmp_path / name, config)
        model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        matrices = [p.detach().float() for _, p in model.named_parameters() if p.dim() == 2]
        norms = [p for n, p in model.named_parameters() if "norm" in n]
        for matrix in matrices:
            assert float(matrix.std()) == pytest.approx(config["initializer_range"], rel=0.05)
            assert abs(float(matrix.mean())) < 0.05 * config["initializer_range"]
        assert all(bool((norm == 1).all()) for norm in norms)
        # No two matrices of one shape are the same draw.
        firsts = [(m.shape, float(m[0, 0]), float(m[0, 1])) for m in matrices]
        assert len(set(firsts)) == len(firsts)
        assert torch.isfinite(model(torch.tensor([[0, 5, 7]])).logits).all()


def test_an_expert_has_the_documents_that_were_asked_for(module: Any, tmp_path: Path) -> None:
    scale_model = module("scale_model")
    folder = scale_model.random_model(tmp_path / "model", scale_model.cut_to(scale_model.TINY, 1))
    expert = load_expert(scale_model.expert_file(tmp_path, documents=8, max_tokens=128))
    corpora = build_corpora(expert, folder)
    assert [len(document.token_ids) for document in corpora.calibration] == [128] * 8
    assert len(corpora.held_out) == 1
    # Each begins with the token that no anchors are needed beside.
    bos = open_checkpoint(folder).config["bos_token_id"]
    assert {document.token_ids[0] for document in corpora.calibration} == {bos}


def test_what_plans_count_is_what_a_model_has(module: Any, tmp_path: Path) -> None:
    scale_model, scale_plans = module("scale_model"), module("scale_plans")
    for number, tied in enumerate((True, False)):
        config = {**scale_model.cut_to(scale_model.TINY, 3), "tie_word_embeddings": tied}
        found = open_checkpoint(scale_model.random_model(tmp_path / str(number), config))
        work = scale_plans.Work(scale_model.index_of(config), documents=2, length=16)
        assert work.index.num_bytes == found.num_bytes
        assert {n: i.shape for n, i in work.index.tensors.items()} == {
            n: i.shape for n, i in found.tensors.items()
        }
        layer = [i for n, i in found.tensors.items() if ".layers.1." in n and len(i.shape) == 2]
        assert work.block_parameters == sum(math.prod(info.shape) for info in layer)


def test_a_command_is_watched(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = module("watched")
    folder, gate = tmp_path / "files", tmp_path / "gate"
    folder.mkdir()
    os.mkfifo(gate)
    code = (
        "import os, tempfile\n"
        f"os.chdir({str(folder)!r})\n"
        f"held = bytearray({HELD_BYTES}); held[::4096] = b'x' * len(held[::4096])\n"
        f"kept = open('kept', 'wb'); kept.write(b'x' * {FILE_BYTES}); kept.flush()\n"
        f"gone = tempfile.TemporaryFile(dir='.'); gone.write(b'x' * {2 * FILE_BYTES}); gone.flush()\n"
        f"print(open({str(gate)!r}).read(), flush=True)\n"
    )
    files = 3 * FILE_BYTES
    look, looks = watched._disk_bytes, []

    def look_and_let_go(*arguments: Any) -> int:
        seen: int = look(*arguments)
        looks.append(seen >= files)
        if (
            looks[-1] and sum(looks) == 2
        ):  # and once before, so that memory was looked at too while all was held
            gate.write_text("seen")
        return seen

    monkeypatch.setattr(watched, "_DISK_EVERY_S", 0.0)
    monkeypatch.setattr(watched, "_disk_bytes", look_and_let_go)
    found = watched.watched([sys.executable, "-c", code], tmp_path / "log", folders=(folder,))
    assert HELD_BYTES < found.anonymous_bytes < 2 * HELD_BYTES
    assert found.anonymous_bytes < found.resident_bytes <= found.max_resident_bytes
    assert files <= found.disk_bytes < 1.1 * files
    assert found.output == "seen\n"


def test_a_command_that_fails_is_reported(module: Any, tmp_path: Path) -> None:
    watched = module("watched")
    with pytest.raises(watched.CommandError, match="ended with 3:\nno room"):
        watched.watched([sys.executable, "-c", "print('no room'); raise SystemExit(3)"], tmp_path / "log")


def test_a_command_is_not_asked_for_equal_bytes(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    show = [sys.executable, "-c", "import os; print(os.environ.get('SOURCE_DATE_EPOCH'), os.environ['OWN'])"]
    assert module("watched").watched(show, tmp_path / "log", env={"OWN": "yes"}).output == "None yes\n"


def test_the_exponent_of_a_power_law_is_found(module: Any) -> None:
    sizes = (1, 2, 4, 8, 16)
    found = module("scale_parts").exponent(sizes, [3 * size**1.3 for size in sizes])
    assert found == pytest.approx(1.3)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    asked = {"walk": 1, "linear": 3, "kills": 1, "dtype": 1, "memory/score": 1}
    command = [sys.executable, "benchmarks/scale.py", "--smoke", "--scratch", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", ",".join(asked)],
        cwd=ROOT,
        env={**os.environ, "CUSPRUN_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tables = json.loads((tmp_path / "scale.json").read_text("utf-8"))["tables"]
    assert {name: len(table["rows"]) for name, table in tables.items()} == {
        name.partition("/")[0]: count for name, count in asked.items()
    }
    kills = next(iter(tables["kills"]["rows"].values()))
    assert kills["identical"] == kills["killed"] > 0
    markdown = (tmp_path / "scale.md").read_text("utf-8")
    assert all(f"**{title}" in markdown for title in ("Memory", "The walk", "Products", "Growth", "Kills"))
