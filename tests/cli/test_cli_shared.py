"""Several processes behind one command: one result, one voice, and an end together whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from ranked import ROOT, launched, run_ranks, threads_of_ranks
from safetensors.torch import load_file

from cusprun import prune, score
from cusprun.checkpoint.output import remove
from cusprun.errors import UserError
from cusprun.walk.ranks import Ranks

SCORE = ("score", "model", "--expert", "expert.yaml", "--out", "store")
PRUNE = ("prune", "model", "--expert", "expert.yaml", "--for", "gguf:f16", "--out", "out")

# Scores and prunes in several ways into the folder that argv names, sharing the work with the other ranks.
WORK = """
import os, sys
import cusprun
from cusprun.walk.shared_run import SharedRun

folder, ways = sys.argv[1], sys.argv[2:]
WAYS = {
    "output": {},
    "auto": {"refit_target": "auto"},
    "bias": {"rule": "variance+bias"},
    "blocks": {"units": ["block", "ffn_channel"], "ratio": 0.6},
    "search": {"max_loss": 0.2},
}
with SharedRun(os.environ) as run:
    cusprun.score("model", "expert.yaml", f"{folder}/store", ranks=run.ranks())
    for way in ways:
        out = f"{folder}/{way}"
        cusprun.prune("model", "expert.yaml", out, targets=["gguf:f16"], ranks=run.ranks(), **WAYS[way])
"""

# Ends the process of one rank, in the second block that it loads of the model.
DYING = """
import os, signal, sys
from cusprun.cli import main
from cusprun.errors import ModelError
from cusprun.walk.shell import DecoderShell

how, who, *arguments = sys.argv[1:]
original = DecoderShell.load_block

def dying(self, layer):
    if layer == 1 and os.environ["RANK"] == who:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ModelError("the shard is gone; put it back") if how == "error" else KeyError("x")
    return original(self, layer)

DecoderShell.load_block = dying
main(arguments)
"""


def shared_work(size: int, work: Path, *ways: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``size`` processes score and prune with a cache of their own; return where the results are."""
    monkeypatch.setenv("CUSPRUN_CACHE", str(work / f"cache-{size}"))
    folder = work / f"by-{size}"
    folder.mkdir()
    if size == 1:
        monkeypatch.setattr(sys, "argv", ["work", str(folder), *ways])
        exec(WORK, {})
        return folder
    for done in run_ranks(size, ("-c", WORK, folder, *ways), work):
        assert done.returncode == 0, done.stderr
    return folder


def arrays_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}:{name}": values
        for path in sorted(folder.glob("*.safetensors"))
        for name, values in load_file(path).items()
    }


def assert_alike(one: Path, other: Path) -> None:
    """Impacts have the same bits; what is summed over documents is equal to 1e-5, and so is the refit."""
    for name, values in arrays_of(one / "store").items():
        found = arrays_of(other / "store")[name]
        if name.endswith((".sums", ".squares")):
            torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-5 * float(values.abs().max()))
        else:
            assert torch.equal(found, values), name
    for folder in sorted(path for path in one.iterdir() if path.name != "store"):
        weights, found = arrays_of(folder), arrays_of(other / folder.name)
        assert weights.keys() == found.keys()
        for name, values in weights.items():
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5 * float(values.abs().max()))
        told = [json.loads((root / folder.name / "cusprun.json").read_text()) for root in (one, other)]
        assert told[0]["plan"] == told[1]["plan"]
        assert told[0]["measurements"]["held_out"] == pytest.approx(told[1]["measurements"]["held_out"], 1e-5)


def test_two_processes_make_what_one_makes(work, monkeypatch) -> None:
    alone = shared_work(1, work, "auto", monkeypatch=monkeypatch)
    assert_alike(alone, shared_work(2, work, "auto", monkeypatch=monkeypatch))


@pytest.mark.slow
def test_four_processes_make_what_one_makes_in_every_way(work, monkeypatch) -> None:
    ways = ("output", "bias", "blocks", "search")
    alone = shared_work(1, work, *ways, monkeypatch=monkeypatch)
    assert_alike(alone, shared_work(4, work, *ways, monkeypatch=monkeypatch))


