"""What the pruned expert saves as the draft of its original, on its own subject and on other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

from experts import EXPERTS, SMOLLM2, Part, read_part
from measuring import UNITS, Bench, Job, Ledger, Options, Row
from quality import DEFAULT, planned
from serve_client import Answer, ask
from serve_target import Subject, engine_versions, export, median, num_threads, serving, spread
from speculation import acceptance_of, break_even, num_passes, speed_up

from cusprun.errors import MeasurementError

TABLE = "draft"
RATIO, QUANT = 0.5, "q8_0"
CONTEXT_TOKENS = 1024
_OTHER_TEXT_WORDS = 40
_ALONE, _DRAFTED, _EXPERT = "alone", "drafted", "expert"


@dataclass(frozen=True)
class Size:
    """Prompts of each kind, and the longest answer in tokens."""

    prompts: int = 16
    new_tokens: int = 96


class Files:
    """Original and expert as GGUF files, made when they are first asked for."""

    def __init__(self, bench: Bench, scratch: Path) -> None:
        self._bench = bench
        self._scratch = scratch

    @cached_property
    def original(self) -> Path:
        """The model whose answers are wanted."""
        return export(self._bench.index.folder, "gguf", QUANT, self._scratch / "original")

    @cached_property
    def expert(self) -> Path:
        """The model that drafts."""
        plan = planned(self._bench, RATIO, DEFAULT.rule, UNITS)
        with self._bench.expert_of(plan, DEFAULT.settings(self._bench.index.family)) as folder:
            return export(folder, "gguf", QUANT, self._scratch / "expert")


def fill(_subject: Subject, options: Options, ledger: Ledger) -> None:
    """Make a row for each kind of prompts."""
    size = Size(prompts=2, new_tokens=8) if options.smoke else Size()
    expert = options.expert(EXPERTS["english-maths"])
    bench = Bench.of(SMOLLM2, expert, options, options.scratch / TABLE)
    files = Files(bench, options.scratch / TABLE)
    jobs = [
        Job(
            bench.key(TABLE, kind, prompts, RATIO, QUANT, repr(size), num_threads()),
            {"kind": kind},
            partial(_row, files, prompts, size),
        )
        for kind, prompts in prompts_of(options.data, size).items()
    ]
    ledger.finish(TABLE, jobs, dict, fresh=options.fresh, show=_shown)


def prompts_of(data: Path, size: Size) -> Mapping[str, list[str]]:
    """Return questions of the expert's subject, and beginnings of paragraphs that it is not for."""
    questions = read_part(Part("gsm8k/test", "question", size.prompts, "domain"), data)
    paragraphs = read_part(Part("xquad/en.test", "paragraph", size.prompts, "general"), data)
    return {
        "maths questions": [document.text for document in questions],
        "encyclopedia paragraphs": [
            " ".join(document.text.split()[:_OTHER_TEXT_WORDS]) for document in paragraphs
        ],
    }


def _row(files: Files, prompts: Sequence[str], size: Size) -> Row:
    return {**compare(files.original, files.expert, prompts, size), "engines": engine_versions()}


def compare(original: Path, expert: Path, prompts: Sequence[str], size: Size) -> Row:
    """Ask the original with the draft and without, and the expert by itself, in turns."""
    plain = ("--engine", "llamacpp", "--parallel", "1", "--context", str(CONTEXT_TOKENS))
    starts = {
        _ALONE: (original, plain),
        _DRAFTED: (original, (*plain, "--draft", str(expert))),
        _EXPERT: (expert, plain),
    }
    with ExitStack() as servers:
        ports = {
            side: servers.enter_context(serving(artifact, *options)).port
            for side, (artifact, options) in starts.items()
        }
        for port in ports.values():
            _answer(port, "Once upon a time", size)  # the first answer is slower
        answers: dict[str, list[Answer]] = {side: [] for side in ports}
        for number, prompt in enumerate(prompts):
            order = list(ports)
            turn = number % len(order)
            for side in (*order[turn:], *order[:turn]):
                answers[side].append(_answer(ports[side], prompt, size))
    return {**asdict(size), "threads": num_threads(), **measured(answers), **drafting(answers)}


def _answer(port: int, prompt: str, size: Size) -> Answer:
    answer = ask(port, prompt, size.new_tokens, cache_prompt=False)
    if answer.status != 200 or not answer.timings:
        raise MeasurementError(f"llama.cpp answered {answer.status} without timings: {answer.text[:200]}")
    return answer


