"""``cusprun report`` on files as users have them: found, recognised, refused by name, never half-written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as made

import cusprun as api
from cusprun.codec import Indices, dump_json, to_plain
from cusprun.errors import MeasurementError, OutputError, UserError
from cusprun.panels import Heat
from cusprun.pipeline.report import build_page
from cusprun.pipeline.reporting.inputs import Result, read_results
from cusprun.pipeline.reporting.kinds import KINDS
from cusprun.records import LayerPlan
from serve.report import view

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "secret-place" / "out"
    (folder / "expert").mkdir(parents=True)
    run = made.run_report()
    dump_json(run, folder / "results.json")
    dump_json(run.bench, folder / "bench.json")
    dump_json(run.quality, folder / "eval.json")
    dump_json(made.manifest(), folder / "expert" / "cusprun.json")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    from cusprun.cli.app import run

    def run_command(*arguments: object) -> tuple[int, str, str]:
        code = run(["report", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    return path


def test_a_run_folder_becomes_all_three_files(run_folder: Path, tmp_path: Path, call: Any) -> None:
    names = [tmp_path / f"report.{ending}" for ending in ("html", "md", "json")]
    code, out, err = call(run_folder, *(word for name in names for word in ("--out", name)))
    assert code == 0, err
    assert out.count("wrote ") == 3
    page = json.loads(names[2].read_text())
    assert page["schema_version"] == 1
    assert page["verdict"]["answer"] == "ship"
    assert page["title"] == f"{made.SOURCE} → {made.NAME}"
    for name in names:
        text = name.read_text(encoding="utf-8")
        assert "Ship it" in text
        assert "secret-place" not in text
    # What the run holds is there once, though bench.json and eval.json lie beside it.
    captions = [
        block["caption"] for one in page["sections"] for block in one["blocks"] if block["kind"] == "table"
    ]
    assert len([caption for caption in captions if caption.startswith("Before and after in")]) == 1


def test_files_given_one_by_one_and_twice_show_the_same(run_folder: Path, tmp_path: Path) -> None:
    whole = api.report(run_folder, tmp_path / "a.json")
    names = ("results.json", "bench.json", "eval.json", "expert/cusprun.json", "results.json")
    single = api.report([run_folder / name for name in names], tmp_path / "b.json")
    assert single == whole


@pytest.mark.parametrize(
    ("name", "record", "title"),
    [
        (
            "bench",
            made.bench_report(made.suite(), made.failed_suite()),
            "original-f16.gguf → expert-f16.gguf",
        ),
        ("load test", made.endpoint_report(), "original-q8_0 → expert-q8_0"),
        ("overlap", made.overlap_report(), "Overlap of language, domain and task"),
        ("sweep", made.sweep_report(), f"{made.SOURCE} → {made.NAME}"),
        ("proof", made.parity_report(), "Proofs of exports"),
        ("manifest", made.manifest(), f"{made.SOURCE} → {made.NAME}"),
        ("manifest of single neurons", made.neuron_manifest(), f"{made.SOURCE} → {made.NAME}"),
        ("evaluation", made.eval_report(), f"{made.SOURCE} → {made.NAME}"),
    ],
)
def test_each_kind_is_known_by_its_content(tmp_path: Path, name: str, record: Any, title: str) -> None:
    dump_json(record, tmp_path / "anything.json")
    (result,), unread = read_results([tmp_path / "anything.json"])
    assert (result.kind.name, result.record, unread) == (name, record, ())
    page = build_page([result])
    assert page.title == title
    assert page.sections


def test_every_kind_has_an_example_above() -> None:
    shown = {"bench", "overlap", "sweep", "proof", "manifest", "evaluation", "run", "load test"}
    assert shown | {"manifest of single neurons"} == set(KINDS)


def test_a_sweep_folder(tmp_path: Path) -> None:
    (tmp_path / "curve").mkdir()
    dump_json(made.sweep_report(), tmp_path / "curve" / "sweep.json")
    page = api.report(tmp_path / "curve", tmp_path / "r.md")
    assert [section.name for section in page.sections] == ["curve"]
    assert page.verdict is None


def test_zeroed_neurons_are_shown_with_the_way_to_make_them(tmp_path: Path) -> None:
    """A folder of ``prune --granularity neuron`` beside its evaluation."""
    dump_json(made.neuron_manifest(), tmp_path / "cusprun.json")
    dump_json(made.eval_report(), tmp_path / "eval.json")
    changed(tmp_path / "eval.json", lambda plain: plain["models"][1].update(num_parameters=134_515_008))
    page = api.report(tmp_path, tmp_path / "r.md")
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    for words in (
        "with 19.7% of its parameters set to zero",
        "neither smaller nor faster",
        "cusprun prune HuggingFaceTB/SmolLM2-135M-Instruct --expert expert.yaml",
        "--granularity neuron --ratio 0.25 --rule paper",
        "| 29 | 384 | 144 |",
    ):
        assert words in text
    assert page.verdict is not None
    statuses = {one.name: (one.status, one.word) for one in page.verdict.aspects}
    assert statuses["Size"] == ("look", "not smaller")
    assert page.verdict.answer == "unknown"


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "an evaluation of no model": lambda plain: plain["quality"].update(models=[]),
    "a plan of width 0": lambda plain: plain["plan"]["before"].update(intermediate_size=0),
    "a load test of no endpoint": lambda plain: plain.update(endpoints=[], results=[]),
    "a sweep without documents": lambda plain: [one.update(corpora={}) for one in plain["points"]],
    "a benchmark whose numbers are none": lambda plain: plain["suites"][0].update(elapsed_s=1e308),
}


@pytest.mark.parametrize(
    ("make", "damage"),
    [*zip(
        (made.run_report, made.manifest, made.endpoint_report, made.sweep_report, made.bench_report),
        DAMAGES.values(), strict=True,
    )],
    ids=DAMAGES,
)  # fmt: skip
def test_what_does_not_fit_together_is_told_in_a_row(
    tmp_path: Path, run_folder: Path, call: Any, make: Any, damage: Callable[[dict[str, Any]], object]
) -> None:
    dump_json(make(), tmp_path / "odd.json")
    changed(tmp_path / "odd.json", damage)
    text = (tmp_path / "odd.json").read_text()
    (tmp_path / "odd.json").write_text(text.replace("1e+308", "1e999"))
    code, _, err = call(tmp_path / "odd.json", run_folder / "bench.json", "--out", tmp_path / "r.html")
    assert (code, "odd.json" in err) == (3, True), err
    assert "could not be read: " in (tmp_path / "r.html").read_text()


def test_a_later_version_is_told_in_a_row_also_where_its_keys_are_others(
    tmp_path: Path, run_folder: Path, call: Any
) -> None:
    (tmp_path / "later.json").write_text('{"schema_version": 9, "everything": "else"}')
    code, _, err = call(run_folder, tmp_path / "later.json", "--out", tmp_path / "r.md")
    assert (code, "later.json" in err) == (3, True)
    assert "schema version 9, and this cusprun reads up to version" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize("damage", ["version", "truncated", "key"])
def test_one_unreadable_file_takes_nothing_with_it(
    run_folder: Path, tmp_path: Path, call: Any, damage: str
) -> None:
    other = tmp_path / "other.json"
    dump_json(made.overlap_report(), other)
    if damage == "version":
        changed(other, lambda plain: plain.update(schema_version=7))
    elif damage == "key":
        changed(other, lambda plain: plain.update(ratio="a third"))
    else:
        other.write_text(other.read_text()[:-40])
    out = tmp_path / "report.md"
    code, told, err = call(run_folder, other, "--out", out)
    assert (code, told) == (3, f"wrote {out}\n")
    assert "other.json" in err
    text = out.read_text(encoding="utf-8")
    assert "- **other.json** could not be read: " in text
    assert {"version": "schema version 7", "truncated": "read as JSON", "key": "ratio must be"}[
        damage
    ] in text
    assert "Ship it" in text
    # Alone there is nothing to show, and nothing is written.
    code, told, err = call(other, "--out", tmp_path / "alone.html")
    assert (code, told) == (2, "")
    assert "other.json could not be read" in err
    assert not (tmp_path / "alone.html").exists()


def test_two_versions_of_one_kind(tmp_path: Path) -> None:
    dump_json(made.bench_report(), tmp_path / "new.json")
    dump_json(made.bench_report(made.suite("onnx")), tmp_path / "old.json")
    changed(tmp_path / "old.json", lambda plain: plain.update(schema_version=1))
    with pytest.raises(MeasurementError, match=r"1 of the results .*old\.json"):
        api.report([tmp_path / "new.json", tmp_path / "old.json"], tmp_path / "r.json")
    page = json.loads((tmp_path / "r.json").read_text())
    assert [one["name"] for one in page["unread"]] == ["old.json"]
    assert "reads version 2" in page["unread"][0]["reason"]


def test_a_run_with_an_older_benchmark_inside_keeps_the_rest(tmp_path: Path) -> None:
    dump_json(made.run_report(), tmp_path / "results.json")
    changed(tmp_path / "results.json", lambda plain: plain["bench"].update(schema_version=1))
    with pytest.raises(MeasurementError, match=r"the part 'bench' of results\.json"):
        api.report(tmp_path / "results.json", tmp_path / "r.json")
    page = json.loads((tmp_path / "r.json").read_text())
    names = [section["name"] for section in page["sections"]]
    assert "quality" in names
    assert "measured" not in names


def test_results_without_samples_still_load(tmp_path: Path) -> None:
    dump_json(made.run_report(), tmp_path / "results.json")
    changed(tmp_path / "results.json", lambda plain: plain.pop("samples"))
    page = api.report(tmp_path / "results.json", tmp_path / "r.json")
    assert "answers" not in [section.name for section in page.sections]


def bad_calls(folder: Path, run_folder: Path) -> Iterator[tuple[list[object], str]]:
    (folder / "empty").mkdir()
    (folder / "list.json").write_text("[1, 2]")
    (folder / "plan.json").write_text(json.dumps(to_plain(made.plan())))
    (folder / "there.html").write_text("mine")
    dump_json(made.manifest(source="another/model"), folder / "another.json")
    out = folder / "r.html"
    yield [folder / "missing.json", "--out", out], "does not exist"
    yield [folder / "empty", "--out", out], "holds no results"
    yield [folder / "list.json", "--out", out], "of no kind that a report shows"
    yield [run_folder, folder / "plan.json", "--out", out], "of no kind that a report shows"
    yield [run_folder, "--out", folder / "r.pdf"], ".html, .md, .json"
    yield [run_folder, "--out", folder / "there.html"], "exists already"
    yield [run_folder, "--out", out, "--out", out], "named twice"
    yield [run_folder, folder / "another.json", "--out", out], "about one expert"
    dump_json(made.eval_report(), folder / "stranger.json")
    changed(
        folder / "stranger.json",
        lambda plain: plain["models"][1].update(model_hash="0" * 64, num_parameters=120_000_000),
    )
    dump_json(made.parity_report(reference_sha256="0" * 64), folder / "stranger.parity.json")
    dump_json(made.eval_report(), folder / "name.json")
    changed(folder / "name.json", lambda plain: plain.update(expert="law-de"))
    yield [run_folder, folder / "stranger.json", "--out", out], "evaluation of HuggingFaceTB"
    yield [run_folder, folder / "stranger.parity.json", "--out", out], "the proof of expert-f16.gguf is of"
    yield [run_folder, folder / "name.json", "--out", out], "at 0.25; law-de"
    yield [run_folder], "--out"
    yield ["--out", out], "RESULTS"


def test_bad_input_is_one_sentence_and_leaves_nothing(run_folder: Path, tmp_path: Path, call: Any) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for arguments, words in bad_calls(folder, run_folder):
        before = sorted(folder.iterdir())
        code, told, err = call(*arguments)
        assert (code, told) == (2, ""), (arguments, err)
        assert words in err
        assert len(err.splitlines()) == 1
        assert sorted(folder.iterdir()) == before
    assert (folder / "there.html").read_text() == "mine"


def test_errors_in_python(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no output"):
        api.report(run_folder, [])
    with pytest.raises(UserError, match="no results were given"):
        api.report([], tmp_path / "r.md")
    (tmp_path / "r.md").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        api.report(run_folder, tmp_path / "r.md")


def heats(page: view.Page) -> list[Heat]:
    return [
        panel
        for section in page.sections
        for block in section.blocks
        if isinstance(block, view.Picture)
        for panel in block.panels
        if isinstance(panel, Heat)
    ]


def test_the_picture_of_layers_counts_what_was_kept() -> None:
    """A model of 6 blocks and 100 channels that lost block 2 and, elsewhere, known channels."""
    from dataclasses import replace

    before = replace(made.BEFORE, num_hidden_layers=6, intermediate_size=100)
    kept = Indices([*range(50), 99])
    plan = replace(
        made.plan(),
        before=before,
        after=replace(before, num_hidden_layers=5, intermediate_size=51),
        kept_blocks=Indices([0, 1, 3, 4, 5]),
        layers=(LayerPlan(Indices([0, 2]), Indices(range(6)), kept),) * 5,
    )
    page = build_page([Result(KINDS["manifest"], "cusprun.json", made.manifest(plan=plan, refit=()))])
    channels, groups = heats(page)
    assert len(channels.values) == len(groups.values) == 6
    assert set(channels.values[2]) == set(groups.values[2]) == {0.0}
    assert groups.values[0] == (1.0, 0.0, 1.0)
    # 64 bins over 100 channels: bin b holds the channels k with k * 64 // 100 == b.
    for bin_number, share in enumerate(channels.values[3]):
        members = [k for k in range(100) if k * 64 // 100 == bin_number]
        assert share == pytest.approx(sum(k in kept for k in members) / len(members))


def test_the_page_documents_every_field() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|$", text, re.MULTILINE))
    for record in (view.Page, view.Verdict, view.Aspect, view.Fact, view.Unread, view.Section, view.Prose,
                   view.Bullets, view.Grid, view.Picture, view.Heading, view.Code, view.Answers):  # fmt: skip
        named = set(re.findall(r"`(\w+)`", rows[record.__name__]))
        assert {field.name for field in fields(record)} <= named, record


def test_the_page_states_the_thresholds() -> None:
    from cusprun.pipeline.reporting.verdict import RULES

    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    for rule in RULES.values():
        for value in (rule.fine, rule.against):
            assert value is None or f"+{100 * (value - 1):.0f} %" in text
