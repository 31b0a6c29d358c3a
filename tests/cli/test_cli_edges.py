"""The edges of the program: terminals, places to write to, and Python callers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import cusprun as api
from cusprun.checkpoint.output import atomic_file, atomic_folder
from cusprun.cli.tables import make_table
from cusprun.codec import dump_json, load_json
from cusprun.errors import OutputError, UserError
from cusprun.pipeline import results
from cusprun.pipeline.wishes import texts_of
from cusprun.records import Plan

# Ctrl-C while the module of the commands is looked for.
INTERRUPTED = """
import sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "cusprun.cli.app":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
from cusprun.cli import main
main(["--version"])
"""


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        check=False,
    )


def test_square_brackets_in_names_are_shown_as_they_are() -> None:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=80, file=nowhere)
        console.print(make_table("[/red] of [b]", ("[/]", "[bold]x"), [("[/x]", ":cat:")]))
    shown = console.export_text()
    for text in ("[/red] of [b]", "[/]", "[bold]x", "[/x]", ":cat:"):
        assert text in shown


def test_an_expert_named_with_brackets_is_pruned_and_shown(work, cusprun) -> None:
    text = Path("expert.yaml").read_text()
    Path("expert.yaml").write_text(text.replace("name: tiny", 'name: "[/tiny] :cat:"'))
    outcome = cusprun("prune", "model", "--expert", "expert.yaml", "--for", "gguf:f16", "--out", "[/out]")
    assert outcome.code == 0, outcome
    assert "[/tiny] :cat:" in outcome.out
    assert "wrote [/out]" in outcome.out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_all_letters_gets_its_table(work, encoding) -> None:
    done = call("-m", "cusprun", "eval", "model", "--expert", "expert.yaml", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert b"perplexity" in done.stdout
    assert b"95 % interval of" in done.stdout


def test_json_loses_no_letter_to_the_terminal(work) -> None:
    Path("model").rename("mödel–")
    done = call("-m", "cusprun", "inspect", "mödel–", "--json", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("latin-1"))["path"].endswith("mödel–")


def test_ctrl_c_while_the_program_is_loaded_is_one_line() -> None:
    done = call("-c", INTERRUPTED)
    assert (done.returncode, done.stderr) == (130, b"error: interrupted\n")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no place here where nothing can be made")
@pytest.mark.parametrize("path", ["/proc/x", "/proc/new/folder/x"])
@pytest.mark.parametrize("commit", [atomic_file, atomic_folder])
def test_a_place_where_nothing_can_be_made_is_named(path: str, commit: Any) -> None:
    with pytest.raises(OutputError, match=f"{path} cannot be "), commit(Path(path)) as partial:
        partial.write_text("x")


def test_a_missing_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out"):
        (tmp_path / "missing").read_bytes()


def test_two_outputs_of_one_name_are_refused_before_any_work(work, cusprun) -> None:
    outcome = cusprun("overlap", "store", "--plot", "same.png", "--json", "./same.png")
    assert outcome.code == 2
    assert "same.png is named for two outputs" in outcome.err


WRONG = {
    "ratio as text": (
        lambda: api.prune("model", "expert.yaml", "out", ratio="0.2"),
        "ratio must be a number",
    ),
    "parameters as text": (
        lambda: api.prune("model", "expert.yaml", "out", target_params="100M"),
        "target_params must be a whole number, not '100M'",
    ),
    "loss as text": (
        lambda: api.prune("model", "expert.yaml", "out", max_loss="5%"),
        "max_loss must be a number, not '5%'",
    ),
    "weight as text": (
        lambda: api.prune("model", "expert.yaml", "out", dimension_weights={"domain": "1"}),
        "the weight of domain must be a number, not '1'",
    ),
    "no granularity": (
        lambda: api.prune("model", "expert.yaml", "out", granularity=None),
        "the granularity must be text, not None",
    ),
    "no granularity of scores": (
        lambda: api.score("model", "expert.yaml", "out", granularity=None),
        "the granularity must be text, not None",
    ),
    "rule as a number": (
        lambda: api.prune("model", "expert.yaml", "out", rule=3),
        "the rule must be text, not 3",
    ),
    "no stores": (
        lambda: api.prune("model", "expert.yaml", "out", scores=[]),
        "the list of stores is empty",
    ),
    "targets as a number": (
        lambda: api.prune("model", "expert.yaml", "out", targets=3),
        "targets must be a list of texts, not 3",
    ),
    "one ratio": (lambda: api.sweep("model", "expert.yaml", 0.1, "out"), "ratios must be a list of numbers"),
    "ratios as text": (
        lambda: api.sweep("model", "expert.yaml", "0.1,0.2", "out"),
        "ratios must be a list of numbers, not '0.1,0.2'",
    ),
    "overlap ratio as text": (lambda: api.overlap("store", ratio="0.2"), "the ratio must be a number"),
    "overlap rule as a number": (lambda: api.overlap("store", rule=3), "the rule must be text, not 3"),
    "half a prompt": (
        lambda: api.evaluate("model", "expert.yaml", "tasks.yaml", batch_size=1.5),
        "the batch size must be a whole number, not 1.5",
    ),
    "batch size without tasks": (
        lambda: api.evaluate("model", "expert.yaml", batch_size=4),
        "the batch size is that of tasks, and none were given",
    ),
    "weights too far apart": (
        lambda: api.prune("model", "expert.yaml", "out", dimension_weights={"domain": 1e-7}),
        "go from 1e-07 to 1, more than 1,000,000 times",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_values_of_the_wrong_type_are_refused_with_the_right_one(work, case) -> None:
    make, words = case
    with pytest.raises(UserError) as found:
        make()
    assert words in str(found.value)
    assert not Path("out").exists()
    assert not Path("cache").exists()


@pytest.mark.parametrize("weights", [{"domain": 1e-60, "task": 1e-60}, {"domain": 1e-6}, {"domain": 0.0}])
def test_weights_that_are_close_enough_or_zero_are_taken(work, weights) -> None:
    manifest = api.prune("model", "expert.yaml", "out", targets="gguf:f16", dimension_weights=weights)
    assert all(report.measured_on == "held-out" for report in manifest.refit)
    assert any(report.ridge is not None for report in manifest.refit)


def test_one_text_names_several_targets() -> None:
    assert texts_of("gguf:f16", "targets") == ("gguf:f16",)
    assert texts_of("gguf:f16, vllm:tp2", "targets") == ("gguf:f16", "vllm:tp2")
    assert texts_of(["gguf:f16"], "targets") == ("gguf:f16",)


def test_only_documents_that_weigh_count_for_the_refit(work, cusprun) -> None:
    Path("task.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    prune = ("prune", "model", "--expert", "expert.yaml")
    few = cusprun(*prune, "--out", "out", "--weight", "domain=0")
    assert few.code == 0
    assert "calibration tokens with a weight above 0, fewer than the" in few.err
    enough = cusprun(*prune, "--out", "other", "--weight", "domain=0.5")
    assert enough.code == 0
    assert "calibration tokens" not in enough.err


def test_a_manifest_given_as_a_plan_says_which_part_is_one(work, cusprun) -> None:
    prune = ("prune", "model", "--expert", "expert.yaml", "--for", "gguf:f16")
    assert cusprun(*prune, "--out", "first").code == 0
    outcome = cusprun(
        "prune", "model", "--expert", "expert.yaml", "--plan", "first/cusprun.json", "--out", "x"
    )
    assert outcome.code == 2
    assert "first/cusprun.json is not a plan but holds one; write its 'plan' part" in outcome.err
    Path("plan.json").write_text(json.dumps(json.loads(Path("first/cusprun.json").read_text())["plan"]))
    assert cusprun("prune", "model", "--expert", "expert.yaml", "--plan", "plan.json", "--out", "x").code == 0


@pytest.mark.parametrize("plain", [{"plan": 3}, {"plan": {}}, {"plan": {"layers": [1]}}])
def test_what_holds_no_plan_is_not_said_to(tmp_path: Path, plain: dict[str, Any]) -> None:
    dump_json(plain, tmp_path / "x.json")
    with pytest.raises(UserError, match=r"x\.json: unknown key 'plan'"):
        load_json(Plan, tmp_path / "x.json")


@pytest.mark.parametrize("plain", ["x" * 9999, ["x" * 9999], {"targets": "x" * 9999}])
def test_a_wrong_value_is_shown_in_part(tmp_path: Path, plain: object) -> None:
    dump_json(plain, tmp_path / "x.json")
    with pytest.raises(UserError) as found:
        load_json(Plan, tmp_path / "x.json")
    assert len(str(found.value)) < len(str(tmp_path)) + 150


@pytest.mark.parametrize(
    ("compensation", "words"),
    [("refit", "with refit"), ("bias", "with biases for what went"), ("none", "no refit")],
)
def test_the_results_say_what_made_good_for_the_loss(compensation: str, words: str) -> None:
    plan = SimpleNamespace(block_ratio=0.25, total_ratio=0.2)
    manifest: Any = SimpleNamespace(
        plan=plan,
        rule="mean",
        refit=(),
        compensation=compensation,
        calibration_documents=2,
        calibration_tokens=9,
    )
    assert f"rule mean, {words}, 2 calibration documents" in results._notes(manifest, (), None)[0]
