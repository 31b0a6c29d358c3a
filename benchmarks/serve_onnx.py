"""What cusprun's ONNX server costs one client, against a plain loop over onnxruntime-genai."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from measuring import Job, Ledger, Options, Row
from serve_client import Answer, stream
from serve_target import Subject, engine_versions, median, num_threads, serving, spread, verdict
from tokenizers import Tokenizer

from cusprun.codec import key_of
from cusprun.corpus.packs import read_pack
from cusprun.errors import MeasurementError

T = TypeVar("T")
TABLE = "onnx"
RATE_TARGET, FIRST_TARGET_MS = 0.97, 5.0
REST_S = 1.0
"""Pause before each answer: the threads of the side that was asked before spin on for a while, and the next
answer's first token came 35 ms later for it."""
_DIRECT = Path(__file__).with_name("serve_onnx_direct.py")


@dataclass(frozen=True)
class Size:
    """How much is asked: pairs of one request to each side, prompts, and their lengths in tokens."""

    pairs: int = 41
    prompts: int = 3
    prompt_tokens: int = 128
    new_tokens: int = 64


class Direct:
    """The loop, as a child that ends with its stdin."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def answer(self, token_ids: list[int], max_new_tokens: int) -> tuple[Answer, list[int]]:
        """Return times and the ids of the tokens that were made; raises ``MeasurementError``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"token_ids": token_ids, "max_new_tokens": max_new_tokens}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise MeasurementError("the loop over onnxruntime-genai ended; its error stands above")
        found = json.loads(line)
        made = found["token_ids"]
        return Answer(200, "", len(made), found["seconds"], found["first_s"]), made


@contextmanager
def direct_loop(folder: Path) -> Iterator[Direct]:
    """Start the loop with the same number of threads as the server."""
    command = [sys.executable, str(_DIRECT), str(folder), str(num_threads())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Direct(process)


def fill(subject: Subject, options: Options, ledger: Ledger) -> None:
    """Make the row."""
    size = Size(pairs=2, prompts=1, new_tokens=16) if options.smoke else Size()
    key = key_of(TABLE, subject.opened.model_hash, repr(size), num_threads())
    job = Job(key, {"engine": TABLE}, partial(_row, subject, size))
    ledger.finish(TABLE, [job], dict, fresh=options.fresh, show=_shown)


def _row(subject: Subject, size: Size) -> Row:
    return {**compare(subject.onnx, size), "engines": engine_versions()}


def long_prompts(direct: Direct, tokenizer: Tokenizer, size: Size) -> list[list[int]]:
    """Return the first tokens of shipped texts which the model goes on from to the limit.

    Raises:
        MeasurementError: there are too few of them.
    """
    found: list[list[int]] = []
    for row in read_pack("general/en"):
        ids = tokenizer.encode(str(row.fields["text"])).ids[: size.prompt_tokens]
        if len(ids) < size.prompt_tokens:
            continue
        if direct.answer(ids, size.new_tokens)[0].num_tokens == size.new_tokens:
            found.append(ids)
        if len(found) == size.prompts:
            return found
    raise MeasurementError(
        f"the model goes on for {size.new_tokens} tokens after {len(found)} of the shipped texts, and "
        f"{size.prompts} are wanted"
    )


def compare(folder: Path, size: Size) -> Row:
    """Ask both sides in turns, each the first in every other pair, and return the pairs' ratios.

    Raises:
        MeasurementError: the sides make different texts, so did not do the same work, or all are short.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs: list[tuple[Answer, Answer]] = []
    with direct_loop(folder) as direct, serving(folder, "--engine", "onnx", "--parallel", "1") as served:
        prompts = long_prompts(direct, tokenizer, size)
        for number in range(-1, size.pairs):  # the first warms both up and does not count
            prompt = prompts[number % len(prompts)]
            if number % 2:
                theirs, made = _rested(partial(direct.answer, prompt, size.new_tokens))
                ours = _rested(partial(stream, served.port, prompt, size.new_tokens))
            else:
                ours = _rested(partial(stream, served.port, prompt, size.new_tokens))
                theirs, made = _rested(partial(direct.answer, prompt, size.new_tokens))
            _require_same(ours, tokenizer.decode(prompt + made), len(made))
            if number >= 0:
                pairs.append((ours, theirs))
    return {
        "threads": num_threads(),
        "prompt_tokens": size.prompt_tokens,
        "new_tokens": size.new_tokens,
        "served_tokens_per_second": median([ours.decode_tokens_per_second for ours, _ in pairs]),
        "direct_tokens_per_second": median([theirs.decode_tokens_per_second for _, theirs in pairs]),
        "rate_ratio": spread(
            [ours.decode_tokens_per_second / theirs.decode_tokens_per_second for ours, theirs in pairs]
        ),
        "direct_first_ms": median([1000 * _first_s(theirs) for _, theirs in pairs]),
        "extra_first_ms": spread([1000 * (_first_s(ours) - _first_s(theirs)) for ours, theirs in pairs]),
    }


def _rested(ask: Callable[[], T]) -> T:
    time.sleep(REST_S)
    return ask()


def _first_s(answer: Answer) -> float:
    assert answer.first_s is not None
    return answer.first_s


def _require_same(ours: Answer, whole: str, num_made: int) -> None:
    if ours.status != 200:
        raise MeasurementError(f"the ONNX server answered {ours.status}: {ours.text[:200]}")
    if ours.num_tokens != num_made or not whole.endswith(ours.text):
        raise MeasurementError(
            f"the ONNX server made {ours.num_tokens} tokens and the loop over onnxruntime-genai {num_made}, "
            "or other ones; rates of different texts are not compared"
        )


def _shown(row: Row) -> str:
    return f"rate × {row['rate_ratio']['median']:.3f}, first + {row['extra_first_ms']['median']:.1f} ms"


def to_markdown(table: Row) -> str:
    """Render the row."""
    (row,) = table["rows"].values()
    rate, extra = row["rate_ratio"], row["extra_first_ms"]
    return (
        "**ONNX, one client: cusprun's server against a loop over onnxruntime-genai**\n\n"
        "| | in the loop | through the server | difference by pairs (95 %) | target |\n"
        "|---|---:|---:|---:|---|\n"
        f"| tokens per second | {row['direct_tokens_per_second']:.1f} "
        f"| {row['served_tokens_per_second']:.1f} "
        f"| × {rate['median']:.3f} ({rate['low']:.3f} to {rate['high']:.3f}) "
        f"| × {RATE_TARGET:g} or more: {verdict(rate['median'] >= RATE_TARGET)} |\n"
        f"| first token, ms | {row['direct_first_ms']:.1f} "
        f"| {row['direct_first_ms'] + extra['median']:.1f} "
        f"| {extra['median']:+.1f} ({extra['low']:+.1f} to {extra['high']:+.1f}) "
        f"| at most {FIRST_TARGET_MS:g} more: {verdict(extra['median'] <= FIRST_TARGET_MS)} |\n\n"
        f"{len(rate['values'])} pairs of the same prompt of {row['prompt_tokens']} tokens with "
        f"{row['new_tokens']} new ones, in turns, int4, {row['threads']} threads each. The loop, "
        "in a process of its own, keeps ids; the server makes text and sends it token by token. "
        f"{REST_S:g} s of rest before each answer.\n"
    )
