"""What an interrupted run finds when it is begun again with something changed, missing, full or shared."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from device_checks import CORPORA, EXPERT
from tiny import save_model

from cusprun.checkpoint.index import model_hash, open_checkpoint
from cusprun.errors import CusprunError, ModelError, OutputError
from cusprun.pruning import fitted_blocks
from cusprun.pruning.folder import Provenance, write_expert
from cusprun.pruning.planner import make_plan
from cusprun.pruning.refit import RefitSettings
from cusprun.pruning.refit_walk import RefitWalk
from cusprun.pruning.score import score_model
from cusprun.pruning.store import open_store
from cusprun.records import Corpora, Plan
from cusprun.walk.workspace import Workspace

SETTINGS = RefitSettings(revise=True, anchors=20)
FIRST = Corpora(CORPORA.calibration, ())
BLOCKS = 3
MOMENT = "1700000000"


@pytest.fixture(autouse=True)
def _no_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", MOMENT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its scores, and an expert that nothing interrupted."""
    root = tmp_path_factory.mktemp("made")
    index = open_checkpoint(save_model(root / "model"))
    score_model(index, CORPORA, root / "store", model_hash=model_hash(index), corpus_hash="corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", MOMENT)
        expert(root / "model", root / "store", root / "whole", Workspace())
    return root


def plan_of(model: Path, store: Path, ratio: float = 0.3) -> Plan:
    index = open_checkpoint(model)
    return make_plan(index, open_store(store), model_hash=model_hash(index), ratio=ratio)


