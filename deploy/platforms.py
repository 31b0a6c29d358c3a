"""The machines that wheels can be fetched for: what pip and environment markers call them. Data."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from cusprun.errors import UserError

_PYTHON = re.compile(r"3\.(\d{1,2})", re.ASCII)
_OLDEST_MINOR = 10


@dataclass(frozen=True)
class Machine:
    """One platform: the tags of wheels that run on it, and the values that environment markers see there."""

    tags: tuple[str, ...]
    sys_platform: str
    platform_system: str
    platform_machine: str
    os_name: str = "posix"


def _linux(machine: str) -> Machine:
    # glibc 2.28 is what current distributions have at least (RHEL 8, Debian 10, Ubuntu 18.10).
    glibc = tuple(f"manylinux_2_{minor}_{machine}" for minor in range(28, 16, -1))
    return Machine((*glibc, f"manylinux2014_{machine}"), "linux", "Linux", machine)


MACHINES: Mapping[str, Machine] = {
    "linux-x86_64": _linux("x86_64"),
    "linux-aarch64": _linux("aarch64"),
    "macos-arm64": Machine(("macosx_14_0_arm64",), "darwin", "Darwin", "arm64"),
    "windows-x86_64": Machine(("win_amd64",), "win32", "Windows", "AMD64", "nt"),
}


def this_platform() -> str | None:
    """Return the name of this machine's platform, None when wheels are fetched for no such one."""
    machine = platform.machine()
    return next(
        (
            name
            for name, known in MACHINES.items()
            if known.sys_platform == sys.platform and known.platform_machine == machine
        ),
        None,
    )


def python_there(stated: str | None) -> str:
    """Return the Python ``major.minor`` of the other machine, this one's where none is stated.

    Raises:
        UserError: it is no version that cusprun runs on.
    """
    if stated is None:
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    match = _PYTHON.fullmatch(stated)
    if match is None or int(match[1]) < _OLDEST_MINOR:
        raise UserError(f"the option python must be a version from 3.{_OLDEST_MINOR} on, not {stated!r}")
    return stated


def marker_environment(name: str, python_version: str) -> dict[str, str]:
    """Return what environment markers see on a platform with a CPython ``major.minor``."""
    machine = MACHINES[name]
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python_version}.0",
        "os_name": machine.os_name,
        "platform_machine": machine.platform_machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": machine.platform_system,
        "platform_version": "",
        "python_full_version": f"{python_version}.0",
        "python_version": python_version,
        "sys_platform": machine.sys_platform,
        "extra": "",
    }
