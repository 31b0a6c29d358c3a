"""The recipe in a report, by reading it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import report_fixtures as made
import yaml

from cusprun.codec import dump_json, load_json
from cusprun.errors import ConfigError
from cusprun.pipeline.report import build_page
from cusprun.pipeline.results import RunReport
from cusprun.recipe import load_recipe, recipe_tree
from serve.report.view import Code

PLAIN = "model: m\nexpert: expert.yaml\nout: out\n"
FULL = """\
target_bytes: 80MB
rule: mean
targets: [gguf:q4_k_m]
units: [ffn_channel, block]
weights: {task: 2.5}
refit_target: residual
exports:
  - {to: gguf, quant: q4_k_m}
  - {to: onnx, quant: int4, options: {context_length: 1024}}
verify: false
eval: false
bench: {exports: [onnx:int4], prompt_lengths: [16], num_pairs: 9, time_limit_s: 5}
samples: 0
"""


@pytest.mark.parametrize("said", ["", "bench: false\nratio: 0.3\n", "refit: false\nmax_loss: 5%\n", FULL])
def test_the_recipe_of_a_report_is_the_one_that_was_run(tmp_path: Path, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(PLAIN + said)
    recipe = load_recipe(path)
    dump_json(made.run_report(source="m", recipe=recipe_tree(recipe)), tmp_path / "results.json")
    run = load_json(RunReport, tmp_path / "results.json")
    blocks = [block for one in build_page(made.results(run=run)).sections for block in one.blocks]
    (code,) = (block for block in blocks if isinstance(block, Code))
    assert yaml.safe_load(code.text)["model"] == "m"
    path.write_text(code.text)
    assert load_recipe(path) == recipe


def test_a_precision_that_no_number_reaches_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{PLAIN}bench: {{precision: .inf}}\n")
    with pytest.raises(ConfigError, match="must be above 0, not inf"):
        load_recipe(path)
