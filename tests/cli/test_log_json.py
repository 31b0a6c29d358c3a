"""Progress and messages as lines of JSON."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cusprun.cli import json_lines
from cusprun.cli.console import ConsoleProgress, quieten, shown_progress
from cusprun.cli.json_lines import JsonProgress

FIELDS = {
    "stage_started": {"stage", "total", "unit"},
    "stage_progress": {"stage", "total", "unit", "done", "seconds", "rate_per_s", "seconds_left"},
    "stage_finished": {"stage", "seconds"},
    "stage_failed": {"stage", "seconds"},
    "message": {"level", "text"},
    "error": {"text", "exit_code"},
}


def lines_of(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    for line in found:
        assert line.keys() == {"schema_version", "time", "event"} | FIELDS[line["event"]]
        assert line["schema_version"] == 1
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None
    return found


class Clock:
    """A clock that only moves when told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(json_lines, "time", found)
    return found


def test_a_stage_is_told_once_a_second_with_its_rate(clock: Clock, capsys: Any) -> None:
    with JsonProgress().stage("scoring", 10, "batch") as advance:
        for _ in range(10):
            clock.now += 0.25
            advance(1)
    found = lines_of(capsys.readouterr().err)
    assert [line["event"] for line in found] == [
        "stage_started", "stage_progress", "stage_progress", "stage_progress", "stage_finished",
    ]  # fmt: skip
    assert [line["done"] for line in found[1:-1]] == [4, 8, 10]
    assert [line["rate_per_s"] for line in found[1:-1]] == [4.0, 4.0, 4.0]
    assert [line["seconds_left"] for line in found[1:-1]] == [1.5, 0.5, 0.0]
    assert found[-1]["seconds"] == 2.5


def test_a_stage_that_fails_says_so(clock: Clock, capsys: Any) -> None:
    def fail() -> None:
        with JsonProgress().stage("scoring", 10):
            clock.now += 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [line["event"] for line in lines_of(capsys.readouterr().err)] == ["stage_started", "stage_failed"]


def test_a_command_writes_nothing_else_to_standard_error(work: Path, cusprun: Any) -> None:
    outcome = cusprun(
        "--log-json", "prune", "model", "--expert", "expert.yaml", "--for", "gguf:f16", "--out", "out"
    )
    assert outcome.code == 0
    found = lines_of(outcome.err)
    started = [line["stage"] for line in found if line["event"] == "stage_started"]
    assert {"scoring", "measuring quality"} <= set(started)
    assert started == [line["stage"] for line in found if line["event"] == "stage_finished"]
    assert any(line["event"] == "message" and line["text"].startswith("plan:") for line in found)
    assert "wrote out" in outcome.out


def test_errors_are_lines_too_and_only_where_asked(work: Path, cusprun: Any) -> None:
    ask = ("inspect", "nowhere")
    outcome = cusprun("--log-json", *ask)
    (line,) = (line for line in lines_of(outcome.err) if line["event"] == "error")
    assert line["exit_code"] == outcome.code == 2
    assert "nowhere" in line["text"]
    plain = cusprun(*ask)
    assert plain.err == f"error: {line['text']}\n"
    assert cusprun("--log-json", "--debug", *ask).code == 2
    assert "No such option" in cusprun("inspect", "--log-json", "nowhere").err


def test_progress_is_shown_the_way_that_messages_are() -> None:
    quieten(False, log_json=True)
    assert isinstance(shown_progress(), JsonProgress)
    quieten(False)
    assert isinstance(shown_progress(), ConsoleProgress)
