"""``--processes N``: several processes that this command starts itself, with one voice and one exit code."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranked import ROOT, launched
from safetensors.torch import load_file

from cusprun.cli.app import run
from cusprun.cli.several import _Children, _codes_of, _passed_on, environment_of
from cusprun.cli.shared import SharedProcess
from cusprun.pipeline.shared import tell_of_idle_gpus
from cusprun.walk.device import Device
from cusprun.walk.ranks import ALONE

SCORE = ("score", "model", "--expert", "expert.yaml", "--out")
WAITING = "import sys; sys.stdin.read()"
# A run in the background inherits an ignored SIGINT.
MAIN = """
import signal, sys
from cusprun.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)
main(sys.argv[1:])
"""


def started(work: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = started(work, *arguments)
    out, err = process.communicate()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_two_processes_score_what_one_scores_and_one_speaks(work, monkeypatch) -> None:
    found = {}
    for count in ("1", "2"):
        monkeypatch.setenv("CUSPRUN_CACHE", str(work / f"cache-{count}"))
        done = ended(work, *SCORE, f"store-{count}", "--processes", count)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"wrote store-{count}\n"
        found[count] = load_file(work / f"store-{count}" / "layer-00001.safetensors")
    for name in ("ffn_channel", "query_head", "kv_group", "block"):
        assert torch.equal(found["1"][name], found["2"][name])


def test_a_fault_is_said_once_with_its_code(work) -> None:
    done = ended(work, "score", "nowhere", "--expert", "expert.yaml", "--out", "store", "--processes", "2")
    assert done.returncode == 2
    assert [line[:15] for line in done.stderr.splitlines()] == ["error: nowhere "]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_they_end_with_nothing_left(work, number) -> None:
    process = started(work, "--log-json", *SCORE, "store", "--processes", "2")
    assert process.stderr is not None
    assert process.stderr.readline()
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert sum('"event": "error"' in line for line in err.splitlines()) == 1, err
    assert not (work / "store").exists()


def test_what_is_interrupted_waits_for_no_other(monkeypatch) -> None:
    class Unfinished(SharedProcess):
        def finish(self) -> None:
            pytest.fail("it went to meet the others")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SharedProcess, "admit", interrupted)
    assert run(["doctor"], Unfinished({})) == 128 + signal.SIGINT


def test_a_signal_is_passed_on_to_children_that_start_after_it() -> None:
    children = _Children()
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    children.start(command, os.environ)
    children.tell(signal.SIGTERM)
    children.start(command, os.environ)
    assert [child.wait() for child in children.started] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_is_ignored_stays_ignored(handler) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with _passed_on() as children:
            inside = signal.getsignal(signal.SIGINT)
            assert inside == (handler if handler is signal.SIG_IGN else children.tell)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


HALF_LOADED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupts:  # Ctrl-C in the midst of torch, once
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
from cusprun.cli import main
main(sys.argv[1:])
"""


def test_interrupted_while_torch_is_loaded_it_loads_no_more(work) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HALF_LOADED, *SCORE, "store"],
        cwd=work,
        env={**os.environ, **launched(0, 2, 1), "TORCHELASTIC_USE_AGENT_STORE": "True"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (130, 1), done.stderr


def test_when_one_fails_the_others_are_told() -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", WAITING], stdin=subprocess.PIPE),
        subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]),
    ]
    assert _codes_of(children) == [-signal.SIGTERM, 3]


def test_cores_are_shared_unless_the_user_says_how() -> None:
    own = environment_of({}, rank=1, processes=4, port=9, num_cores=10)
    assert own["OMP_NUM_THREADS"] == "2"
    assert (own["RANK"], own["LOCAL_RANK"], own["WORLD_SIZE"], own["MASTER_PORT"]) == ("1", "1", "4", "9")
    assert environment_of({}, 0, 4, 9, num_cores=2)["OMP_NUM_THREADS"] == "1"
    assert environment_of({"OMP_NUM_THREADS": "7"}, 0, 4, 9, num_cores=2)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--processes", "0"), "1 to 256, not 0"),
        (("--processes", "3"), "the launcher started 2 processes and --processes says 3"),
    ],
)
def test_numbers_that_cannot_be_are_refused(work, cusprun, monkeypatch, options, words) -> None:
    for name, value in launched(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    done = cusprun(*SCORE, "store", *options)
    assert done.code == 2
    assert words in done.err


def test_idle_gpus_are_told_of(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, logger="cusprun")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    tell_of_idle_gpus(Device("cpu"), ALONE)
    assert not caplog.messages
    tell_of_idle_gpus(Device("cuda:0"), ALONE)
    assert caplog.messages == ["note: cuda:0 is one of 8 GPUs here; --processes 8 shares the work"]


def test_an_estimate_is_for_one_process(work, cusprun) -> None:
    done = cusprun("prune", "model", "--expert", "expert.yaml", "--estimate", "--processes", "2")
    assert done.code == 2
    assert "leave out --processes" in done.err
