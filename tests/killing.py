"""A program whose forks score and prune a tiny model and are killed on the way, each at its own event.

Forks start with everything imported and nothing computed, so that one takes a fraction of a second. An event
is a write to a stream or a file, half of such a write, a rename or a removal.

    python killing.py MODEL FOLDER TARGET EVERY FIRST

leaves an undisturbed run in ``FOLDER/whole``, and in ``FOLDER/N``, for every EVERY-th event N from the FIRST,
what became of a run that was killed at its event N, begun again, killed as many events before the last one of
an undisturbed run if it came so far, and begun again. The last line that it prints is JSON: the events of the
undisturbed run and, by N, how many runs were killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device_checks import CORPORA, EXPERT
from transformers.models.llama import modeling_llama  # noqa: F401 - or each fork would read it

from cusprun.cache import fresh_output
from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.pruning import fitted_blocks, refit_walk, score_walk
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.planner import make_plan
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.walk.batches import make_batches
from cusprun.walk.spill import Spill
from cusprun.walk.workspace import Workspace

BATCH_TOKENS = 120


def prune(model: Path, root: Path, target: str) -> None:
    """Leave a store and an expert in ``root``, going on from what is there."""
    torch.set_num_threads(1)
    index = open_checkpoint(model)
    digest, workspace = model_hash(index), Workspace(folder=root / "unfinished")
    store = root / "store"
    if not store.exists():
        fresh_output(store)
        score_model(index, CORPORA, store, model_hash=digest, corpus_hash="corpus", workspace=workspace)
    if (root / "out").exists():
        return
    write_expert(
        index,
        make_plan(index, open_store(store), model_hash=digest, ratio=0.3, units=("ffn_channel", "block")),
        fresh_output(root / "out"),
        corpora=CORPORA,
        provenance=Provenance("tiny", digest, "corpus", EXPERT, {"score": 1.0}),
        settings=RefitSettings(revise=True, anchors=20, target=target),
        workspace=workspace,
    )


class Events:
    """Counts events, and kills the process at the one of number ``last``."""

    def __init__(self, last: int | None) -> None:
        self.count = 0
        self._last = last

    def happen(self) -> None:
        self.count += 1
        if self.count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            self.happen()
            return own(*args, **options)

        setattr(owner, name, call)

    def install(self) -> None:
        for owner, name in (
            (Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "mkdir"),
            (shutil, "rmtree"), (shutil, "copyfile"),
        ):  # fmt: skip
            self.before(owner, name)
        write, write_bytes, write_tensors = Spill.write, Path.write_bytes, fitted_blocks.write_tensors

        def half_rows(spill: Spill, batch: int, rows: torch.Tensor) -> None:
            self.happen()
            torn = rows.clone()
            torn[..., torn.shape[-1] // 2 :] = torch.nan
            write(spill, batch, torn)
            self.happen()
            write(spill, batch, rows)

        def half_bytes(path: Path, data: bytes) -> int:
            write_bytes(path, data[: len(data) // 2])
            self.happen()
            return write_bytes(path, data)

        def half_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
            path.write_bytes(b"half of a header")
            write_tensors(path, tensors)

        Spill.write, Path.write_bytes = half_rows, half_bytes  # type: ignore[method-assign, assignment]
        fitted_blocks.write_tensors = half_tensors  # type: ignore[assignment]
        for module in (score_walk, refit_walk):
            module.make_batches = lambda texts, _tokens: make_batches(texts, BATCH_TOKENS)  # type: ignore


def in_a_fork(work: Callable[[Events], None], last: int | None) -> bool:
    """Do work in a fork; return whether it was killed. Any other failure is one of this program."""
    child = os.fork()
    if not child:
        events = Events(last)
        events.install()
        try:
            work(events)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert status == 0, f"a run failed with status {status}"
    return False


def main(model: Path, folder: Path, target: str, every: int, first: int) -> None:
    def whole(events: Events) -> None:
        prune(model, folder / "whole", target)
        (folder / "events").write_text(str(events.count))

    folder.mkdir()
    in_a_fork(whole, None)
    total = int((folder / "events").read_text())
    killed: dict[int, int] = {}
    for number in range(first, total + 1, every):
        root = folder / str(number)
        root.mkdir()

        def again(_events: Events, root: Path = root) -> None:
            prune(model, root, target)

        killed[number] = sum(in_a_fork(again, last) for last in (number, total - number, None))
    print(json.dumps({"events": total, "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
