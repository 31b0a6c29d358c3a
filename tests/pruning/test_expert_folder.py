"""The contract every family keeps: the folder that pruning writes computes what it should, in stock code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, build_model, documents, save_model
from transformers import AutoModelForCausalLM

from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.codec import load_json
from cusprun.errors import OutputError
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.planner import make_plan
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.records import Corpora, Expert, Manifest, Plan, Source

CORPORA = Corpora(documents(8, 0, "domain") + documents(6, 1, "task"), documents(3, 2))
RATIOS = {"ffn and heads": 0.5, "little": 0.1}


def make_expert(
    root: Path, family: str, ratio: float, *, refit: bool, **options: object
) -> tuple[Path, Plan]:
    folder = root / "model" if (root / "model").exists() else save_model(root / "model", family)
    index = open_checkpoint(folder)
    digest = model_hash(index)
    if not (root / "store").exists():
        score_model(index, CORPORA, root / "store", model_hash=digest, corpus_hash="c")
    plan = make_plan(index, open_store(root / "store"), model_hash=digest, ratio=ratio, targets=("gguf:f16",))
    source = Source(path=str(root / "private" / "maths.jsonl"))
    provenance = Provenance("tiny", digest, "c", Expert("test expert", {"domain": (source,)}), {})
    write_expert(index, plan, root / "expert", corpora=CORPORA, provenance=provenance, refit=refit, **options)  # type: ignore[arg-type]
    return root / "expert", plan


def load_strictly(folder: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: torch.nn.Module
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    assert not any(info.values()), info
    return model.eval()


def logits_of(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([d.token_ids])).logits[0] for d in CORPORA.held_out]


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilyContract:
    @pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS.keys())
    def test_without_refit_the_expert_equals_the_original_with_units_silenced(
        self, family: str, ratio: float, tmp_path: Path
    ) -> None:
        folder, plan = make_expert(tmp_path, family, ratio, refit=False, measure=False)
        original = build_model(family)
        d = plan.before.head_dim
        for block, kept in zip(original.model.layers, plan.layers, strict=True):
            silent = torch.ones(plan.before.intermediate_size, dtype=torch.bool)
            silent[list(kept.ffn_channels)] = False
            block.mlp.down_proj.weight.data[:, silent] = 0
            for head in set(range(plan.before.num_attention_heads)) - set(kept.query_heads):
                block.self_attn.o_proj.weight.data[:, head * d : (head + 1) * d] = 0
        for ours, theirs in zip(logits_of(load_strictly(folder)), logits_of(original), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def test_refit_equals_an_independent_one_with_the_whole_model_in_memory(
        self, family: str, tmp_path: Path
    ) -> None:
        folder, plan = make_expert(tmp_path, family, 0.5, refit=True, measure=False)
        model = build_model(family)
        for number, kept in enumerate(plan.layers):
            block = model.model.layers[number]
            d = plan.before.head_dim
            columns = [head * d + c for head in kept.query_heads for c in range(d)]
            _solve_in_place(model, block.self_attn.o_proj, columns)
            _solve_in_place(model, block.mlp.down_proj, list(kept.ffn_channels))
        for ours, theirs in zip(logits_of(load_strictly(folder)), logits_of(model), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

    def test_sharded_weights_are_the_same_weights(self, family: str, tmp_path: Path) -> None:
        folder, _ = make_expert(tmp_path, family, 0.5, refit=True, measure=False)
        whole = open_checkpoint(folder)
        (tmp_path / "expert").rename(tmp_path / "whole")
        sharded, _ = make_expert(tmp_path, family, 0.5, refit=True, measure=False, max_shard_bytes=20_000)
        assert len(list(sharded.glob("*.safetensors"))) > 1
        assert (sharded / "model.safetensors.index.json").is_file()
        whole = open_checkpoint(tmp_path / "whole")
        assert model_hash(open_checkpoint(sharded)) == model_hash(whole)
        load_strictly(sharded)


def _solve_in_place(model: torch.nn.Module, linear: torch.nn.Linear, keep: list[int]) -> None:
    """Refit one projection of a whole model by augmented least squares on what flows into it."""
    if len(keep) == linear.in_features:
        return
    rows: list[torch.Tensor] = []
    handle = linear.register_forward_hook(lambda _m, args, _o: rows.append(args[0][0].double()))
    with torch.no_grad():
        for document in CORPORA.calibration:
            model(torch.tensor([document.token_ids]))
    handle.remove()
    channels, weight = torch.cat(rows), linear.weight.data.double()
    survivors = channels[:, keep]
    ridge = 1e-3 * float((survivors**2).sum(0).mean())
    a = torch.cat([survivors, ridge**0.5 * torch.eye(len(keep), dtype=torch.float64)])
    b = torch.cat([channels @ weight.T, ridge**0.5 * weight[:, keep].T])
    linear.weight.data.zero_()
    linear.weight.data[:, keep] = torch.linalg.lstsq(a, b, driver="gelsd").solution.T.float()


def test_config_carried_files_manifest_and_card(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    odd = b'{"a":  1,\n\n "chat": "{{ x }}" }\r\n'
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes(odd)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    expert, plan = make_expert(tmp_path, "llama", 0.5, refit=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (expert / name).read_bytes() == odd
    config = json.loads((expert / "config.json").read_text())
    assert config["head_dim"] == 8
    assert config["intermediate_size"] == plan.after.intermediate_size
    manifest = load_json(Manifest, expert / "cusprun.json")
    assert manifest.plan == plan
    assert manifest.measurements["held_out"]["documents"] == 3
    assert {report.projection for report in manifest.refit} <= {"self_attn.o_proj", "mlp.down_proj"}
    for report in manifest.refit:
        assert report.relative_error_after <= report.relative_error_before
    for text in ((expert / "cusprun.json").read_text(), (expert / "README.md").read_text()):
        assert "private" not in text
        assert "maths.jsonl" in text


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    expert, _ = make_expert(tmp_path, "llama", 0.5, refit=False, measure=False)
    assert "lm_head.weight" not in open_checkpoint(expert).tensors
    model = load_strictly(expert)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()  # type: ignore[union-attr]


def test_an_existing_output_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="exists already"):
        make_expert(tmp_path, "llama", 0.5, refit=False)
    assert (tmp_path / "expert" / "mine.txt").read_text() == "keep"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cusprun.pruning.folder.model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        make_expert(tmp_path, "llama", 0.5, refit=False, measure=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "store"]
