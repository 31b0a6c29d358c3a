"""Runs that are killed at chosen moments and begun again, against one that was left alone, to the byte."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import killing
import pytest
from tiny import save_model


def killed_runs(tmp_path: Path, target: str, every: int, first: int) -> dict[str, int]:
    """Return how often runs that were begun again were killed; see ``killing.py``."""
    save_model(tmp_path / "model")
    arguments = (tmp_path / "model", tmp_path / "runs", target, every, first)
    root = Path(killing.__file__).parent
    done = subprocess.run(
        [sys.executable, killing.__file__, *map(str, arguments)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "SOURCE_DATE_EPOCH": "1700000000",
            "PYTHONPATH": os.pathsep.join([str(root.parent), str(root)]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    killed: dict[str, int] = json.loads(done.stdout.splitlines()[-1])["killed"]
    assert killed
    return killed


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*"))
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*"))
    files = [name for name in names if (one / name).is_file()]
    assert files
    assert filecmp.cmpfiles(one, other, files, shallow=False) == (files, [], [])


@pytest.mark.parametrize(
    ("target", "every", "first"),
    [
        ("output", 97, 41),
        pytest.param("output", 21, 2, marks=pytest.mark.slow),
        pytest.param("residual", 53, 5, marks=pytest.mark.slow),
        pytest.param("auto", 127, 7, marks=pytest.mark.slow),
    ],
)
def test_what_was_killed_and_begun_again_is_the_same_to_the_byte(
    target: str, every: int, first: int, tmp_path: Path
) -> None:
    killed = killed_runs(tmp_path, target, every, first)
    assert all(killed.values())
    assert max(killed.values()) == 2
    whole = tmp_path / "runs" / "whole"
    for number in killed:
        root = tmp_path / "runs" / number
        for name in ("store", "out"):
            assert_same_files(whole / name, root / name)
        assert not [path for path in root.iterdir() if "partial" in path.name]
