"""How many tokens a GGUF file gives several clients: cusprun serve against llama-cpp-python's server.

The load comes from outside, vLLM's `vllm bench serve`, and each server is started for each run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from measuring import Job, Ledger, Options, Row
from serve_target import (
    NAME,
    SEED,
    Served,
    Subject,
    engine_versions,
    median,
    num_threads,
    running,
    serving,
    spread,
    verdict,
)

from cusprun.codec import key_of
from cusprun.errors import MeasurementError
from serve.runtimes.vllm_process import environment, find_python

TABLE = "gguf"
TARGETS = {8: 2.0}
"""How many times the other server's tokens per second are wanted, by clients."""
CONTEXT_TOKENS = 512
_LOAD = Path(__file__).with_name("serve_load.py")
_NEEDED = {
    "uvicorn": "uvicorn",
    "fastapi": "fastapi",
    "sse_starlette": "sse-starlette",
    "pydantic_settings": "pydantic-settings",
    "starlette_context": "starlette-context",
}
"""What llama-cpp-python's server imports, and the distributions that have it."""


@dataclass(frozen=True)
class Size:
    """Rounds, requests for each client, and their lengths in tokens."""

    rounds: int = 3
    requests_per_client: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64


def fill(subject: Subject, options: Options, ledger: Ledger) -> None:
    """Make a row for each number of clients."""
    size = Size(rounds=1, requests_per_client=1, prompt_tokens=16, new_tokens=8) if options.smoke else Size()
    jobs = [
        Job(
            # What was not measured for want of a package is measured once it is there.
            key_of(TABLE, subject.opened.model_hash, repr(size), clients, num_threads(), missing()),
            {"clients": clients},
            partial(compare, subject.gguf, subject.folder, clients, size),
        )
        for clients in (1, 8)
    ]
    ledger.finish(TABLE, jobs, dict, fresh=options.fresh, show=_shown)


def missing() -> list[str]:
    """Return the distributions that llama-cpp-python's server needs and that are not installed."""
    return [name for module, name in _NEEDED.items() if find_spec(module) is None]


def compare(gguf: Path, tokenizer: Path, clients: int, size: Size) -> Row:
    """Send the same load to both servers in turns; to cusprun's alone where the other cannot run."""
    sides: dict[str, Callable[[Path], AbstractContextManager[Served]]] = {"cusprun": _ours}
    if not missing():
        sides["llama_cpp.server"] = _theirs
    runs: dict[str, list[Row]] = {side: [] for side in sides}
    for number in range(size.rounds):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            with sides[side](gguf) as served:
                runs[side].append(send(served, tokenizer, clients, size, SEED + number))
    row: Row = {"threads": num_threads(), **size.__dict__, "missing": missing(), "runs": runs}
    row["engines"] = engine_versions()
    if len(sides) > 1:
        rates = [[run["output_throughput"] for run in runs[side]] for side in sides]
        row["rate_ratio"] = spread([ours / theirs for ours, theirs in zip(*rates, strict=True)])
    return row


@contextmanager
def _ours(gguf: Path) -> Iterator[Served]:
    with serving(gguf, "--parallel", "8", "--context", str(CONTEXT_TOKENS)) as served:
        yield served


@contextmanager
def _theirs(gguf: Path) -> Iterator[Served]:
    threads = str(num_threads())
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--model_alias", NAME,
        "--host", "127.0.0.1", "--port", "{port}", "--n_ctx", str(CONTEXT_TOKENS),
        "--n_threads", threads, "--n_threads_batch", threads,
        # A request would end the one before it in the middle.
        "--interrupt_requests", "false",
    ]  # fmt: skip
    with running("llama_cpp.server", gguf, command, ready="/v1/models") as served:
        yield served


def send(served: Served, tokenizer: Path, clients: int, size: Size, seed: int) -> Row:
    """Send random prompts of vLLM's load generator and return what it measured.

    Raises:
        MissingDependencyError: there is no vLLM.
        MeasurementError: the generator failed, or an answer did.
    """
    num_requests = clients * size.requests_per_client
    with tempfile.TemporaryDirectory(prefix="cusprun-load-") as folder:
        command = [
            str(find_python()), str(_LOAD), "--backend", "openai", "--endpoint", "/v1/completions",
            "--base-url", served.url, "--model", NAME, "--tokenizer", str(tokenizer), "--seed", str(seed),
            "--dataset-name", "random", "--random-input-len", str(size.prompt_tokens),
            "--random-output-len", str(size.new_tokens), "--num-prompts", str(num_requests),
            "--max-concurrency", str(clients), "--num-warmups", str(clients), "--temperature", "0",
            "--disable-tqdm", "--save-result", "--result-dir", folder, "--result-filename", "run.json",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=environment("unused"), cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise MeasurementError(f"vLLM's load generator failed: {done.stderr.strip()[-600:]}")
        found = json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))
    if found["failed"] or found["completed"] != num_requests:
        raise MeasurementError(
            f"{found['completed']} of {num_requests} requests were answered; the load generator says: "
            f"{done.stdout.strip()[-600:]}"
        )
    kept = ("duration", "completed", "total_output_tokens", "output_throughput", "median_ttft_ms")
    return {name: found[name] for name in kept}


def _shown(row: Row) -> str:
    rates = ", ".join(f"{side} {_rate(runs):.0f} tokens/s" for side, runs in row["runs"].items())
    return rates + (f"; not installed: {', '.join(row['missing'])}" if row["missing"] else "")


def _rate(runs: list[Row]) -> float:
    return median([run["output_throughput"] for run in runs])


def to_markdown(table: Row) -> str:
    """Render the rows."""
    rows = list(table["rows"].values())
    lines = [
        "**GGUF (Q4_1): cusprun serve against llama_cpp.server**",
        "",
        "| clients | cusprun, tokens/s | llama_cpp.server, tokens/s | times as many (range of rounds) "
        "| target |",
        "|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        clients, runs = row["clients"], row["runs"]
        line = f"| {clients} | {_rate(runs['cusprun']):.0f} "
        if "rate_ratio" not in row:
            lines.append(f"{line}| not measured | – | – |")
            continue
        ratio, target = row["rate_ratio"], TARGETS.get(clients)
        wanted = f"{target:g} or more: {verdict(ratio['median'] >= target)}" if target else "–"
        lines.append(
            f"{line}| {_rate(runs['llama_cpp.server']):.0f} | {ratio['median']:.2f} "
            f"({min(ratio['values']):.2f} to {max(ratio['values']):.2f}) | {wanted} |"
        )
    size = rows[0]
    lines += [
        "",
        f"Load of vLLM's `vllm bench serve`: random prompts of {size['prompt_tokens']} tokens, up to "
        f"{size['new_tokens']} new ones, requests for each client: {size['requests_per_client']}. Medians "
        f"of {size['rounds']} rounds in alternating order, a server started for each; threads: "
        f"{size['threads']}.",
    ]
    if size["missing"]:
        lines += ["", f"Not measured: llama_cpp.server needs `pip install {' '.join(size['missing'])}`."]
    return "\n".join(lines) + "\n"
