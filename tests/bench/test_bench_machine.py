"""Memory and environment: pure parts by value, the rest against the kernel's own counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.bench.environment import (
    CpuSeconds,
    count_cores,
    cpu_seconds,
    describe,
    foreign_share,
    physical_cores,
)
from serve.bench.memory import parse_kilobyte_field

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
SHOW = "from serve.bench.memory import own_memory as m; r = m(); print(r.peak_bytes, r.maxrss_bytes)"


def child(source: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    peak, maxrss = done.stdout.split()
    return int(peak), int(maxrss)


def test_field_is_found_by_its_whole_name_in_units_of_1024_bytes() -> None:
    text = "Name:\tpython\nVmPeak:\t  999 kB\nVmHWM:\t    5312 kB\nPss_Anon:  7 kB\nPss:   12 kB\n"
    assert parse_kilobyte_field(text, "VmHWM") == 5312 * 1024
    assert parse_kilobyte_field(text, "Pss") == 12 * 1024
    assert parse_kilobyte_field(text, "Name") is None
    assert parse_kilobyte_field(text, "VmSwap") is None


@linux
def test_peak_remembers_memory_that_was_given_back() -> None:
    quiet, _ = child(SHOW)
    peak, _ = child(f"b = bytearray(64_000_000); b[:] = bytes(64_000_000); del b\n{SHOW}")
    assert peak - quiet > 60_000_000


@linux
def test_peak_agrees_with_maxrss_in_a_process_started_from_a_small_one() -> None:
    grow = f"b = bytes(bytearray(range(250)) * 400_000)\n{SHOW}"
    # One small process in between, because the test process may be large itself.
    peak, maxrss = child(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grow!r}], check=True)"
    )
    assert peak == pytest.approx(maxrss, rel=0.05)


@linux
def test_peak_is_not_that_of_a_large_parent() -> None:
    grow = "b = bytes(bytearray(range(250)) * 1_200_000)"
    source = f"import subprocess, sys\n{grow}\nsubprocess.run([sys.executable, '-c', {SHOW!r}], check=True)"
    peak, _ = child(source)
    assert peak < 200_000_000


@pytest.mark.parametrize(
    ("siblings", "quota", "cores"),
    [
        (["0-1", "0-1", "2-3", "2-3"], None, 2),
        (["0", "1"], None, 2),
        (["0", "1", "2"], 1.5, 2),
        (["0"], 0.3, 1),
        ([], None, 1),
    ],
)
def test_cores_are_counted_once_and_within_the_quota(
    siblings: list[str], quota: float | None, cores: int
) -> None:
    assert count_cores(siblings, quota) == cores


def test_foreign_share_takes_out_our_own_work_and_stays_in_range() -> None:
    start = CpuSeconds(busy=100.0, own=5.0)
    assert foreign_share(start, CpuSeconds(busy=112.0, own=13.0), 10.0, 2) == pytest.approx(0.2)
    assert foreign_share(start, CpuSeconds(busy=105.0, own=13.0), 10.0, 2) == 0.0
    assert foreign_share(start, CpuSeconds(busy=500.0, own=5.0), 10.0, 2) == 1.0


def test_this_machine_is_described() -> None:
    found = describe(3, "fake", 0.5)
    assert found.num_threads == 3
    assert found.cpu_model
    assert found.physical_cores == physical_cores() >= 1
    assert found.memory_bytes > 1e8
    assert found.versions["python"] == sys.version.split()[0]
    assert cpu_seconds().busy > 0
