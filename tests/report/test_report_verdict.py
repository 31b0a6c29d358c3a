"""Whether to ship: situations whose answer anybody would agree on, and that each rule is stated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import report_fixtures as made

from cusprun.pipeline.reporting.verdict import RULES, Evidence, judge
from cusprun.pipeline.results import ArtifactFile
from serve.bench.records import Comparison, Interval, LostRun, Suite
from serve.report.view import Aspect, Verdict


def evidence(**changes: Any) -> Evidence:
    run = made.run_report()
    known = Evidence(
        manifest=made.manifest(),
        quality=made.eval_report(),
        parity=run.parity,
        artifacts=run.artifacts,
        suites=(made.suite(),),
    )
    return replace(known, **changes)


def verdict(**changes: Any) -> Verdict:
    found = judge(evidence(**changes))
    assert found is not None
    return found


def aspect(found: Verdict, name: str) -> Aspect:
    (one,) = (one for one in found.aspects if one.name == name)
    return one


def with_ratio(ratio: float, verdict: str, better: str | None = None) -> Suite:
    """All speeds and memory have one ratio and verdict."""

    def changed(one: Comparison) -> Comparison:
        return replace(
            one,
            ratio=Interval(ratio, ratio * 0.99, ratio * 1.01),
            verdict=verdict,
            better=better or one.better,
        )

    suite = made.suite()
    return replace(suite, comparisons=tuple(map(changed, suite.comparisons)))


def larger_files() -> tuple[ArtifactFile, ...]:
    return (ArtifactFile("before", "f16", "a.gguf", 100), ArtifactFile("after", "f16", "b.gguf", 120))


def test_a_good_expert_is_shipped_with_reasons() -> None:
    found = verdict()
    assert found.answer == "ship"
    told = " ".join(found.reasons)
    for word in (
        "parity (proven)",
        "speed (faster)",
        "size (smaller)",
        "memory (less)",
        "+4.0 % (+2.8 to +5.2)",
    ):
        assert word in told


@pytest.mark.parametrize(
    ("changes", "answer", "word"),
    [
        ({"quality": made.eval_report(held_out=1.5)}, "stop", "much worse"),
        ({"quality": made.eval_report(held_out=1.2, spread=0.03)}, "look", "somewhat worse"),
        # The interval reaches beyond a threshold: neither fine nor against.
        ({"quality": made.eval_report(held_out=1.09, spread=0.03)}, "look", "somewhat worse"),
        ({"quality": made.eval_report(held_out=1.27, spread=0.03)}, "look", "somewhat worse"),
        ({"quality": made.eval_report(held_out=1.03, spread=0.08)}, "look", "too uncertain to say"),
        ({"quality": made.eval_report(held_out=0.95, spread=0.01)}, "ship", "better"),
        ({"quality": made.eval_report(held_out=1.005, spread=0.02)}, "ship", "no difference shown"),
        # General text alone never decides.
        ({"quality": made.eval_report(general=40.0)}, "ship", "given up in part"),
        (
            {"parity": (made.parity_report(), made.parity_report("original", "fail"))},
            "stop",
            "failed for 1 of 2",
        ),
        ({"parity": ()}, "unknown", "not measured"),
        ({"quality": None, "manifest": None}, "unknown", "not measured"),
        ({"suites": (with_ratio(0.9, "slower", "higher"),)}, "look", "slower"),
        ({"suites": (with_ratio(1.0, "no difference shown"),)}, "look", "no difference shown"),
        ({"suites": (with_ratio(1.3, "too few pairs to tell"),)}, "look", "too few pairs to tell"),
        ({"suites": (made.suite(), made.failed_suite())}, "look", "faster"),
        ({"suites": ()}, "ship", "smaller"),
        (
            {"suites": (with_ratio(1.0, "no difference shown"),), "artifacts": larger_files()},
            "stop",
            "not smaller",
        ),
    ],
)
def test_situations(changes: dict[str, Any], answer: str, word: str) -> None:
    if changes.get("artifacts"):
        changes = {**changes, "manifest": None}
    found = verdict(**changes)
    assert found.answer == answer, found.reasons
    assert any(word in one.word for one in found.aspects), found.aspects


def test_what_failed_is_told_in_its_row() -> None:
    found = verdict(suites=(made.suite(), made.failed_suite()))
    assert any("ran out of memory" in fact.change for fact in aspect(found, "Speed").facts)


def test_pruning_itself_measured_quality_without_an_interval() -> None:
    one = aspect(verdict(quality=None), "Quality on the expert's documents")
    # The rule is about the whole interval, so a number without one can be against it, but not fine.
    assert (one.status, one.word) == ("look", "kept, by a number without an interval")
    assert verdict(quality=None).answer == "look"
    worse = {"perplexity_before": 10.0, "perplexity_after": 15.0, "perplexity_ratio": 1.5}
    assert verdict(quality=None, manifest=made.manifest(measurements={"held_out": worse})).answer == "stop"
    (fact,) = one.facts
    assert fact.change == "+4.0 %"
    assert "without an interval" in fact.label


def test_of_several_models_the_one_that_the_manifest_is_of_is_judged() -> None:
    good, bad = made.eval_report(held_out=1.04), made.eval_report(held_out=1.5)
    other = replace(bad.models[1], model_hash="0" * 64)
    both = replace(good, models=(*good.models, other))
    assert verdict(quality=both).answer == "ship"
    assert verdict(quality=both, manifest=None).answer == "stop"


def test_a_runtime_that_broke_down_is_looked_at() -> None:
    lost = LostRun("after", 9, "the worker was ended by SIGKILL")
    found = verdict(suites=(replace(made.suite(), lost_runs=(lost,) * 3),))
    assert found.answer == "look"
    assert "SIGKILL" in aspect(found, "Speed").facts[0].change


def test_the_proof_of_what_is_shipped_comes_first_and_two_precisions_are_told_apart() -> None:
    proofs = (made.parity_report("original"), made.parity_report("expert", reference_sha256=made.HASH["d"]))
    q8_0 = replace(made.suite(), before=replace(made.suite().before, precision="q8_0"), noise=())
    found = verdict(parity=proofs, suites=(made.suite(), q8_0))
    assert aspect(found, "Parity").facts[0].label == "expert-f16.gguf"
    labels = [fact.label for fact in aspect(found, "Speed").facts]
    assert "Decode speed at 512 tokens, llamacpp f16" in labels
    assert "Decode speed at 512 tokens, llamacpp q8_0" in labels
    noisy = [reason for reason in found.reasons if "noisy machine" in reason]
    assert noisy == [f"To know: noisy machine in llamacpp f16: {made.suite().noise[0]}."]


def test_what_is_not_fine_has_a_next_step() -> None:
    found = verdict(quality=made.eval_report(held_out=1.2, spread=0.03))
    assert any("cusprun sweep shows how good each size is" in reason for reason in found.reasons)
    assert not any(reason.startswith("What to do") for reason in verdict().reasons)


def test_nothing_known_has_no_verdict() -> None:
    assert judge(Evidence(None, None, (), (), ())) is None


def test_the_report_states_the_thresholds_that_decide() -> None:
    found = verdict()
    for rule in RULES.values():
        stated = aspect(found, rule.aspect).rule
        for value in (rule.fine, rule.against):
            if value is not None:
                assert f"+{100 * (value - 1):.0f} %" in stated
    assert "Ship it:" in found.rule
