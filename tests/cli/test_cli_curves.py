"""``overlap`` and ``sweep`` on tiny models: against ``prune`` and ``eval``, continued, and with bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import cusprun as api
from cusprun.codec import load_json
from cusprun.errors import OutputError
from cusprun.pipeline import sweep as sweeping
from cusprun.pipeline.curve import SweepReport
from cusprun.pruning.overlap import OverlapReport

TARGET = ("--for", "gguf:f16")
SWEEP = ("sweep", "model", "--expert", "expert.yaml", *TARGET, "--out", "curve")
FILES = ["sweep.json", "sweep.md", "sweep.png"]


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_overlap_of_scores_as_table_json_and_picture(work, cusprun) -> None:
    assert cusprun("score", "model", "--expert", "expert.yaml", "--out", "store").code == 0
    outcome = cusprun("overlap", "store", "--ratio", "0.3", "--json", "o.json", "--plot", "o.svg")
    assert outcome.code == 0, outcome
    for word in ("domain and task", "ffn_channel", "query_head", "kv_group", "block", "chance"):
        assert word in outcome.out
    report = load_json(OverlapReport, Path("o.json"))
    assert report.pairs in ((("domain", "task"),), (("task", "domain"),))
    assert all(0 <= value <= 1 for kind in report.kinds for layer in kind.layers for value in layer.jaccard)
    assert "<svg" in Path("o.svg").read_text()
    assert cusprun("overlap", "store", "--json", "o.json").code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("store", "--ratio", "2"), "between 0 and 1"),
        (("store", "--rule", "papre"), "'paper'"),
        (("store", "--plot", "o.jpeg"), ".png or .svg"),
        (("store", "store"), "given twice"),
        (("model",), "not a store of scores"),
        (("alone",), "one dimension"),
    ],
)
def test_overlap_of_bad_input(work, cusprun, arguments, words) -> None:
    Path("alone.yaml").write_text("name: alone\ntask: {sources: [{path: task.jsonl}]}\n")
    if arguments[0] != "model":
        expert = "expert.yaml" if arguments[0] == "store" else "alone.yaml"
        assert cusprun("score", "model", "--expert", expert, "--out", arguments[0]).code == 0
    outcome = cusprun("overlap", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not Path("o.jpeg").exists()


def test_a_sweep_measures_what_prune_and_eval_measure(work, cusprun) -> None:
    outcome = cusprun(*SWEEP, "--ratios", "0.5,0.2")
    assert outcome.code == 0, outcome
    report = load_json(SweepReport, Path("curve/sweep.json"))
    assert names("curve") == FILES
    assert [point.ratio for point in report.points] == [0.2, 0.5]
    assert (report.model, report.expert, report.refit) == ("model", "tiny", True)
    assert report.versions.keys() >= {"python", "torch"}
    for point in report.points:
        folder = f"expert-{point.ratio}"
        manifest = api.prune("model", "expert.yaml", folder, ratio=point.ratio, targets=("gguf:f16",))
        original, expert = api.evaluate(["model", folder], "expert.yaml").models
        assert point.shape == manifest.plan.after
        assert point.block_ratio == manifest.plan.block_ratio
        assert point.total_ratio == manifest.plan.total_ratio
        assert point.num_parameters == expert.num_parameters
        assert point.weight_bytes == manifest.measurements["weight_bytes_after"]
        assert report.original.num_parameters == original.num_parameters
        for name in ("held_out", "general"):
            for found, wanted in (
                (point.corpora[name], expert.corpora[name]),
                (report.original.corpora[name], original.corpora[name]),
            ):
                assert found.documents == wanted.documents
                assert found.predicted_tokens == wanted.predicted_tokens
                for field in ("perplexity", "perplexity_ratio"):
                    mine, theirs = getattr(found, field), getattr(wanted, field)
                    if theirs is None:
                        assert mine is None
                        continue
                    for end in ("low", "value", "high"):
                        assert getattr(mine, end) == pytest.approx(getattr(theirs, end), rel=1e-5)
    page = Path("curve/sweep.md").read_text()
    assert page.startswith("# model → tiny\n")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    assert len({line.count("|") for line in rows}) == 1
    for word in ("original", "0.2", "0.5", "held-out", "general", "× original"):
        assert word in page
        assert word in outcome.out
    assert Path("curve/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert str(work) not in Path("curve/sweep.json").read_text()


def test_scores_and_original_are_run_once(work, monkeypatch) -> None:
    from cusprun.pruning import score
    from cusprun.quality import likelihood

    runs: list[str] = []
    scoring, measuring = score.score_model, likelihood.measure_likelihood

    def counted(index, *arguments, **options):
        runs.append("score")
        return scoring(index, *arguments, **options)

    def measured(index, documents, reference=None, **options):
        assert reference is None
        runs.append("original" if index.folder.name == "model" else "expert")
        return measuring(index, documents, **options)

    monkeypatch.setattr(score, "score_model", counted)
    monkeypatch.setattr(likelihood, "measure_likelihood", measured)
    api.sweep("model", "expert.yaml", (0.2, 0.3, 0.4), "curve", targets=("gguf:f16",))
    assert sorted(runs) == ["expert", "expert", "expert", "original", "score"]


def interrupt(monkeypatch: pytest.MonkeyPatch, ratio: float, error: BaseException) -> None:
    """Let the pruning to a ratio fail after it has written the expert."""
    pruning = sweeping.prune_opened

    def failing(opened, expert, corpora, out, wishes, progress):
        manifest = pruning(opened, expert, corpora, out, wishes, progress)
        if wishes.plan.ratio == ratio:
            raise error
        return manifest

    monkeypatch.setattr(sweeping, "prune_opened", failing)


def test_an_interrupted_sweep_continues(work, cusprun, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, 0.3, KeyboardInterrupt())
        outcome = cusprun(*SWEEP, "--ratios", "0.2,0.3,0.4")
    assert outcome.code == 130
    assert names("curve") == ["sweep.json"]
    halfway = load_json(SweepReport, Path("curve/sweep.json"))
    assert [point.ratio for point in halfway.points] == [0.2]
    outcome = cusprun(*SWEEP, "--ratios", "0.2,0.3,0.4")
    assert outcome.code == 0, outcome
    assert outcome.err.count("not measuring again") == 1
    report = load_json(SweepReport, Path("curve/sweep.json"))
    assert report.points[0] == halfway.points[0]
    assert report.original == halfway.original
    assert [point.ratio for point in report.points] == [0.2, 0.3, 0.4]
    assert names("curve") == FILES
    # The same without an interruption.
    whole = api.sweep("model", "expert.yaml", (0.2, 0.3, 0.4), "whole", targets=("gguf:f16",))
    assert [point.corpora for point in whole.points] == [point.corpora for point in report.points]


def test_what_a_killed_sweep_left_behind_is_removed(work, cusprun) -> None:
    left = Path(f"curve/.work.partial-{2**22 + 1}/expert")  # no process has this number
    left.mkdir(parents=True)
    outcome = cusprun(*SWEEP, "--ratios", "0.3")
    assert outcome.code == 0, outcome
    assert names("curve") == FILES


def test_a_finished_sweep_runs_nothing_and_other_ratios_add_to_it(work, monkeypatch) -> None:
    first = api.sweep("model", "expert.yaml", [0.3], "curve", targets=("gguf:f16",))
    before = Path("curve/sweep.json").read_bytes()
    with monkeypatch.context() as patched:
        interrupt(patched, 0.3, AssertionError())
        assert api.sweep("model", "expert.yaml", [0.3], "curve", targets=("gguf:f16",)) == first
    assert Path("curve/sweep.json").read_bytes() == before
    shutil.rmtree("cache")
    more = api.sweep("model", "expert.yaml", [0.1], "curve", targets=("gguf:f16",))
    assert [point.ratio for point in more.points] == [0.1, 0.3]
    assert more.points[1] == first.points[0]


def test_damaged_cached_likelihoods_are_measured_again(work) -> None:
    first = api.sweep("model", "expert.yaml", [0.3], "one", targets=("gguf:f16",))
    (kept,) = Path("cache/likelihoods").iterdir()
    kept.write_text("{}")
    second = api.sweep("model", "expert.yaml", [0.3], "two", targets=("gguf:f16",))
    assert second.points[0].corpora == first.points[0].corpora


def test_blocks_and_weights_are_those_of_prune(work, cusprun) -> None:
    options = ("--units", "block,ffn_channel", "--weight", "task=0.5")
    outcome = cusprun(*SWEEP, "--ratios", "0.5", *options)
    assert outcome.code == 0, outcome
    report = load_json(SweepReport, Path("curve/sweep.json"))
    assert set(report.units) == {"block", "ffn_channel"}
    assert report.dimension_weights == {"task": 0.5}
    outcome = cusprun(
        "prune", "model", "--expert", "expert.yaml", *TARGET, *options, "--ratio", "0.5", "--out", "x"
    )
    assert outcome.code == 0, outcome
    expert = api.evaluate(["model", "x"], "expert.yaml").models[1]
    (point,) = report.points
    assert point.num_parameters == expert.num_parameters
    assert point.shape.num_attention_heads == report.original.shape.num_attention_heads
    for name, row in point.corpora.items():
        assert row.perplexity.value == pytest.approx(expert.corpora[name].perplexity.value, rel=1e-5)
    assert cusprun(*SWEEP, "--ratios", "0.6", *options[:2]).code == 2


def test_keep_keeps_whole_experts(work, cusprun) -> None:
    assert cusprun(*SWEEP, "--ratios", "0.2").code == 0
    outcome = cusprun(*SWEEP, "--ratios", "0.2,0.4", "--keep")
    assert outcome.code == 0, outcome
    assert names("curve") == ["expert-0.2", "expert-0.4", *FILES]
    report = load_json(SweepReport, Path("curve/sweep.json"))
    for point in report.points:
        assert api.inspect(f"curve/expert-{point.ratio}").num_parameters == point.num_parameters
        manifest = json.loads(Path(f"curve/expert-{point.ratio}/cusprun.json").read_text())
        held_out = manifest["measurements"]["held_out"]["perplexity_after"]
        assert held_out == pytest.approx(point.corpora["held_out"].perplexity.value, rel=1e-5)
    again = cusprun(*SWEEP, "--ratios", "0.2,0.4", "--keep")
    assert again.err.count("not measuring again") == 2


def test_no_refit_is_another_curve(work, cusprun) -> None:
    assert cusprun(*SWEEP, "--ratios", "0.3", "--no-refit").code == 0
    before = Path("curve/sweep.json").read_bytes()
    outcome = cusprun(*SWEEP, "--ratios", "0.4")
    assert outcome.code == 2
    assert "refit" in outcome.err
    assert Path("curve/sweep.json").read_bytes() == before
    report = load_json(SweepReport, Path("curve/sweep.json"))
    assert report.refit is False
    with Path("general.jsonl").open("a") as stream:
        stream.write('{"text": "one more text that no other is like"}\n')
    with pytest.raises(OutputError, match="documents"):
        api.sweep("model", "expert.yaml", [0.4], "curve", targets=("gguf:f16",), refit=False)


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ("0", "outside"),
        ("0.2,0.95", "outside"),
        ("-0.1", "outside"),
        ("nan", "outside"),
        ("0.2,0.3,0.2", "given twice"),
        ("0.2,half", "'half' is not a number"),
        ("", "no ratio"),
    ],
)
def test_bad_ratios_are_refused_before_any_work(work, cusprun, ratios, words) -> None:
    outcome = cusprun(*SWEEP, "--ratios", ratios)
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not Path("curve").exists()
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rule", "maen"), "did you mean 'mean'"),
        (("--for", "gguf:q9"), "q8_0"),
        (("--rule", "quantile"), "quantile:0.9"),
        (("--units", "blocks"), "'block'"),
        (("--weight", "task"), "DIMENSION=NUMBER"),
        (("--weight", "language=0.5"), "no dimension 'language'"),
    ],
)
def test_bad_options_are_refused_before_any_work(work, cusprun, arguments, words) -> None:
    outcome = cusprun(*SWEEP, "--ratios", "0.2", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert not Path("curve").exists()
    assert not Path("cache").exists()


def test_a_ratio_that_no_shape_reaches_is_refused_before_an_expert_is_made(work, cusprun) -> None:
    outcome = cusprun("sweep", "model", "--expert", "expert.yaml", "--for", "gguf:q4_k_m", "--out", "curve",
                      "--ratios", "0.1,0.9")  # fmt: skip
    assert outcome.code == 2
    assert "curve" not in names(".")


def test_ratios_that_give_the_same_shape_are_made_once(work, monkeypatch) -> None:
    made = []
    pruning = sweeping.prune_opened

    def counted(opened, expert, corpora, out, wishes, progress):
        made.append(wishes.plan.ratio)
        return pruning(opened, expert, corpora, out, wishes, progress)

    monkeypatch.setattr(sweeping, "prune_opened", counted)
    report = api.sweep("model", "expert.yaml", [0.3, 0.3001], "curve", targets=("gguf:q8_0",))
    assert made == [0.3]
    first, second = report.points
    assert (first.ratio, second.ratio) == (0.3, 0.3001)
    assert (first.shape, first.corpora) == (second.shape, second.corpora)


def test_folders_of_another_kind_are_left_alone(work, cusprun) -> None:
    Path("curve").mkdir()
    Path("curve/mine.txt").write_text("mine")
    outcome = cusprun(*SWEEP, "--ratios", "0.2")
    assert outcome.code == 2
    assert "holds no sweep.json" in outcome.err
    assert names("curve") == ["mine.txt"]
    shutil.rmtree("curve")
    Path("curve").write_text("mine")
    outcome = cusprun(*SWEEP, "--ratios", "0.2")
    assert outcome.code == 2
    assert "exists already" in outcome.err
    Path("curve").unlink()
    Path("curve").mkdir()
    Path("curve/sweep.json").write_text('{"schema_version": 1}')
    outcome = cusprun(*SWEEP, "--ratios", "0.2")
    assert outcome.code == 2
    assert "sweep.json" in outcome.err
    assert Path("curve/sweep.json").read_text() == '{"schema_version": 1}'


def test_an_expert_folder_of_somebody_else_is_not_replaced(work, cusprun) -> None:
    assert cusprun(*SWEEP, "--ratios", "0.2").code == 0
    Path("curve/expert-0.4").mkdir()
    outcome = cusprun(*SWEEP, "--ratios", "0.4", "--keep")
    assert outcome.code == 2
    assert "expert-0.4" in outcome.err
    assert names("curve") == ["expert-0.4", *FILES]


def test_few_tokens_for_the_refit_are_told(work, cusprun) -> None:
    for name in ("domain", "task"):
        Path(f"{name}.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "six"}\n')
    outcome = cusprun(*SWEEP, "--ratios", "0.2")
    assert outcome.code == 0
    assert "calibration tokens, fewer than the" in outcome.err


def test_without_held_out_documents_there_is_no_curve(work, cusprun) -> None:
    for name in ("domain", "task"):
        Path(f"{name}.jsonl").write_text(Path(f"{name}.jsonl").read_text().splitlines()[0] + "\n")
    outcome = cusprun(*SWEEP, "--ratios", "0.2")
    assert outcome.code == 2
    assert "held out" in outcome.err
    assert not Path("curve").exists()


def test_without_matplotlib_the_picture_is_left_out_with_a_note(work, cusprun, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = cusprun(*SWEEP, "--ratios", "0.3")
    assert outcome.code == 0, outcome
    assert "pip install 'cusprun[plot]'" in outcome.err
    assert names("curve") == ["sweep.json", "sweep.md"]
