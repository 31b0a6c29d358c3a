"""Ctrl-C, SIGTERM and SIGKILL: no partial output, and the next run continues from the finished stages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Sends itself a signal in the second block of the refit, after the scores are finished.
KILLER = """
import os, signal, sys
from cusprun.pruning.refit_walk import RefitWalk
from cusprun.cli import main

# A run in the background inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
original = RefitWalk.refit_block

def interrupted(self, layer, plan):
    if layer == 1:
        os.kill(os.getpid(), int(sys.argv[1]))
    return original(self, layer, plan)

RefitWalk.refit_block = interrupted
main(sys.argv[2:])
"""
PRUNE = ("prune", "model", "--expert", "expert.yaml", "--for", "gguf:f16", "--out", "out")


def prune(number: int, work: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLER, str(number), *PRUNE],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def partials(work: Path) -> list[str]:
    return [path.name for path in work.rglob(".*partial*")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_prune_leaves_nothing_and_continues(work, cusprun, number, code) -> None:
    done = prune(number, work)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert not Path("out").exists()
    assert not partials(work)
    outcome = cusprun(*PRUNE)
    assert outcome.code == 0, outcome
    assert "not scoring again" in outcome.err
    assert Path("out/cusprun.json").is_file()


def test_a_killed_prune_is_cleaned_up_by_the_next(work, cusprun) -> None:
    done = prune(signal.SIGKILL, work)
    assert done.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert partials(work)
    outcome = cusprun(*PRUNE)
    assert outcome.code == 0, outcome
    assert "not scoring again" in outcome.err
    assert not partials(work)