def failed(done: Sequence[subprocess.CompletedProcess[str]], codes: list[int], words: str) -> None:
    """Assert exit codes, and that the first process alone says why, in one line."""
    assert [one.returncode for one in done] == codes, [one.stderr for one in done]
    assert [line for line in done[0].stderr.splitlines() if line.startswith("error: ")] == [f"error: {words}"]
    assert "Traceback" not in done[0].stderr
    assert all(not one.stderr and not one.stdout for one in done[1:])


def test_a_rank_that_fails_ends_the_run_with_its_reason(work) -> None:
    done = run_ranks(2, ("-c", DYING, "error", 1, *SCORE), work)
    failed(done, [2, 2], "rank 1 failed: the shard is gone; put it back")
    assert not (work / "store").exists()


def test_ranks_that_are_asked_differently_are_refused(work) -> None:
    text = (work / "expert.yaml").read_text().replace("task.jsonl", "general.jsonl")
    (work / "other.yaml").write_text(text)
    experts = ("expert.yaml", "other.yaml")
    for given, words in (
        (lambda rank: {"expert": experts[rank]}, "rank 1 differs from rank 0 in the documents"),
        (lambda rank: {"ratio": (0.2, 0.3)[rank]}, "rank 1 differs from rank 0 in the ratio (0.3 and 0.2)"),
    ):
        with threads_of_ranks(2) as threads:
            errors = threads.errors(
                lambda own, given=given: prune(
                    **{"model": "model", "expert": "expert.yaml", "out": "out", **given(own.rank)}, ranks=own
                )
            )
        assert all(isinstance(error, UserError) and words in str(error) for error in errors), errors
    assert not (work / "out").exists()


def test_single_neurons_are_the_work_of_one_process(work) -> None:
    for asked in (
        partial(score, "model", "expert.yaml", "out"),
        partial(prune, "model", "expert.yaml", "out"),
    ):
        with pytest.raises(UserError, match="single neurons are the work of one process, and there are 2"):
            asked(granularity="neuron", ranks=Ranks(0, 2))


def test_commands_of_one_process_are_refused_in_several(work, cusprun, monkeypatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for name, value in launched(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    outcome = cusprun("plan", "model")
    assert outcome.code == 2
    assert "`cusprun plan` is work for one process, and the launcher started 2" in outcome.err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_contradictory_launcher_is_one_line(work, cusprun, monkeypatch) -> None:
    for name, value in {**launched(0, 2, 29500), "RANK": "two"}.items():
        monkeypatch.setenv(name, value)
    outcome = cusprun(*SCORE)
    assert outcome.code == 2
    assert outcome.err.startswith("error: the variable RANK must be a whole number")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(work, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    whole = run_ranks(2, ("-m", "cusprun", *PRUNE), work)
    assert [done.returncode for done in whole] == [0, 0], whole
    wanted = files_of(work / "out")
    remove(work / "out")
    remove(work / "cache")
    words = ("the launcher, or the first process, which holds the store", "rank 1 ended without a word")
    for lost, other in ((1, 0), (0, 1)):
        done = run_ranks(2, ("-c", DYING, "kill", lost, *PRUNE), work)
        assert done[lost].returncode == -signal.SIGKILL
        assert done[other].returncode == 3
        assert f"error: {words[lost]}" in done[other].stderr
        assert not (work / "out").exists()
    done = run_ranks(2, ("-m", "cusprun", *PRUNE), work)
    assert [one.returncode for one in done] == [0, 0], done
    assert "scoring goes on after layer 1 of 2" in done[0].stderr
    assert files_of(work / "out") == wanted


def torchrun(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    return subprocess.run(
        [sys.executable, *launcher, "-m", "cusprun", *arguments],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_torchrun_starts_them(work) -> None:
    done = torchrun(work, *PRUNE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote out") == 1
    assert (work / "out/cusprun.json").is_file()


@pytest.mark.slow
def test_the_first_process_speaks_before_torchrun_ends_it(work) -> None:
    done = torchrun(work, *PRUNE, "--ratio", "0.99")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "the ratio 0.99 is outside (0, 0.9]" in told[0]
