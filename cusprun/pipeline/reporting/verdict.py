"""Whether to ship an expert: what is known of it, aspect by aspect, and one rule for each.

A rule is one line of :data:`RULES`, or for what has no ratio one of the sentences beside it; the report
states each as it is here. Thresholds are a convention; whoever ships decides, which is why no answer stands
without its reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cusprun.pipeline.reporting.one_expert import parameters_after
from cusprun.pipeline.reporting.wording import (
    amount,
    change,
    counted,
    improved,
    metric_base,
    metric_label,
    metric_tokens,
    shown,
    suite_name,
)
from cusprun.records import Manifest, NeuronManifest
from serve.bench.records import Comparison, Suite
from serve.report.view import Aspect, Fact, Verdict

if TYPE_CHECKING:
    from cusprun.pipeline.results import ArtifactFile
    from cusprun.quality.report import CorpusQuality, EvalReport
    from exporters.parity_records import ParityReport


UNSURE = "too uncertain to say"
"""Of an interval that holds both no change and one that is not fine."""


@dataclass(frozen=True)
class Rule:
    """When a perplexity ratio with its interval is fine, and when it speaks against shipping.

    Fine is an interval that ends at ``fine`` or below; one that begins above ``against`` speaks against it;
    anything else is to be looked at. ``against`` None never speaks against it.
    """

    aspect: str
    fine: float
    against: float | None
    word_fine: str
    word_between: str
    word_against: str = ""

    @property
    def text(self) -> str:
        """The rule as the report states it."""
        told = f"Fine while the whole 95 % interval of the perplexity's change is at most {_plus(self.fine)}"
        if self.against is None:
            return f"{told}. It never speaks against shipping: an expert gives general ability up."
        return f"{told}; speaks against shipping when the whole interval is above {_plus(self.against)}."

    def judge(self, low: float, high: float) -> tuple[str, str]:
        """Return status and word for an interval of the ratio."""
        if self.against is not None and low > self.against:
            return "stop", self.word_against
        if high > self.fine:
            return "look", self.word_between if low > 1 else UNSURE
        if low <= 1 <= high:
            return "ok", "no difference shown"
        return "ok", "better" if high < 1 else self.word_fine


def _plus(ratio: float) -> str:
    return f"+{100 * (ratio - 1):.0f} %"


RULES: Mapping[str, Rule] = {
    "held_out": Rule("Quality on the expert's documents", 1.10, 1.25, "kept", "somewhat worse", "much worse"),
    "general": Rule("Quality on general text", 1.25, None, "largely kept", "given up in part"),
}
"""By the set of documents, as evaluation names them."""

PARITY, SIZE, SPEED, MEMORY = "Parity", "Size", "Speed", "Memory"
TEXTS: Mapping[str, str] = {
    PARITY: "Fine when every export was proven to compute the same as its checkpoint; one failed proof "
    "speaks against shipping.",
    SIZE: "Fine when every file is smaller.",
    SPEED: "Fine when a speed-up is shown and no slow-down; the decode speed at the deepest context and the "
    "prompt rate at the longest prompt count, in every runtime.",
    MEMORY: "Fine when less peak memory is shown and nowhere more.",
}
"""The rules of aspects that need no threshold."""

GAINS = (SIZE, SPEED, MEMORY)
"""One of these must be fine, or nothing is gained by shipping."""

REQUIRED = (PARITY, RULES["held_out"].aspect)
"""What must be measured, beside one gain, before an answer is given."""

OVERALL = (
    "Ship it: all is fine, parity and quality on the expert's documents were measured, and size, speed or "
    "memory is better. Do not ship it: an aspect speaks against it, or nothing is gained. Else look closer."
)

_HELD_OUT = RULES["held_out"].aspect
NEXT: Mapping[str, str] = {
    PARITY: "read under the proofs what differs, and export again or in another precision",
    _HELD_OUT: "compare the answers of both models; a smaller ratio or more documents keep more, and cusprun "
    "sweep shows how good each size is",
    SPEED: "see under the pictures what bounds the speed, and measure again on a quiet machine what was not "
    "shown",
}
"""What to do about an aspect that is not fine."""

_SPEEDS = ("decode_tokens_per_second", "prompt_tokens_per_second")
_PEAK = "peak_memory_bytes"
_MOST_PROOFS = 3  # shown in the verdict, failed ones first


@dataclass(frozen=True)
class Evidence:
    """What the inputs of a report know of one expert; None and nothing where they do not say."""

    manifest: Manifest | NeuronManifest | None
    quality: EvalReport | None
    parity: Sequence[ParityReport]
    artifacts: Sequence[ArtifactFile]
    suites: Sequence[Suite]


def judge(evidence: Evidence) -> Verdict | None:
    """Return the verdict; None when nothing is known that it could rest on."""
    aspects = (
        _parity(evidence.parity, _expert_hash(evidence)),
        *(_quality(name, rule, evidence) for name, rule in RULES.items()),
        _speed(evidence.suites),
        _memory(evidence.suites),
        _size(evidence),
    )
    if all(aspect.status == "unknown" for aspect in aspects):
        return None
    reasons = (*_reasons(aspects), *_noise(evidence.suites))
    return Verdict(_answer(aspects), reasons, aspects, OVERALL)


def _answer(aspects: Sequence[Aspect]) -> str:
    status = {aspect.name: aspect.status for aspect in aspects}
    gains = [status[name] for name in GAINS]
    if "stop" in status.values() or _nothing_gained(gains):
        return "stop"
    if any(status[name] == "unknown" for name in REQUIRED) or "ok" not in gains:
        return "unknown"
    return "look" if "look" in status.values() else "ship"


def _nothing_gained(gains: Sequence[str]) -> bool:
    return all(status == "look" for status in gains)


def _reasons(aspects: Sequence[Aspect]) -> Iterator[str]:
    gains = [aspect.status for aspect in aspects if aspect.name in GAINS]
    openings = {
        "stop": "Against it",
        "look": "To be looked at",
        "ok": "For it",
        "told": "To know",
    }
    for status, opening in openings.items():
        for aspect in aspects:
            if aspect.status == status:
                first = next((fact for fact in aspect.facts), None)
                details = f" – {first.label}: {first.change}" if first and first.change else ""
                yield f"{opening}: {aspect.name.lower()} ({aspect.word}){details}."
    if _nothing_gained(gains):
        yield "Against it: neither size nor speed nor memory is shown to be better."
    for aspect in aspects:
        if aspect.status in ("look", "stop") and aspect.name in NEXT:
            yield f"What to do: {NEXT[aspect.name]}."
    missing = [aspect.name.lower() for aspect in aspects if aspect.status == "unknown"]
    if missing:
        yield f"Not measured: {', '.join(missing)}."


def _noise(suites: Sequence[Suite]) -> Iterator[str]:
    """Yield what disturbed each suite first of all."""
    for suite in suites:
        for sentence in suite.noise[:1]:
            yield f"To know: noisy machine in {suite_name(suite)}: {sentence}."


def _unknown(name: str, rule: str) -> Aspect:
    return Aspect(name, "unknown", "not measured", (), rule)


def _parity(reports: Sequence[ParityReport], expert: str | None) -> Aspect:
    if not reports:
        return _unknown(PARITY, TEXTS[PARITY])
    failed = [report for report in reports if report.verdict != "pass"]
    # What is shipped comes first: its proof stands for the aspect where there is room for one.
    passed = sorted(
        (one for one in reports if one.verdict == "pass"), key=lambda one: expert != one.reference_sha256
    )
    facts = tuple(
        Fact(
            report.artifact or f"{report.format} {report.quant}",
            "",
            "passed" if report.verdict == "pass" else "failed",
            f"top-1 agreement {report.logits.top1_agreement:.2%}, {_kl_text(report.logits.mean_kl)}",
        )
        for report in (*failed, *passed)
    )
    word = "proven" if not failed else f"failed for {len(failed)} of {len(reports)}"
    left = len(facts) - _MOST_PROOFS
    if left > 0:
        facts = (*facts[:_MOST_PROOFS], Fact(f"and {left} more", "", "see the proofs below", ""))
    return Aspect(PARITY, "stop" if failed else "ok", word, facts, TEXTS[PARITY])


def _kl_text(mean_kl: float | None) -> str:
    return "KL not finite" if mean_kl is None else f"KL {mean_kl:.1e} nats per token"


def _quality(name: str, rule: Rule, evidence: Evidence) -> Aspect:
    rows = _quality_rows(name, evidence.quality, evidence.manifest)
    if rows is None:
        return _from_manifest(rule, evidence.manifest if name == "held_out" else None)
    before, after = rows
    spread = after.perplexity_ratio
    assert spread is not None
    status, word = rule.judge(spread.low, spread.high)
    fact = Fact(
        f"perplexity, {after.documents:,} documents",
        f"{before.perplexity.value:.2f}",
        f"{after.perplexity.value:.2f}",
        change(spread.low, spread.value, spread.high),
    )
    return Aspect(rule.aspect, _informing(rule, status), word, (fact,), rule.text)


def _informing(rule: Rule, status: str) -> str:
    """Return the status of an aspect that never speaks against shipping as one that only informs."""
    return "told" if rule.against is None and status == "look" else status


def _expert_hash(evidence: Evidence) -> str | None:
    if evidence.manifest is not None:
        return evidence.manifest.model_hash
    return evidence.quality.models[-1].model_hash if evidence.quality is not None else None


def _quality_rows(
    name: str, quality: EvalReport | None, manifest: Manifest | NeuronManifest | None
) -> tuple[CorpusQuality, CorpusQuality] | None:
    """Return the first model's row and the expert's, where both were compared.

    The expert is the model that the manifest is of; without one, the last.
    """
    if quality is None or len(quality.models) < 2 or name not in quality.corpus_names():
        return None
    known = {model.model_hash: model for model in quality.models[1:]}
    expert = quality.models[-1] if manifest is None else known.get(manifest.model_hash, quality.models[-1])
    before, after = (model.corpora.get(name) for model in (quality.models[0], expert))
    if before is None or after is None or after.perplexity_ratio is None:
        return None
    return before, after


def _from_manifest(rule: Rule, manifest: Manifest | NeuronManifest | None) -> Aspect:
    """Return what pruning itself measured on held-out documents.

    It has no interval, so it may speak against shipping, but the rule cannot find it fine.
    """
    found = {} if manifest is None else manifest.measurements.get("held_out", {})
    values = [found.get(f"perplexity_{name}") for name in ("before", "after", "ratio")]
    if not all(isinstance(value, int | float) for value in values):
        return _unknown(rule.aspect, rule.text)
    before, after, ratio = (float(value or 0) for value in values)
    status, word = rule.judge(ratio, ratio)
    if status == "ok":
        status, word = "look", f"{word}, by a number without an interval"
    fact = Fact(
        "perplexity, measured while pruning, without an interval",
        f"{before:.2f}",
        f"{after:.2f}",
        change(ratio, ratio, ratio),
    )
    return Aspect(rule.aspect, status, word, (fact,), rule.text)


def _speed(suites: Sequence[Suite]) -> Aspect:
    chosen = [(suite, one) for suite in suites for base in _SPEEDS for one in _deepest(suite, base)]
    return _compared(SPEED, chosen, suites, ("faster", "slower"))


def _memory(suites: Sequence[Suite]) -> Aspect:
    chosen = [(suite, one) for suite in suites for one in _deepest(suite, _PEAK)]
    return _compared(MEMORY, chosen, suites, ("less", "more"))


def _deepest(suite: Suite, base: str) -> Sequence[Comparison]:
    """Return a metric at the largest length that it was measured at."""
    found = [one for one in suite.comparisons if metric_base(one.metric) == base]
    return sorted(found, key=lambda one: metric_tokens(one.metric) or 0)[-1:]


def _compared(
    name: str,
    chosen: Sequence[tuple[Suite, Comparison]],
    suites: Sequence[Suite],
    words: tuple[str, str],
) -> Aspect:
    failed = tuple(
        Fact(suite_name(suite), "", "failed", reason)
        for suite in suites
        if (reason := suite.failure or suite.given_up) is not None
    )
    if not chosen:
        unknown = _unknown(name, TEXTS[name])
        return Aspect(name, unknown.status, unknown.word, failed, unknown.rule)
    facts = tuple(
        Fact(
            f"{metric_label(one)}, {suite_name(suite)}",
            amount(one.before.median, one.unit),
            amount(one.after.median, one.unit),
            f"{change(one.ratio.low, one.ratio.median, one.ratio.high)}, {one.verdict}",
        )
        for suite, one in chosen
    )
    found = [improved(one) for _, one in chosen if shown(one)]
    better, worse = words
    if not found:
        status, word = "look", chosen[0][1].verdict
    elif all(found):
        status, word = "ok", better if len(found) == len(chosen) else f"{better} in part"
    else:
        status, word = "look", worse if not any(found) else f"{better} and {worse}"
    if failed:
        status, word = "look", f"{word}; {counted(len(failed), 'runtime')} failed"
    return Aspect(name, status, word, (*failed, *facts), TEXTS[name])


def _size(evidence: Evidence) -> Aspect:
    facts, ratios = [], []
    for label, before, after, unit in _sizes(evidence):
        facts.append(
            Fact(label, _size_text(before, unit), _size_text(after, unit), _size_change(before, after))
        )
        ratios.append(after / before)
    if not facts:
        return _unknown(SIZE, TEXTS[SIZE])
    smaller = all(ratio < 1 for ratio in ratios)
    word = "smaller" if smaller else "not smaller" if min(ratios) >= 1 else "smaller in part"
    return Aspect(SIZE, "ok" if smaller else "look", word, tuple(facts), TEXTS[SIZE])


def _sizes(evidence: Evidence) -> Iterator[tuple[str, float, float, str]]:
    """Yield what is known of sizes: files first, since they are what is shipped."""
    kinds = dict.fromkeys(file.kind for file in evidence.artifacts)
    for kind in kinds:
        sizes = {file.side: file.file_bytes for file in evidence.artifacts if file.kind == kind}
        if sizes.get("before") and sizes.get("after"):
            yield f"file, {kind}", sizes["before"], sizes["after"], "bytes"
    for suite in () if kinds else evidence.suites:
        if suite.before.file_bytes and suite.after.file_bytes:
            yield f"file, {suite_name(suite)}", suite.before.file_bytes, suite.after.file_bytes, "bytes"
    manifest = evidence.manifest
    if manifest is not None:
        after = parameters_after(manifest)
        before = manifest.parameters_before if isinstance(manifest, Manifest) else after
        if before:
            yield "parameters", before, after, ""


def _size_text(value: float, unit: str) -> str:
    from serve.bench.table import format_count

    return amount(value, unit) if unit else format_count(value)


def _size_change(before: float, after: float) -> str:
    return change(after / before, after / before, after / before)
