"""Ctrl-C, SIGTERM and SIGKILL: no partial output, and the next run goes on from the last finished layer."""

from __future__ import annotations

import filecmp
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


def prune(number: int, work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLER, str(number), *PRUNE, *options],
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
    assert "the refit goes on after layer 1 of 2" in outcome.err
    assert Path("out/cusprun.json").is_file()
    assert not unfinished(work / "cache")


def unfinished(folder: Path) -> list[Path]:
    return list((folder / "work").iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--workdir", "scratch/here"),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--refit-target", "residual"), marks=pytest.mark.slow),
    ],
)
def test_a_killed_prune_is_finished_by_the_next_to_the_byte(work, cusprun, monkeypatch, options) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    place = work / "scratch" / "here" if "--workdir" in options else work / "cache"
    done = prune(signal.SIGKILL, work, *options)
    assert done.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert partials(work)
    assert unfinished(place)
    outcome = cusprun(*PRUNE, *options)
    assert outcome.code == 0, outcome
    assert "not scoring again" in outcome.err
    assert "the refit goes on after layer 1 of 2" in outcome.err
    assert not partials(work)
    assert not unfinished(place)
    monkeypatch.setenv("CUSPRUN_CACHE", str(work / "another"))
    whole = cusprun(*PRUNE[:-1], "whole", *options)
    assert whole.code == 0
    assert "goes on" not in whole.err
    names = sorted(path.name for path in Path("whole").iterdir())
    assert names == sorted(path.name for path in Path("out").iterdir())
    assert filecmp.cmpfiles("out", "whole", names, shallow=False) == (names, [], [])
    assert '"created": "2023-11-14T22:13:20+00:00"' in Path("out/cusprun.json").read_text()
    scores = [next((work / folder / "scores").iterdir()) for folder in ("cache", "another")]
    files = sorted(path.name for path in scores[0].iterdir())
    assert filecmp.cmpfiles(*scores, files, shallow=False) == (files, [], [])


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("expert.yaml", "cannot be made"), ("expert.yaml/below", "cannot be made")],
)
def test_a_work_folder_that_cannot_be_is_refused_before_any_work(work, cusprun, folder, reason) -> None:
    outcome = cusprun(*PRUNE, "--workdir", folder)
    assert outcome.code == 2
    assert reason in outcome.err
    assert not Path("out").exists()


def test_a_time_that_is_none_is_refused_before_any_work(work, cusprun, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    outcome = cusprun(*PRUNE)
    assert outcome.code == 2
    assert "SOURCE_DATE_EPOCH is 'yesterday', which is no time" in outcome.err
    assert not Path("out").exists()


def test_a_search_that_is_interrupted_measures_no_expert_twice(work, cusprun, monkeypatch) -> None:
    """And makes the best one again, whose folder went with the first try."""
    from cusprun.pipeline import stages

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    search = ("prune", "model", "--expert", "expert.yaml", "--max-loss", "30%", "--for", "gguf:q8_0", "--out")
    write, made = stages._write, []

    def interrupted(*args, **options):
        made.append(args[4])
        if len(made) == stop:
            raise KeyboardInterrupt
        return write(*args, **options)

    monkeypatch.setattr(stages, "_write", interrupted)
    stop = 0
    assert cusprun(*search, "whole").code == 0
    steps = len(made)
    assert steps >= 3
    monkeypatch.setenv("CUSPRUN_CACHE", str(work / "another"))
    made.clear()
    stop = steps
    assert cusprun(*search, "out").code == 130
    assert not Path("out").exists()
    stop = 0
    del made[-1:]
    outcome = cusprun(*search, "out")
    assert outcome.code == 0, outcome
    assert len(made) <= steps + 1
    assert Path("out/cusprun.json").read_bytes() == Path("whole/cusprun.json").read_bytes()
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_important_weights_are_measured_once_unless_they_are_damaged(work, cusprun, monkeypatch) -> None:
    from cusprun.walk import importance

    calls, own = [], importance.importance_of

    def counted(*args, **options):
        calls.append(1)
        return own(*args, **options)

    monkeypatch.setattr(importance, "importance_of", counted)
    export = ("export", "model", "--expert", "expert.yaml", "--quant", "q4_k_m", "--no-verify", "--out")
    assert cusprun(*export, "a.gguf").code == 0
    assert cusprun(*export, "b.gguf").code == 0
    assert len(calls) == 1
    (kept,) = (work / "cache" / "importances").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    assert cusprun(*export, "c.gguf").code == 0
    assert len(calls) == 2
    assert Path("a.gguf").read_bytes() == Path("b.gguf").read_bytes() == Path("c.gguf").read_bytes()
