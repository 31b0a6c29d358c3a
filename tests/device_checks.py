"""What the tests of devices share: documents, a listener, a device that is full, folders compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCAB, documents

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.progress import Advance
from cusprun.pruning.planner import make_plan
from cusprun.pruning.store import open_store
from cusprun.records import Corpora, Expert, Plan, TokenizedDocument

LONG = TokenizedDocument("task", "long", tuple(number % VOCAB for number in range(7, 117)))
CORPORA = Corpora((*documents(8, 0, "domain"), *documents(6, 1, "task"), LONG), documents(3, 2))
"""With one document long enough for the impacts of its queries and keys to be estimated."""
EXPERT = Expert("tiny", {"domain": (), "task": ()})


class Heard:
    """A listener that keeps the names of the stages, in order, and the seconds of those that ended well."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "") -> Iterator[Advance]:
        self.stages.append(name)
        started = time.monotonic()
        yield lambda _done: None
        self.seconds[name] = time.monotonic() - started


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: int, after: int = 0
) -> list[int]:
    """Let calls of a function fail as a full device does: ``times`` in a row after the first ``after``.

    Returns a list whose one entry counts the calls.
    """
    own: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if after < calls[0] <= after + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return own(*args, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


def planned(index: CheckpointIndex, store: Path, rule: str = "mean", model_hash: str = "m") -> Plan:
    return make_plan(
        index,
        open_store(store),
        model_hash=model_hash,
        ratio=0.4,
        rule=rule,
        targets=("gguf:f16",),
        units=(),
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}: {name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_close_entries(found: Path, wanted: Path, relative: float = 1e-5, of_largest: float = 1e-6) -> None:
    """Compare entry by entry: ``relative`` to itself and ``of_largest`` to the largest of its array."""
    ours, theirs = tensors_of(found), tensors_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        allowed = of_largest * float(theirs[name].abs().max())
        torch.testing.assert_close(
            tensor,
            theirs[name],
            rtol=relative,
            atol=allowed,
            msg=lambda text, name=name: f"{name}: {text}",  # type: ignore[misc]
        )


def assert_close_norms(found: Path, wanted: Path, relative: float) -> None:
    """Compare tensor by tensor: the norm of the difference to the norm."""
    ours, theirs = tensors_of(found), tensors_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        apart, norm = (tensor.double() - theirs[name].double()).norm(), theirs[name].double().norm()
        assert apart <= relative * norm, f"{name} is {apart:.1e} apart, of {norm:.1e}"