def expert(
    model: Path,
    store: Path,
    out: Path,
    workspace: Workspace,
    settings: RefitSettings = SETTINGS,
    corpora: Corpora = FIRST,
    ratio: float = 0.3,
) -> None:
    index, plan = open_checkpoint(model), plan_of(model, store, ratio)
    provenance = Provenance("tiny", model_hash(index), "corpus", EXPERT, {})
    write_expert(
        index,
        plan,
        out,
        corpora=corpora,
        provenance=provenance,
        settings=settings,
        measure=False,
        workspace=workspace,
    )


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were refit, in order; ``~N`` put there first stops a run before block N."""
    own, seen = RefitWalk.refit_block, list[int]()

    def refit_block(self: RefitWalk, layer: int, plan: Any) -> Any:
        if seen[:1] == [~layer]:
            raise KeyboardInterrupt
        seen.append(layer)
        return own(self, layer, plan)

    monkeypatch.setattr(RefitWalk, "refit_block", refit_block)
    return seen


@pytest.fixture
def left(made: Path, tmp_path: Path, layers: list[int]) -> Workspace:
    """What a run leaves that was interrupted before its last block."""
    workspace = Workspace(folder=tmp_path / "unfinished")
    layers.append(~2)
    with pytest.raises(KeyboardInterrupt):
        expert(made / "model", made / "store", tmp_path / "out", workspace)
    assert layers == [~2, 0, 1]
    assert not (tmp_path / "out").exists()
    layers.clear()
    return workspace


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_the_same_goes_on(
    made: Path, left: Workspace, layers: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cusprun"):
        expert(made / "model", made / "store", tmp_path / "out", left)
    assert layers == [2]
    assert "the refit goes on after layer 2 of 3" in caplog.text
    assert same(tmp_path / "out", made / "whole")
    assert left.folder is not None
    assert not list((left.folder / "work").iterdir())


def test_a_copy_of_the_model_elsewhere_goes_on_too(
    made: Path, left: Workspace, layers: list[int], tmp_path: Path
) -> None:
    shutil.copytree(made / "model", tmp_path / "moved")
    expert(tmp_path / "moved", made / "store", tmp_path / "out", left)
    assert layers == [2]
    assert same(tmp_path / "out", made / "whole")


CHANGES: dict[str, dict[str, Any]] = {
    "weights of the documents": {"settings": replace(SETTINGS, weights={"task": 0.5})},
    "target": {"settings": replace(SETTINGS, target="residual")},
    "anchors": {"settings": replace(SETTINGS, anchors=21)},
    "documents": {"corpora": replace(FIRST, calibration=FIRST.calibration[1:])},
    "their order": {"corpora": replace(FIRST, calibration=FIRST.calibration[::-1])},
    "plan": {"ratio": 0.4},
}


SOME = ("documents", "plan")


@pytest.mark.parametrize(
    "change",
    [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES],
)
def test_what_is_asked_otherwise_begins_anew_and_leaves_the_other_alone(
    change: str, made: Path, left: Workspace, layers: list[int], tmp_path: Path
) -> None:
    options = CHANGES[change]
    expert(made / "model", made / "store", tmp_path / "other", left, **options)
    assert layers == [0, 1, 2]
    expert(made / "model", made / "store", tmp_path / "alone", Workspace(), **options)
    assert same(tmp_path / "other", tmp_path / "alone")
    layers.clear()
    expert(made / "model", made / "store", tmp_path / "out", left)
    assert layers == [2]
    assert same(tmp_path / "out", made / "whole")


def test_a_model_with_other_weights_begins_anew(
    made: Path, left: Workspace, layers: list[int], tmp_path: Path
) -> None:
    index = open_checkpoint(save_model(tmp_path / "model", seed=5))
    score_model(index, CORPORA, tmp_path / "store", model_hash=model_hash(index), corpus_hash="corpus")
    expert(tmp_path / "model", tmp_path / "store", tmp_path / "out", left)
    assert layers == [0, 1, 2]
    expert(tmp_path / "model", tmp_path / "store", tmp_path / "alone", Workspace())
    assert same(tmp_path / "out", tmp_path / "alone")
    assert not same(tmp_path / "out", made / "whole")


def test_a_shard_that_is_missing_for_a_while_costs_nothing(
    made: Path, left: Workspace, layers: list[int], tmp_path: Path
) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    index, plan = open_checkpoint(tmp_path / "model"), plan_of(made / "model", made / "store")
    away = weights.rename(tmp_path / "away")
    with (
        pytest.raises(ModelError, match=r"cannot be read.*copy the file again"),
        fitted_blocks.fitted_blocks(index, plan, FIRST.calibration, SETTINGS, workspace=left),
    ):
        pass
    away.rename(weights)
    layers.clear()
    expert(tmp_path / "model", made / "store", tmp_path / "out", left)
    assert layers == [2]
    assert same(tmp_path / "out", made / "whole")


def full(*_args: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["write_tensors", "dump_json"])
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    name: str,
    made: Path,
    left: Workspace,
    layers: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as short:
        short.setattr(fitted_blocks, name, full)
        with pytest.raises(OutputError, match=r"work folder .*No space left.*free some space.*--workdir"):
            expert(made / "model", made / "store", tmp_path / "out", left)
    assert not (tmp_path / "out").exists()
    layers.clear()
    expert(made / "model", made / "store", tmp_path / "out", left)
    assert layers == [2]
    assert same(tmp_path / "out", made / "whole")


def test_a_second_run_beside_the_first_gives_the_same_and_disturbs_nothing(
    made: Path, left: Workspace, layers: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: Callable[..., Any] = RefitWalk.refit_block
    begun = []

    def another_first(self: RefitWalk, layer: int, plan: Any) -> Any:
        if not begun:
            begun.append(layer)
            expert(made / "model", made / "store", tmp_path / "second", left)
        return own(self, layer, plan)

    monkeypatch.setattr(RefitWalk, "refit_block", another_first)
    expert(made / "model", made / "store", tmp_path / "out", left)
    assert layers == [0, 1, 2, 2]
    assert same(tmp_path / "out", made / "whole")
    assert same(tmp_path / "second", made / "whole")
    assert left.folder is not None
    assert not list((left.folder / "work").iterdir())


def test_damage_is_told_and_made_again(
    made: Path, left: Workspace, layers: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert left.folder is not None
    for path in left.folder.rglob("*.rows"):
        with path.open("r+b") as stream:
            stream.seek(1000)
            stream.write(b"\xff\xff")
    with caplog.at_level(logging.INFO, "cusprun"):
        expert(made / "model", made / "store", tmp_path / "out", left)
    assert layers == [0, 1, 2]
    assert "is damaged; it is made again" in caplog.text
    assert same(tmp_path / "out", made / "whole")


def test_an_error_of_the_model_itself_leaves_no_folder(made: Path, tmp_path: Path) -> None:
    index, plan = open_checkpoint(made / "model"), plan_of(made / "model", made / "store")
    workspace = Workspace(folder=tmp_path)
    wrong = replace(FIRST.calibration[0], token_ids=(10_000,))
    with (
        pytest.raises(CusprunError, match="10000"),
        fitted_blocks.fitted_blocks(index, plan, (wrong,), SETTINGS, workspace=workspace),
    ):
        pass
    assert not list((tmp_path / "work").iterdir())
