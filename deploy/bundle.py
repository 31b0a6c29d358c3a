"""An offline bundle: artifact, wheels, installer, start script and smoke test; nothing else is needed.

cusprun asks for torch and transformers (some GB), which serving never imports: the bundle installs it without
its dependencies, beside a list of what serving does import. On Linux the wheels are 42 MB for a GGUF file, of
which xllamacpp is 34, and 67 MB for ONNX.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from cusprun.errors import UserError
from deploy.facts import Facts
from deploy.own_wheel import own_wheel
from deploy.platforms import MACHINES, marker_environment, python_there, this_platform
from deploy.render import File, artifact_files, artifact_path, question, render, text_file
from deploy.requirements import ENGINE_MODULES, LIBRARIES, pinned
from deploy.wheelhouse import fetch, requirement_lines

_WHEELS = "wheels"
_NOT_ON_WINDOWS = re.compile(
    r"""[<>:"|?*\\] | [. ](?:/|$) | (?:^|/)(?:con|prn|aux|nul|com\d|lpt\d)(?:[./]|$)""", re.I | re.X
)
"""https://learn.microsoft.com/windows/win32/fileio/naming-a-file"""

_SCRIPTS = {"posix": ("start.sh",), "nt": ("start.bat", "start.ps1")}


def check(facts: Facts, options: Mapping[str, str | None]) -> None:
    """Raise ``UserError`` for a platform or a Python that there can be no bundle for."""
    platform = _platform(options)
    python_there(options.get("python"))
    names = (facts.artifact_name, *facts.sha256)
    odd = next((name for name in names if _NOT_ON_WINDOWS.search(name)), None)
    if MACHINES[platform].os_name == "nt" and odd is not None:
        raise UserError(f"Windows has no files with names like {odd!r}; rename it")
    if facts.artifact_name.startswith("-"):
        raise UserError(f"the name {facts.artifact_name!r} looks like an option; rename it")


def files(facts: Facts, options: Mapping[str, str | None]) -> Iterator[File]:
    """Yield the files of the bundle; the wheels are fetched first."""
    platform, python = _platform(options), python_there(options.get("python"))
    versions = pinned(facts.versions, marker_environment(platform, python))
    name, wheel = own_wheel()
    with tempfile.TemporaryDirectory() as folder:
        for path in fetch(versions, platform, python, Path(folder)):
            yield File(f"{_WHEELS}/{path.name}", path)
    yield File(f"{_WHEELS}/{name}", wheel)
    versions = {**versions, "cusprun": facts.cusprun_version}
    yield File("requirements.txt", requirement_lines(versions).encode())
    yield File("bundle.json", _settings(facts, platform, python))
    for script in ("install.py", "start.py", "smoke.py"):
        yield text_file(script, f"bundle/{script}.j2", executable=True)
    is_windows = MACHINES[platform].os_name == "nt"
    for script in _SCRIPTS[MACHINES[platform].os_name]:
        text = render(f"bundle/{script}.j2", python=python)
        yield File(script, (text.replace("\n", "\r\n") if is_windows else text).encode(), executable=True)
    route, body = question(facts)
    yield text_file(
        "README.md",
        "bundle/README.md.j2",
        facts=facts,
        platform=platform,
        python=python,
        is_windows=is_windows,
        libraries=_libraries(facts, platform),
        route=route,
        body=body,
    )
    yield from artifact_files(facts)


def _settings(facts: Facts, platform: str, python: str) -> bytes:
    """Return what the scripts read: a list of words needs no quoting on any system."""
    machine, sizing = MACHINES[platform], facts.sizing
    plain = {
        "artifact": artifact_path(facts),
        "options": [
            "--name", facts.model,
            "--context", str(sizing.context_tokens),
            "--parallel", str(sizing.parallel),
            *([] if sizing.num_threads is None else ["--threads", str(sizing.num_threads)]),
        ],
        "platform": platform,
        "system": machine.platform_system,
        "machine": machine.platform_machine,
        "python": python,
        "memory_bytes": sizing.memory_limit_bytes,
        "asks": question(facts)[0],
        "module": ENGINE_MODULES[facts.engine],
        "libraries": _libraries(facts, platform),
    }  # fmt: skip
    return (json.dumps(plain, ensure_ascii=True, indent=2, sort_keys=True) + "\n").encode()


def _libraries(facts: Facts, platform: str) -> str:
    """Return what the wheels take from the system, empty where that is always there."""
    return LIBRARIES.get((MACHINES[platform].sys_platform, facts.engine), "")


def _platform(options: Mapping[str, str | None]) -> str:
    found = options.get("platform") or this_platform()
    if found is None:
        raise UserError(f"this machine is none of {', '.join(MACHINES)}; say which one with --platform")
    return found
