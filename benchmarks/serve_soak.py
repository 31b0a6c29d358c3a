"""Many clients for a while: what each engine answers, forgets and keeps in memory."""

from __future__ import annotations

import random
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path

from measuring import Job, Ledger, Options, Row
from serve_client import Answer, ask, stream
from serve_target import SEED, Served, Subject, engine_versions, num_threads, serving, verdict, vllm_version

from cusprun.codec import key_of
from cusprun.corpus.packs import read_pack
from cusprun.errors import CusprunError, MeasurementError

TABLE = "soak"
MEMORY_TARGET = 0.02
"""How much more resident memory there may be afterwards, as a share of that before."""
ALLOWED = ("200", "429")
_SETTLE_S = 15.0
_IDLE_S = 120.0
_POLL_S = 0.5
_UNDER_WAY = "cusprun_requests_under_way "


@dataclass(frozen=True)
class Soaked:
    """An engine: which artifact of a subject it serves, with which options.

    ``promises_equal`` where a prompt's greedy text does not depend on who else is served: where prompts are
    computed one at a time. Sums of a batch are rounded otherwise than those of one row.
    """

    artifact: str
    options: tuple[str, ...]
    promises_equal: bool


ENGINES: Mapping[str, Soaked] = {
    "llamacpp": Soaked("gguf", ("--parallel", "8"), promises_equal=False),
    "onnx": Soaked("onnx", ("--parallel", "8"), promises_equal=True),
    "vllm": Soaked("folder", ("--", "--enforce-eager"), promises_equal=False),
    "transformers": Soaked("folder", (), promises_equal=True),
}


@dataclass(frozen=True)
class Size:
    """Clients, requests (those of the warm-up apart), and the prompts that they draw from."""

    clients: int = 32
    requests: int = 2000
    warm_up: int = 200
    prompts: int = 40
    fewest_words: int = 5
    most_words: int = 200
    most_new_tokens: int = 16
    left: float = 0.1
    context_tokens: int = 512


@dataclass(frozen=True)
class Prompt:
    """A text and the limit on its answer."""

    text: str
    new_tokens: int


@dataclass(frozen=True)
class Wish:
    """One request: which prompt, the limit on the answer, whether as a stream, and when the client leaves.

    ``leave_after`` are events with text; None where the client waits for the end.
    """

    prompt: int
    new_tokens: int
    is_stream: bool
    leave_after: int | None


@dataclass
class Tally:
    """What came back. ``others`` are the numbers of prompts whose answer was another than the one alone."""

    statuses: Counter[str] = field(default_factory=Counter)
    left: int = 0
    whole: int = 0
    equal: int = 0
    tokens: int = 0
    others: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def fill(subject: Subject, options: Options, ledger: Ledger) -> None:
    """Make a row for each engine."""
    size = Size(clients=4, requests=20, warm_up=4, prompts=4) if options.smoke else Size()
    jobs = [
        Job(
            key_of(TABLE, subject.opened.model_hash, repr(size), repr(soaked), name, num_threads()),
            {"engine": name},
            partial(_row, subject, name, soaked, size),
        )
        for name, soaked in ENGINES.items()
    ]
    ledger.finish(TABLE, jobs, dict, fresh=options.fresh, show=_shown)


def _row(subject: Subject, engine: str, soaked: Soaked, size: Size) -> Row:
    versions = {**engine_versions(), **(vllm_version() if engine == "vllm" else {})}
    artifact: Path = getattr(subject, soaked.artifact)
    return {**soak(artifact, engine, soaked, size), "engines": versions}


def soak(artifact: Path, engine: str, soaked: Soaked, size: Size) -> Row:
    """Ask each prompt alone, then all clients at once, and compare memory before and after."""
    prompts = make_prompts(size)
    options = ("--engine", engine, "--context", str(size.context_tokens), *soaked.options)
    with serving(artifact, *options) as served:
        alone = [_alone(served.port, prompt) for prompt in prompts]
        warm_up = wishes(prompts, size, size.warm_up, SEED + 1)
        send(served.port, prompts, alone, warm_up, size.clients)
        before = settled(served)
        started = time.monotonic()
        wanted = wishes(prompts, size, size.requests, SEED + 2)
        tally = send(served.port, prompts, alone, wanted, size.clients)
        seconds = time.monotonic() - started
        after = settled(served)
    return {
        **asdict(size),
        "promises_equal": soaked.promises_equal,
        "statuses": dict(sorted(tally.statuses.items())),
        "faults": tally.faults[:5],
        "clients_that_left": tally.left,
        "answers_compared": tally.whole,
        "answers_equal": tally.equal,
        "prompts_with_other_answers": len(tally.others),
        "before": before,
        "after": after,
        "resident_growth": after["resident_bytes"] / before["resident_bytes"] - 1,
        "requests_per_second": round(size.requests / seconds, 2),
        "tokens_per_second": round(tally.tokens / seconds, 1),
    }


