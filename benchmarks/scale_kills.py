"""Table ``kills``: prunes that are killed at random moments and begun again, compared byte by byte.

Each prune is a process that is forked with all modules loaded, so that a kill falls on the work and hardly
ever on the start. It has a cache of its own, which holds its work, and one thread, so that sums are added in
one order.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measuring import Job, Ledger, Options, Row
from scale_model import TINY, Config, cut_to, expert_file, model_folder, random_model
from scale_parts import RATIO, asked_for, verdict, wanted

from cusprun.codec import key_of
from cusprun.errors import CusprunError
from cusprun.resolve import StrPath

TABLE = "kills"
KILLS = 10
ROWS = 5
DOCUMENTS = 12
TOKENS = 96
_EPOCH = "1700000000"
_TIMEOUT_S = 300
_PRELOADED = (
    "__main__",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "cusprun.pipeline.stages",
    "cusprun.pipeline.search",
    "cusprun.pruning.folder",
    "cusprun.pruning.planner",
)
_GOES_ON = "goes on after"
"""What a prune says that found finished layers."""


class RunError(CusprunError):
    """A prune of the benchmark's that was not killed has failed."""


def fill(options: Options, ledger: Ledger) -> None:
    """Make the rows that are missing."""
    if not asked_for(options, TABLE):
        return
    config, kills, count = (cut_to(TINY, 3), 2, 1) if options.smoke else (TINY, KILLS, ROWS)
    jobs = [
        Job(
            key_of(seed, kills, config, DOCUMENTS, TOKENS),
            {"kills": f"{seed * kills + 1} to {(seed + 1) * kills}"},
            partial(_row, options.scratch, config, kills, seed),
        )
        for seed in range(count)
    ]
    ledger.finish(TABLE, jobs, dict, fresh=options.fresh, show=_shown, wanted=wanted(options, TABLE))


def _row(scratch: Path, config: Config, kills: int, seed: int) -> Row:
    model = random_model(model_folder(scratch, "tiny", config), config)
    expert = expert_file(scratch / TABLE / "corpus", DOCUMENTS, TOKENS)
    root = scratch / TABLE / f"seed-{seed}"
    _Prune(model, expert, root / "warm-up").run()
    whole = _Prune(model, expert, root / "undisturbed")
    seconds = whole.run()
    expected = whole.digests()
    moments = random.Random(seed)
    equal = continued = done = attempts = 0
    while done < kills:
        attempts += 1
        prune = _Prune(model, expert, root / f"attempt-{attempts}")
        if not prune.killed_after(moments.uniform(0.0, seconds)):
            continue  # it was done before
        done += 1
        prune.run()
        equal += prune.digests() == expected
        continued += prune.has_continued()
    return {
        "killed": done,
        "identical": equal,
        "continued": continued,
        "files": len(expected),
        "layers": config["num_hidden_layers"],
        "undisturbed_seconds": round(seconds, 2),
    }


class _Prune:
    """One prune, that may be killed and run again; its files are in a folder of its own."""

    def __init__(self, model: Path, expert: Path, folder: Path) -> None:
        self._folder = folder
        self._inputs = (model, expert)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))

    def run(self) -> float:
        """Prune to the end and return the seconds; raises :class:`RunError` when that fails."""
        process, working = self._started()
        started = time.monotonic()
        process.join(_TIMEOUT_S)
        working.close()
        if process.exitcode != 0:
            process.kill()
            raise RunError(f"a prune ended with {process.exitcode}; see {self._log}")
        return time.monotonic() - started

    def killed_after(self, seconds: float) -> bool:
        """Prune, and kill that so many seconds after its work began; False when it was done by then."""
        process, working = self._started()
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join(_TIMEOUT_S)
        working.close()
        return process.exitcode == -signal.SIGKILL

    def _started(self) -> tuple[Any, Connection]:
        """Start a process and wait until it begins to work."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_prune, args=(sender, *self._inputs, self._folder, self._log))
        process.start()
        sender.close()
        receiver.recv()
        return process, receiver

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def has_continued(self) -> bool:
        """Return whether the last run found finished layers."""
        return _GOES_ON in self._log.read_text(encoding="utf-8")

    def digests(self) -> Mapping[str, str]:
        """Return the hash of each file of the output, and of what was left behind, by name."""
        return {
            str(path.relative_to(self._folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for part in ("out", "cache/work")
            for path in sorted((self._folder / part).rglob("*"))
            if path.is_file()
        }


def _prune(working: Connection, model: StrPath, expert: StrPath, folder: Path, log: Path) -> None:
    """Prune in this process, which has been forked for that."""
    import torch

    import cusprun

    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=log, filemode="w", level=logging.INFO, force=True)
    os.environ.update(CUSPRUN_CACHE=str(folder / "cache"), SOURCE_DATE_EPOCH=_EPOCH)
    torch.set_num_threads(1)
    working.send(None)
    cusprun.prune(model, expert, folder / "out" / "expert", ratio=RATIO)


def _shown(row: Row) -> str:
    return f"{row['identical']} of {row['killed']} identical, {row['continued']} found finished layers"


def to_markdown(table: Row) -> str:
    """Render the table."""
    rows: Sequence[Row] = list(table["rows"].values())
    killed, identical, continued = (
        sum(row[name] for row in rows) for name in ("killed", "identical", "continued")
    )
    seconds = sorted(row["undisturbed_seconds"] for row in rows)
    return (
        f"A prune of a model of {rows[0]['layers']} blocks was killed (`SIGKILL`) {killed} times at random "
        f"moments of the {seconds[0]:.1f} to {seconds[-1]:.1f} s that it takes undisturbed, each time with "
        f"new folders, and given again. {identical} of {killed} results are equal to an undisturbed run's in "
        f"every byte of their {rows[0]['files']} files: {verdict(identical == killed)}. {continued} of them "
        "found finished layers.\n"
    )
