"""Measurements that are interrupted before a block and begun again, against undisturbed ones, bit by bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import documents, save_model

from cusprun.checkpoint.index import CheckpointIndex, open_checkpoint
from cusprun.quality.likelihood import measure_likelihood
from cusprun.walk.importance import importance_of
from cusprun.walk.shell import DecoderShell
from cusprun.walk.workspace import DEFAULT_WORKSPACE, Workspace

TEXTS = documents(7)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckpointIndex, CheckpointIndex]:
    root = tmp_path_factory.mktemp("models")
    folders = save_model(root / "a"), save_model(root / "b", seed=1, num_hidden_layers=2)
    return open_checkpoint(folders[0]), open_checkpoint(folders[1])


class Blocks:
    """The blocks that were loaded, of a model and its reference; ``stop`` is how many may be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[int] = []
        self.stop = 1000
        own: Callable[..., Any] = DecoderShell.load_block

        def load_block(shell: DecoderShell, layer: int) -> Any:
            if len(self.loaded) == self.stop:
                raise KeyboardInterrupt
            self.loaded.append(layer)
            return own(shell, layer)

        monkeypatch.setattr(DecoderShell, "load_block", load_block)

    def interrupted(self, work: Callable[[], object], stop: int) -> None:
        self.stop = stop
        with pytest.raises(KeyboardInterrupt):
            work()
        self.stop = 1000
        self.loaded.clear()


@pytest.mark.parametrize(("stop", "left"), [(1, [0, 1, 2, 0, 1]), (2, [1, 2, 0, 1]), (4, [0, 1]), (5, [1])])
def test_a_comparison_goes_on_from_the_last_finished_block(
    stop: int,
    left: list[int],
    models: tuple[CheckpointIndex, CheckpointIndex],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = measure_likelihood(models[0], TEXTS, models[1])
    blocks, workspace = Blocks(monkeypatch), Workspace(folder=tmp_path)

    def measure(key: str = "both", workspace: Workspace = workspace) -> Any:
        return measure_likelihood(models[0], TEXTS, models[1], key=key, workspace=workspace)

    blocks.interrupted(measure, stop - 1)
    with caplog.at_level(logging.INFO, "cusprun"):
        assert measure("others") == whole
        assert "goes on" not in caplog.text
        blocks.loaded.clear()
        assert measure() == whole
    assert blocks.loaded == left
    assert (f"measuring quality goes on after layer {stop - 1} of 5" in caplog.text) is (stop > 1)
    assert not list((tmp_path / "work").iterdir())


def test_without_a_key_nothing_is_found(
    models: tuple[CheckpointIndex, CheckpointIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, workspace = Blocks(monkeypatch), Workspace(folder=tmp_path)
    blocks.interrupted(lambda: measure_likelihood(models[0], TEXTS, workspace=workspace), 2)
    assert not list((tmp_path / "work").iterdir())


def test_important_weights_are_found_on_from_the_last_finished_block(
    models: tuple[CheckpointIndex, CheckpointIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [document.token_ids for document in TEXTS]
    whole = importance_of(models[0], ids)
    blocks, workspace = Blocks(monkeypatch), Workspace(folder=tmp_path)

    def measure(workspace: Workspace = workspace) -> Any:
        return importance_of(models[0], ids, key="model", workspace=workspace)

    blocks.interrupted(measure, 2)
    found = measure()
    assert blocks.loaded == [2]
    assert list(found) == list(whole) == list(measure(DEFAULT_WORKSPACE))
    assert all(np.array_equal(found[name], whole[name]) for name in whole)
    assert not list((tmp_path / "work").iterdir())