def make_prompts(size: Size) -> list[Prompt]:
    """Return prompts of mixed lengths: runs of words of shipped texts, each from where the last one ended."""
    generator = random.Random(SEED)
    words = [word for row in read_pack("general/en") for word in str(row.fields["text"]).split()]
    found: list[Prompt] = []
    place = 0
    for _ in range(size.prompts):
        count = generator.randint(size.fewest_words, size.most_words)
        found.append(
            Prompt(" ".join(words[place : place + count]), generator.randint(1, size.most_new_tokens))
        )
        place += count
    assert place <= len(words), "the shipped texts are too short for so many prompts"
    return found


def wishes(prompts: Sequence[Prompt], size: Size, count: int, seed: int) -> Iterator[Wish]:
    """Yield requests: half of those that are waited for come as streams.

    A client that leaves asks for a long answer, so as to leave in the middle.
    """
    generator = random.Random(seed)
    for _ in range(count):
        prompt = generator.randrange(len(prompts))
        if generator.random() < size.left:
            yield Wish(prompt, size.most_new_tokens, True, generator.randint(1, 4))
        else:
            yield Wish(prompt, prompts[prompt].new_tokens, generator.random() < 0.5, None)


def _alone(port: int, prompt: Prompt) -> str:
    answer = ask(port, prompt.text, prompt.new_tokens)
    if answer.status != 200:
        raise MeasurementError(f"a single client was answered {answer.status}: {answer.text[:200]}")
    return answer.text


def send(
    port: int, prompts: Sequence[Prompt], alone: Sequence[str], wanted: Iterator[Wish], clients: int
) -> Tally:
    """Have so many clients send what is wanted, each its next request when the last one is answered."""
    tally = Tally()
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                wish = next(wanted, None)
            if wish is None:
                return
            text, limit = prompts[wish.prompt].text, wish.new_tokens
            try:
                if wish.is_stream:
                    answer = stream(port, text, limit, leave_after=wish.leave_after)
                else:
                    answer = ask(port, text, limit)
            except (OSError, HTTPException, ValueError, CusprunError) as error:
                answer = Answer(0, f"{type(error).__name__}: {error}")
            with lock:
                _count(tally, wish, answer, alone[wish.prompt])
            if answer.status == 429:
                time.sleep(1)  # what Retry-After says

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    return tally


def _count(tally: Tally, wish: Wish, answer: Answer, alone: str) -> None:
    tally.statuses[str(answer.status) if answer.status else "broken"] += 1
    tally.tokens += answer.num_tokens
    if str(answer.status) not in ALLOWED:
        tally.faults.append(answer.text[:200])
    elif answer.is_left:
        tally.left += 1
    elif answer.status == 200 and wish.leave_after is None:
        tally.whole += 1
        tally.equal += answer.text == alone
        tally.others.update([wish.prompt] if answer.text != alone else [])


def settled(served: Served) -> dict[str, int]:
    """Return the server's memory once it has been idle for 15 s; raises ``MeasurementError`` if it is not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _IDLE_S
    while time.monotonic() < deadline:
        with opener.open(f"{served.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        # A key's value in Prometheus' text format is the last word of its line.
        if all(line.split()[-1] == "0" for line in lines if line.startswith(_UNDER_WAY)):
            time.sleep(_SETTLE_S)
            return served.memory()
        time.sleep(_POLL_S)
    raise MeasurementError(f"requests were still under way {_IDLE_S:.0f} s after the last client was done")


def _shown(row: Row) -> str:
    return (
        f"{row['statuses']}, memory {row['resident_growth']:+.2%}, "
        f"{row['answers_equal']} of {row['answers_compared']} equal"
    )


def to_markdown(table: Row) -> str:
    """Render the rows."""
    rows = list(table["rows"].values())
    lines = [
        "**Many clients, all engines**",
        "",
        "| engine | answered | 429 | other | left midway | requests/s | resident memory before, MB "
        "| after | growth | same text as alone |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in rows:
        statuses = row["statuses"]
        other = sum(count for status, count in statuses.items() if status not in ALLOWED)
        growth = row["resident_growth"]
        equal, compared = row["answers_equal"], row["answers_compared"]
        promise = verdict(equal == compared) if row["promises_equal"] else "not promised"
        lines.append(
            f"| {row['engine']} | {statuses.get('200', 0):,} | {statuses.get('429', 0)} "
            f"| {other}: {verdict(not other)} | {row['clients_that_left']} "
            f"| {row['requests_per_second']:.1f} | {row['before']['resident_bytes'] / 1e6:.0f} "
            f"| {row['after']['resident_bytes'] / 1e6:.0f} "
            f"| {growth:+.2%}: {verdict(growth <= MEMORY_TARGET)} "
            f"| {equal:,} of {compared:,}: {promise} |"
        )
    size = rows[0]
    lines += [
        "",
        f"{size['clients']} clients, {size['requests']:,} requests after a warm-up of {size['warm_up']}: "
        f"{size['prompts']} prompts of {size['fewest_words']} to {size['most_words']} words, 1 to "
        f"{size['most_new_tokens']} tokens, temperature 0, half as streams; a share of {size['left']:g} "
        "leaves its stream in the middle. Memory is that of all processes of the server, idle, before and "
        f"after; growth up to {MEMORY_TARGET:.0%} is wanted.",
    ]
    return "\n".join(lines) + "\n"
