"""Memory and environment: pure parts by value, the rest against the kernel's own counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from serve.bench.energy import Counter, EnergyMeter, machine_meter
from serve.bench.environment import (
    CpuSeconds,
    count_cores,
    cpu_seconds,
    describe,
    foreign_share,
    gpu_models,
    physical_cores,
)
from serve.bench.memory import own_memory, parse_kilobyte_field

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
SHOW = "from serve.bench.memory import own_memory as m, maxrss_bytes as r; p = m().peak_bytes; print(p, r())"


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
    found = describe(3, 0.5)
    assert found.num_threads == 3
    assert found.cpu_model
    assert found.physical_cores == physical_cores() >= 1
    assert found.memory_bytes > 1e8
    assert found.versions["python"] == sys.version.split()[0]
    assert cpu_seconds().busy > 0
    assert found.usable_cpus is None or found.usable_cpus[0].isdigit()


def test_gpus_are_those_that_their_driver_lists(tmp_path: Path) -> None:
    for number, model in enumerate(("NVIDIA H100 80GB HBM3", "NVIDIA L4")):
        folder = tmp_path / f"0000:{number:02d}:00.0"
        folder.mkdir()
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ: 5\n")
    assert gpu_models(tmp_path) == ("NVIDIA H100 80GB HBM3", "NVIDIA L4")
    assert gpu_models(tmp_path / "none") == ()


@linux
def test_a_mapped_file_is_counted_page_by_page(tmp_path: Path) -> None:
    """Half of the file is touched; a neighbour with the same beginning of its name is not counted."""
    import mmap

    page, pages = mmap.PAGESIZE, 64
    (tmp_path / "model").mkdir()
    counted, other = tmp_path / "model" / "weights", tmp_path / "model2"
    for path in (counted, other):
        path.write_bytes(b"x" * page * pages)
    with counted.open("rb") as one, other.open("rb") as two:
        maps = [mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) for file in (one, two)]
        for mapped in maps:
            mapped.madvise(mmap.MADV_RANDOM)  # no page is read ahead
        touched = [maps[0][number * page] for number in range(0, pages, 2)]
        whole = [maps[1][number * page] for number in range(pages)]
        found = own_memory(tmp_path / "model").mapped_file_bytes
        assert len(touched) + len(whole) == pages * 3 // 2
        assert found is not None
        assert pages // 2 * page <= found <= pages * page  # the kernel maps neighbours that it has
        assert own_memory(other).mapped_file_bytes == pages * page


def write_zone(folder: Path, name: str, microjoules: int, limit: int, label: str = "package-0") -> Path:
    zone = folder / name
    zone.mkdir(exist_ok=True)
    (zone / "name").write_text(f"{label}\n")
    (zone / "max_energy_range_uj").write_text(str(limit))
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    return zone / "energy_uj"


def test_energy_adds_up_packages_and_survives_a_counter_that_starts_over(tmp_path: Path) -> None:
    first = write_zone(tmp_path, "intel-rapl:0", 900_000, 1_000_000)
    second = write_zone(tmp_path, "intel-rapl:1", 5, 1_000_000)
    write_zone(tmp_path, "intel-rapl:0:0", 7, 1_000_000, "core")  # which are in the package
    platform = write_zone(tmp_path, "intel-rapl:2", 5, 1_000_000, "psys")  # which the packages are in
    meter = machine_meter(tmp_path)
    assert meter.read() == 0.0
    first.write_text("200000")  # over the limit and on: 0.3 J
    second.write_text("500005")
    platform.write_text("900005")
    assert meter.read() == pytest.approx(0.8)
    assert meter.read() == pytest.approx(0.8)


def test_energy_is_absent_where_nothing_counts_it(tmp_path: Path) -> None:
    assert EnergyMeter(()).read() is None
    counter = write_zone(tmp_path, "intel-rapl:0", 3, 10)
    meter = machine_meter(tmp_path)
    counter.unlink()
    assert meter.read() is None
    assert meter.read() is None


def test_energy_is_absent_for_good_when_a_counter_is_set_back() -> None:
    """As a GPU's is when its driver is loaded again: what it counted meanwhile is lost."""
    counts = iter([5_000_000, 9_000_000, 1_000_000, 3_000_000])
    steady = Counter(lambda: 7)
    meter = EnergyMeter((steady, Counter(lambda: next(counts))))
    assert meter.read() == 4.0
    assert [meter.read(), meter.read()] == [None, None]


def test_a_gpu_that_counts_no_energy_does_not_hide_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NvmlError(Exception):
        pass

    def consumption(handle: int) -> int:
        if handle == 0:
            raise NvmlError("not supported")
        return 5

    nvml = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetTotalEnergyConsumption=consumption,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    counter = write_zone(tmp_path, "intel-rapl:0", 3, 1_000_000)
    meter = machine_meter(tmp_path)
    counter.write_text("500003")
    assert meter.read() == pytest.approx(0.5)


@linux
def test_memory_is_that_of_the_processes_that_live() -> None:
    """One that has ended, waited for or not, takes nothing away and does not make the sum unknown."""
    with subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()  # its end: a zombie now or soon, and nothing after the block
        while "\nState:\tZ" not in Path(f"/proc/{child.pid}/status").read_text():
            pass
        alone, beside = own_memory(), own_memory(others=(child.pid,))
    after = own_memory(others=(child.pid,))
    for found in (beside, after):
        assert found.pss_bytes is not None
        assert found.peak_bytes == pytest.approx(alone.peak_bytes, rel=0.02)
        assert found.rss_bytes == pytest.approx(alone.rss_bytes, rel=0.02)