def measured(answers: Mapping[str, Sequence[Answer]]) -> Row:
    """Return tokens per second of whole requests with and without the draft, prompt by prompt."""
    rates = {side: [a.num_tokens / a.seconds for a in answers[side]] for side in (_ALONE, _DRAFTED)}
    pairs = list(zip(answers[_ALONE], answers[_DRAFTED], strict=True))
    return {
        "alone_tokens_per_second": median(rates[_ALONE]),
        "drafted_tokens_per_second": median(rates[_DRAFTED]),
        "speed_up": spread([b / a for a, b in zip(rates[_ALONE], rates[_DRAFTED], strict=True)]),
        "texts": len(pairs),
        "equal_texts": sum(alone.text == drafted.text for alone, drafted in pairs),
    }


def drafting(answers: Mapping[str, Sequence[Answer]]) -> Row:
    """Return what was guessed and kept, and the speed-up that is expected of it; see ``speculation.py``."""
    totals = {
        side: {name: sum(a.timings.get(name, 0) for a in answers[side]) for name in _COUNTED}
        for side in answers
    }
    drafted = totals[_DRAFTED]
    guesses, kept = drafted["draft_n"], drafted["draft_n_accepted"]
    token_ms = {side: total["predicted_ms"] / total["predicted_n"] for side, total in totals.items()}
    cost_ratio = token_ms[_EXPERT] / token_ms[_ALONE]
    passes = num_passes(drafted["predicted_n"], len(answers[_DRAFTED]), kept)
    row: Row = {"guesses": guesses, "guesses_kept": kept, "passes": passes, "cost_ratio": cost_ratio}
    if not guesses or passes < 1:
        return row
    num_drafted = guesses / passes
    acceptance = acceptance_of(kept / guesses, num_drafted)
    return {
        **row,
        "guesses_per_pass": num_drafted,
        "acceptance": acceptance,
        "expected_speed_up": speed_up(acceptance, num_drafted, cost_ratio),
        "break_even_acceptance": break_even(num_drafted, cost_ratio),
    }


_COUNTED = ("predicted_n", "predicted_ms", "draft_n", "draft_n_accepted")
"""What llama.cpp counts in an answer's ``timings``; the last two only with a draft."""


def _shown(row: Row) -> str:
    return f"{row['guesses_kept']} of {row['guesses']} guesses kept, × {row['speed_up']['median']:.2f}"


def to_markdown(table: Row) -> str:
    """Render the rows."""
    rows = list(table["rows"].values())
    lines = [
        f"**The maths expert (ratio {RATIO:g}) as the draft of its original, SmolLM2, both {QUANT}**",
        "",
        "| prompts | tokens/s without | with draft | speed-up by prompts (95 %) | guesses kept "
        "| acceptance a | guesses per pass k | cost c | expected speed-up | pays from a = | same text |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        faster = row["speed_up"]
        lines.append(
            f"| {row['kind']} | {row['alone_tokens_per_second']:.1f} "
            f"| {row['drafted_tokens_per_second']:.1f} "
            f"| {faster['median']:.2f} ({faster['low']:.2f} to {faster['high']:.2f}) "
            f"| {row['guesses_kept']} of {row['guesses']} | {_number(row, 'acceptance')} "
            f"| {_number(row, 'guesses_per_pass')} | {row['cost_ratio']:.2f} "
            f"| {_number(row, 'expected_speed_up')} | {_number(row, 'break_even_acceptance')} "
            f"| {row['equal_texts']} of {row['texts']} |"
        )
    lines += ["", *(f"On {row['kind']} the draft {_pays(row)}." for row in rows), ""]
    lines += [
        f"{rows[0]['texts']} prompts of each kind, up to {rows[0]['new_tokens']} tokens, temperature 0, one "
        f"client, {rows[0]['threads']} threads; whole requests, the reading of the prompt included."
    ]
    return "\n".join(lines) + "\n"


def _number(row: Row, name: str) -> str:
    return "–" if row.get(name) is None else f"{row[name]:.2f}"


def _pays(row: Row) -> str:
    faster = row["speed_up"]
    if faster["low"] > 1:
        return "pays"
    return "does not pay" if faster["high"] < 1 else "changes nothing that can be told from chance"
