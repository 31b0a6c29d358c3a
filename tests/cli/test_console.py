"""What stages look like on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cusprun.cli import console as console_module
from cusprun.cli.console import ConsoleProgress, duration


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(console_module, "time", found)
    return found


def progress(terminal: bool) -> tuple[ConsoleProgress, io.StringIO]:
    stream = io.StringIO()
    return ConsoleProgress(Console(file=stream, force_terminal=terminal, width=100, highlight=False)), stream


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock) -> None:
    shown, stream = progress(terminal=False)
    with shown.stage("scoring", 100, "batch") as advance:
        for _ in range(100):
            clock.now += 0.5
            advance(1)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "scoring: 4% of 100 batches",
        "scoring: 34% of 100 batches, 33 s left",
        "scoring: 64% of 100 batches, 18 s left",
        "scoring: 94% of 100 batches, 3.0 s left",
        "scoring: done in 50 s",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_short_stage_leaves_no_line(clock, terminal) -> None:
    shown, stream = progress(terminal)
    with shown.stage("hashing", 0, "MiB") as advance:
        advance(0)
        clock.now += 1.9
    assert "done" not in stream.getvalue()


def test_a_terminal_gets_a_bar_with_a_rate(clock) -> None:
    shown, stream = progress(terminal=True)
    with shown.stage("scoring", 10, "batch") as advance:
        for _ in range(10):
            clock.now += 1.0
            advance(1)
    text = stream.getvalue()
    assert "100%" in text
    assert "batch/s" in text
    assert "scoring: done in 10 s" in text


def test_a_stage_that_fails_is_not_called_done(clock) -> None:
    shown, stream = progress(terminal=False)

    def fail() -> None:
        with shown.stage("scoring", 10):
            clock.now += 60
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (8.44, "8.4 s"), (59.6, "60 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text) -> None:
    assert duration(seconds) == text
