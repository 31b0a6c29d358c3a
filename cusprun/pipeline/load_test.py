"""The load test of endpoints that speak OpenAI's interface."""

from __future__ import annotations

import asyncio
import datetime
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from cusprun.errors import CorpusError, UserError
from cusprun.paths import expand_home, path_text
from cusprun.progress import SILENT, Progress
from cusprun.resolve import StrPath
from cusprun.version import __version__

if TYPE_CHECKING:
    from cusprun.progress import Advance
    from serve.bench.endpoint.collect import Workload
    from serve.bench.endpoint.prompts import Prompts
    from serve.bench.endpoint.records import Endpoint, EndpointReport, LevelRun, LoadOptions
    from serve.bench.endpoint.tokens import Tokens

PROMPT_PACK = "general/en"
"""Plain English, which every tokenizer was made for."""

_PROMPT_FIELDS = ("prompt", "text")


def load_test(
    urls: Sequence[str],
    options: LoadOptions | None = None,
    progress: Progress = SILENT,
    *,
    api_key: str | None = None,
    prompts: StrPath | None = None,
    tokenizer: StrPath | None = None,
) -> EndpointReport:
    """Load endpoints and measure how fast they answer; several are interleaved and compared with the first.

    ``urls`` are base URLs like ``http://127.0.0.1:8000/v1``; ``api_key`` goes to all of them. ``prompts`` is
    a file of rows with a field ``prompt`` or ``text``; without it, prompts are made of English text that
    ships with cusprun. ``tokenizer``, a ``tokenizer.json`` or a folder with one, makes the prompts exactly as
    long as asked and counts the tokens of answers without ``usage``. An interrupt (Ctrl-C) after the first
    level gives the report of what had ended.

    Requests that fail are records of the report, never exceptions.

    Raises:
        UserError: a URL is none or holds credentials, or an endpoint cannot be reached, wants a key, or
            refuses every way to ask.
        ConfigError: an option cannot be.
        CorpusError: the file of prompts is missing or bad.
        ModelError: the tokenizer cannot be read.
        MissingDependencyError: aiohttp is not installed.
    """
    from serve.bench.endpoint.collect import Workload
    from serve.bench.endpoint.records import LoadOptions
    from serve.bench.endpoint.table import PACK
    from serve.bench.endpoint.tokens import load_tokens
    from serve.bench.endpoint.transport import base_url, check_key, require_aiohttp

    asked = options or LoadOptions()
    asked.check()
    bases = [base_url(url) for url in urls]
    if not bases:
        raise UserError("there is no endpoint to load; give at least one URL")
    key = check_key(api_key)
    require_aiohttp()
    tokens = None if tokenizer is None else load_tokens(expand_home(path_text(tokenizer)))
    work = Workload(asked, _prompts(prompts, asked, tokens), None if tokens is None else tokens.count)
    seen = _Seen()
    started = time.perf_counter()
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    is_complete = True
    total = asked.requests * len(asked.levels) * asked.num_rounds(len(bases)) * len(bases)
    try:
        with progress.stage("load test", total, "request") as advance:
            asyncio.run(_measure(bases, key, work, seen, advance))
    except KeyboardInterrupt:
        if not seen.runs:
            raise
        is_complete = False
    return _report(
        seen,
        asked,
        created=created,
        prompts=f"{PACK}{PROMPT_PACK}" if prompts is None else Path(prompts).name,
        tokenizer=None if tokenizer is None else Path(tokenizer).name,
        elapsed_s=time.perf_counter() - started,
        is_complete=is_complete,
    )


class _Seen:
    """What a load test has found so far; it outlives an interrupt."""

    def __init__(self) -> None:
        self.endpoints: tuple[Endpoint, ...] = ()
        self.runs: list[LevelRun] = []


async def _measure(
    bases: Sequence[str], key: str | None, work: Workload, seen: _Seen, advance: Advance
) -> None:
    from serve.bench.endpoint.collect import collect
    from serve.bench.endpoint.probe import open_client
    from serve.bench.endpoint.transport import HttpTransport, http_session

    async with http_session() as session:
        clients = [
            await open_client(HttpTransport(session, base, key), base, work.options, time.perf_counter, key)
            for base in bases
        ]
        seen.endpoints = tuple(client.endpoint for client in clients)
        await collect(clients, work, seen.runs.append, advance)


def _report(
    seen: _Seen,
    options: LoadOptions,
    *,
    created: str,
    prompts: str,
    tokenizer: str | None,
    elapsed_s: float,
    is_complete: bool,
) -> EndpointReport:
    from serve.bench.endpoint.records import EndpointReport
    from serve.bench.endpoint.summary import compare_endpoints, level_results

    return EndpointReport(
        created=created,
        options=options,
        prompts=prompts,
        tokenizer=tokenizer,
        client={
            "cusprun": __version__,
            "python": platform.python_version(),
            "aiohttp": metadata.version("aiohttp"),
            "operating_system": platform.platform(terse=True),
        },
        endpoints=seen.endpoints,
        runs=tuple(seen.runs),
        results=level_results(seen.runs, options),
        comparisons=compare_endpoints(seen.runs, len(seen.endpoints), options.seed),
        elapsed_s=elapsed_s,
        is_complete=is_complete,
    )


def _prompts(path: StrPath | None, options: LoadOptions, tokens: Tokens | None) -> Prompts:
    from cusprun.corpus import read_pack
    from cusprun.corpus.readers import read_file
    from serve.bench.endpoint.prompts import GivenPrompts, TextPrompts

    if path is None:
        texts = [str(row.fields["text"]) for row in read_pack(PROMPT_PACK)]
        return TextPrompts(texts, options.prompt_tokens, options.seed, None if tokens is None else tokens.cut)
    found = []
    for row in read_file(expand_home(path_text(path))):
        text = next((row.fields[name] for name in _PROMPT_FIELDS if name in row.fields), None)
        if not isinstance(text, str) or not text.strip():
            raise CorpusError(
                f"{row.place} has no text under {' or '.join(map(repr, _PROMPT_FIELDS))}; give it one"
            )
        found.append(text)
    return GivenPrompts(found, options.seed)
