"""The commands one after the other on tiny models, through files, as a user would chain them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cusprun as api
from cusprun.cli.options import parse_size, split_list
from cusprun.codec import load_json
from cusprun.corpus import build_corpora, load_expert
from cusprun.errors import UserError
from cusprun.pipeline.results import RunReport
from cusprun.quality.report import EvalReport
from cusprun.records import Manifest, NeuronManifest, Plan
from serve.bench.records import BenchReport

llama_cpp = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed"
)
EXPERT = ("--expert", "expert.yaml")


def perplexity(folder: Path, documents: list[tuple[int, ...]]) -> float:
    """Perplexity by stock transformers alone, one document at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss = tokens = 0.0
    for ids in documents:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        tokens += len(ids) - 1
    return math.exp(loss / tokens)


def test_score_plan_edit_prune_through_files(work, cusprun) -> None:
    assert cusprun("score", "model", *EXPERT, "--out", "store").code == 0
    outcome = cusprun(
        "plan",
        "model",
        "--scores",
        "store",
        "--ratio",
        "0.3",
        "--for",
        "gguf:q8_0,onnx:int4",
        "--out",
        "p.json",
    )
    assert outcome.code == 0, outcome
    assert "of all parameters" in outcome.out
    assert "rejected" in outcome.out
    plan = load_json(Plan, Path("p.json"))
    assert plan.targets == ("gguf:q8_0", "onnx:int4")
    assert plan.after.intermediate_size % 32 == 0
    assert plan.block_ratio >= 0.3
    # Edited by hand: other FFN channels, fewer of them.
    edited = json.loads(Path("p.json").read_text())
    for layer in edited["layers"]:
        layer["ffn_channels"] = "0-9 20-41"
    Path("p.json").write_text(json.dumps(edited))
    outcome = cusprun("prune", "model", *EXPERT, "--plan", "p.json", "--out", "expert")
    assert outcome.code == 0, outcome
    manifest = load_json(Manifest, Path("expert/cusprun.json"))
    assert manifest.plan.after.intermediate_size == 32
    assert manifest.source == "model"
    assert str(work) not in Path("expert/cusprun.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoModelForCausalLM.from_pretrained("expert")
    assert sum(p.numel() for p in loaded.parameters()) == manifest.parameters_after


def test_prune_scores_once_and_finds_the_scores_again(work, cusprun) -> None:
    first = cusprun("prune", "model", *EXPERT, "--for", "gguf:f16", "--out", "a")
    second = cusprun("prune", "model", *EXPERT, "--for", "gguf:f16", "--rule", "paper", "--out", "b")
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "not scoring again" not in first.err
    assert "not scoring again" in second.err
    # Other documents are other scores.
    with Path("task.jsonl").open("a") as stream:
        stream.write('{"text": "one more text that no other is like"}\n')
    third = cusprun("prune", "model", *EXPERT, "--for", "gguf:f16", "--out", "c")
    assert third.code == 0
    assert "not scoring again" not in third.err


@pytest.mark.parametrize("refit", ["--refit", "--no-refit"])
def test_blocks_and_biases_through_the_command(work, cusprun, refit) -> None:
    outcome = cusprun(
        "prune", "model", *EXPERT, "--units", "block,ffn_channel", "--ratio", "0.6", "--for", "gguf:f16",
        "--rule", "variance+bias", refit, "--out", "a",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert "decoder blocks" in outcome.out
    manifest = load_json(Manifest, Path("a/cusprun.json"))
    assert manifest.plan.after.num_hidden_layers == 1
    assert manifest.rule == "variance+bias"
    assert json.loads(Path("a/config.json").read_text())["mlp_bias"] is (refit == "--refit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoModelForCausalLM.from_pretrained("a")
    assert sum(p.numel() for p in loaded.parameters()) == manifest.parameters_after


def test_budgets_in_parameters_and_bytes(work, cusprun) -> None:
    model = AutoModelForCausalLM.from_pretrained("model")
    wanted = round(0.8 * sum(p.numel() for p in model.parameters()))
    outcome = cusprun(
        "prune", "model", *EXPERT, "--target-params", f"{wanted / 1000}k", "--for", "gguf:f16", "--out", "a"
    )
    assert outcome.code == 0, outcome
    assert load_json(Manifest, Path("a/cusprun.json")).parameters_after <= wanted
    assert cusprun("export", "model", "--quant", "q8_0", "--no-verify", "--out", "whole.gguf").code == 0
    wanted = round(0.85 * Path("whole.gguf").stat().st_size)
    outcome = cusprun(
        "prune", "model", *EXPERT, "--target-bytes", str(wanted), "--for", "gguf:q8_0,onnx:int4", "--out", "b"
    )
    assert outcome.code == 0, outcome
    assert cusprun("export", "b", "--quant", "q8_0", "--no-verify", "--out", "b.gguf").code == 0
    assert 0.7 * wanted < Path("b.gguf").stat().st_size <= wanted
    (store,) = (work / "cache" / "scores").iterdir()
    outcome = cusprun(
        "plan", "model", "--scores", store, "--target-bytes", str(wanted), "--for", "gguf:q8_0",
        "--units", "block,ffn_channel",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert f"at most {wanted:,} bytes as gguf:q8_0" in outcome.out


def test_the_largest_cut_within_a_loss(work, cusprun) -> None:
    outcome = cusprun("prune", "model", *EXPERT, "--max-loss", "30%", "--for", "gguf:q8_0", "--out", "new/a")
    assert outcome.code == 0, outcome
    manifest = load_json(Manifest, Path("new/a/cusprun.json"))
    search = manifest.measurements["max_loss"]
    assert search["limit"] == pytest.approx(0.3)
    assert 1 <= len(search["steps"]) <= 7
    fitting = [step["block_ratio"] for step in search["steps"] if step["loss"] <= 0.3]
    above = [step["block_ratio"] for step in search["steps"] if step["loss"] > 0.3]
    assert manifest.plan.block_ratio == manifest.plan.ratio == max(fitting)
    assert min(above, default=1) > max(fitting)
    assert "30.00% above" in manifest.plan.budget
    corpora = build_corpora(load_expert(Path("expert.yaml")), Path("model"))
    documents = [document.token_ids for document in corpora.held_out]
    ratio = perplexity(Path("new/a"), documents) / perplexity(Path("model"), documents)
    assert ratio <= 1.3
    (chosen,) = (step for step in search["steps"] if step["block_ratio"] == max(fitting))
    assert ratio - 1 == pytest.approx(chosen["loss"], abs=1e-3)
    assert sorted(path.name for path in Path("new").iterdir()) == ["a"]
    assert outcome.err.count("not scoring again") == 0


def test_a_loss_that_even_the_smallest_cut_exceeds_is_refused_with_the_number(work, cusprun) -> None:
    arguments = ("--max-loss", "0.0001%", "--for", "gguf:q8_0", "--units", "block", "--no-refit")
    outcome = cusprun("prune", "model", *EXPERT, *arguments, "--out", "new/a")
    assert outcome.code == 2, outcome
    assert "even the smallest cut is too much (50.0% of block parameters removed" in outcome.err
    assert not Path("new").exists()


def test_single_neurons_through_the_command(work, cusprun) -> None:
    outcome = cusprun("prune", "model", *EXPERT, "--granularity", "neuron", "--ratio", "0.3", "--out", "a")
    assert outcome.code == 0, outcome
    assert "are zero" in outcome.out
    manifest = load_json(NeuronManifest, Path("a/cusprun.json"))
    assert (manifest.rule, manifest.ratio) == ("paper", 0.3)
    before, after = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("model", "a"))
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    down = after["model.layers.0.mlp.down_proj.weight"]
    assert int((down == 0).all(dim=0).sum()) == pytest.approx(0.3 * down.shape[1], abs=1)


def test_shards_and_no_refit(work, cusprun) -> None:
    outcome = cusprun(
        "prune", "model", *EXPERT, "--for", "gguf:f16", "--no-refit", "--shard-size", "50kB", "--out", "a"
    )
    assert outcome.code == 0, outcome
    assert Path("a/model.safetensors.index.json").is_file()
    assert load_json(Manifest, Path("a/cusprun.json")).refit == ()


def test_eval_agrees_with_stock_transformers(work, cusprun) -> None:
    assert cusprun("prune", "model", *EXPERT, "--for", "gguf:f16", "--out", "small").code == 0
    outcome = cusprun("eval", "model", "small", *EXPERT, "--json", "report.json")
    assert outcome.code == 0, outcome
    report = load_json(EvalReport, Path("report.json"))
    corpora = build_corpora(load_expert(Path("expert.yaml")), Path("model"))
    sets = {"held_out": corpora.held_out, "general": corpora.general}
    for folder, model in zip(("model", "small"), report.models, strict=True):
        assert model.model == folder
        for name, group in sets.items():
            row = model.corpora[name]
            assert row.documents == len(group)
            wanted = perplexity(Path(folder), [document.token_ids for document in group])
            assert row.perplexity.value == pytest.approx(wanted, rel=1e-4)
            assert row.perplexity.low <= row.perplexity.value <= row.perplexity.high
    first, second = (model.corpora["held_out"] for model in report.models)
    assert first.perplexity_ratio is None
    assert second.perplexity_ratio is not None
    ratio = second.perplexity.value / first.perplexity.value
    assert second.perplexity_ratio.value == pytest.approx(ratio, rel=1e-6)
    assert second.mean_kl_divergence is not None
    assert second.mean_kl_divergence.value > 0


def test_eval_of_a_model_against_itself_shows_no_difference(work) -> None:
    report = api.evaluate(["model", Path("model")], "expert.yaml")
    for row in report.models[1].corpora.values():
        assert row.perplexity_ratio is not None
        assert row.perplexity_ratio.value == pytest.approx(1, abs=1e-6)
        assert row.top1_agreement is not None
        assert row.top1_agreement.value == 1


def test_models_that_read_other_tokens_are_not_compared(work, cusprun, tmp_path) -> None:
    from tiny_exports import TinyConfig, make_folder

    make_folder(tmp_path / "other", TinyConfig("llama", tokenizer={"bos": False}))
    outcome = cusprun("eval", "model", "other", *EXPERT)
    assert outcome.code == 2
    assert "other tokens" in outcome.err


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@llama_cpp
def test_export_verify_inspect_bench(work, cusprun, tiny_models, family) -> None:
    model = tiny_models / family
    outcome = cusprun("export", model, "--quant", "f32", "--out", "a.gguf")
    assert outcome.code == 0, outcome
    assert json.loads(Path("a.gguf.parity.json").read_text())["verdict"] == "pass"
    outcome = cusprun("verify", model, "a.gguf", *EXPERT)
    assert outcome.code == 0, outcome
    assert "pass" in outcome.out
    folder, file = (json.loads(cusprun("inspect", path, "--json").out) for path in (model, "a.gguf"))
    assert folder["num_parameters"] == file["num_parameters"]
    assert "ffn" in cusprun("inspect", model).out
    outcome = cusprun(
        "bench", "--before", "a.gguf", "--after", model, "--pairs", "1", "--prompt-tokens", "8",
        "--context-depth", "4,8", "--decode-tokens", "4", "--quant", "f16", "--json", "bench.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    report = load_json(BenchReport, Path("bench.json"))
    (suite,) = report.suites
    assert suite.before.num_parameters == suite.after.num_parameters
    assert suite.before.file_bytes > suite.after.file_bytes
    assert suite.before.precision == "f32 before, f16 after"
    assert "Peak memory" in outcome.out


@llama_cpp
def test_another_models_artifact_fails_the_gate_and_stays(work, cusprun) -> None:
    assert (
        cusprun("prune", "model", *EXPERT, "--for", "gguf:f16", "--ratio", "0.5", "--out", "small").code == 0
    )
    assert cusprun("export", "model", "--out", "a.gguf").code == 0
    outcome = cusprun("verify", "small", "a.gguf")
    assert outcome.code == 3
    assert "does not compute the same" in outcome.err
    assert "made from" in outcome.err
    assert Path("a.gguf").exists()
    assert not Path("a.gguf.rejected").exists()
    assert json.loads(Path("a.gguf.parity.json").read_text())["verdict"] == "fail"


def test_a_gguf_is_imported_once_and_then_found(work, cusprun) -> None:
    assert cusprun("export", "model", "--quant", "f32", "--no-verify", "--out", "a.gguf").code == 0
    first = cusprun("prune", "a.gguf", *EXPERT, "--for", "gguf:f16", "--out", "x")
    second = cusprun("prune", "a.gguf", *EXPERT, "--for", "gguf:f16", "--out", "y")
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "imported before" in second.err
    assert len(list((work / "cache" / "imported").iterdir())) == 1
    assert load_json(Manifest, Path("x/cusprun.json")).source == "a.gguf"


RECIPE = """\
model: model
expert: expert.yaml
out: result
ratio: 0.3
targets: [gguf:q8_0]
exports: [{to: gguf, quant: f32}, {quant: q8_0}]
bench: {exports: [gguf:q8_0], num_pairs: 1, prompt_lengths: [8], context_depths: [8], num_decode_tokens: 4}
"""


@llama_cpp
def test_run_makes_everything_and_a_second_run_finds_everything(work, cusprun) -> None:
    Path("recipe.yaml").write_text(RECIPE)
    outcome = cusprun("run", "recipe.yaml")
    assert outcome.code == 0, outcome
    for label in (
        "Parameters", "File size (f32)", "File size (q8_0)", "Peak memory", "Time to first token",
        "Decode speed", "held-out", "general text",
    ):  # fmt: skip
        assert label in outcome.out
    report = load_json(RunReport, Path("result/results.json"))
    assert report.bench is not None
    assert report.quality is not None
    (suite,) = report.bench.suites
    assert suite.before.num_parameters is not None
    assert suite.after.num_parameters is not None
    assert suite.after.num_parameters < suite.before.num_parameters
    assert suite.before.precision == "q8_0"
    assert suite.roofline is not None
    assert {entry.verdict for entry in report.parity} == {"pass"}
    assert len(report.parity) == 4
    assert "| Parameters |" in Path("result/results.md").read_text()
    sizes = {file.file_name: file.file_bytes for file in report.artifacts}
    assert sizes == {name: (Path("result") / name).stat().st_size for name in sizes}

    written = {path: path.stat().st_mtime_ns for path in Path("result").rglob("*") if path.is_file()}
    again = cusprun("run", "recipe.yaml")
    assert again.code == 0, again
    assert again.err.count("finished before") == 7
    assert again.err.count("proven before") == 4
    assert load_json(RunReport, Path("result/results.json")).table == report.table
    fresh = {"results.json", "results.md"}
    assert all(path.stat().st_mtime_ns == then for path, then in written.items() if path.name not in fresh)

    Path("recipe.yaml").write_text(RECIPE.replace("ratio: 0.3", "ratio: 0.4"))
    other = cusprun("run", "recipe.yaml")
    assert other.code == 2
    assert "other inputs" in other.err
    assert Path("result/expert/cusprun.json").is_file()


def test_run_can_leave_parts_out(work, cusprun) -> None:
    Path("recipe.yaml").write_text(
        "model: model\nexpert: expert.yaml\nout: result\ntargets: [gguf:q8_0]\n"
        "target_bytes: 90kB\nunits: [block, ffn_channel]\nweights: {domain: 0.5}\n"
        "verify: false\nbench: false\neval: false\n"
    )
    outcome = cusprun("run", "recipe.yaml", "--json")
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert (report["bench"], report["quality"], report["parity"]) == (None, None, [])
    assert [row["metric"] for row in report["table"]["rows"]] == ["Parameters", "File size (f16)"]


def test_a_recipe_reports_all_its_faults_with_lines(work, cusprun) -> None:
    Path("recipe.yaml").write_text(
        "model: model\nexpert: expert.yaml\nratio: 2\nrule: maen\ntargets: [gguf:q9]\nrefit: maybe\n"
        "exports: [{to: gguf, quant: f61}]\nbenhc: true\nunits: [blokc]\ntarget_params: lots\n"
        "max_loss: 0\nweights: {task: -1, tsak: 1}\n"
    )
    outcome = cusprun("run", "recipe.yaml")
    assert outcome.code == 2
    for line, word in (
        (3, "'ratio'"),
        (4, "'mean'"),
        (5, "q8_0"),
        (6, "'refit'"),
        (7, "'f16'"),
        (8, "'bench'"),
        (9, "'block'"),
        (10, "100M"),
        (10, "only one budget"),
        (11, "above 0"),
        (12, "0 or above"),
        (12, "'tsak'"),
    ):
        assert any(f"recipe.yaml:{line}:" in text and word in text for text in outcome.err.splitlines()), word
    assert "'out' is missing" in outcome.err
    assert not Path("result").exists()


def test_python_functions_take_text_and_paths(work) -> None:
    store = api.score("model", "expert.yaml", Path("store"))
    plan = api.plan(Path("model"), [store], ratio=0.2, targets=("gguf:f16",), rule="mean")
    manifest = api.prune("model", load_expert(Path("expert.yaml")), "out", plan=plan)
    assert manifest.plan.layers == plan.layers
    assert api.inspect("out").num_parameters == manifest.parameters_after
    with pytest.raises(UserError, match="leave out scores"):
        api.prune("model", "expert.yaml", "other", plan=plan, scores=store)


def test_a_plan_applied_as_it_was_made_gives_what_prune_gives_by_itself(work) -> None:
    store = api.score("model", "expert.yaml", "store")
    plan = api.plan("model", store, ratio=0.2, targets=("gguf:f16",))
    planned = api.prune("model", "expert.yaml", "planned", plan=plan)
    direct = api.prune("model", "expert.yaml", "direct", ratio=0.2, targets=("gguf:f16",))
    assert planned.model_hash == direct.model_hash
    assert planned.plan.layers == direct.plan.layers


def test_the_version_and_python_m(work) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cusprun", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"cusprun {api.__version__}\n"


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("800m", 8 * 10**8), ("1.5 kB", 1500), ("12", 12), (None, None)]
)
def test_sizes(text, size) -> None:
    assert parse_size(text) == size


def test_lists() -> None:
    assert split_list(["a:b, c:d", "e"]) == ("a:b", "c:d", "e")
    assert split_list(None) == ()
