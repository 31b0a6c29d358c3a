"""A systemd service: a hardened unit, its environment file, and an installer of the program beside them.

The folder becomes ``prefix``. The program is installed there from pinned requirements, without cusprun's own
dependencies, which serving never imports (see ``deploy.bundle``); vLLM has an environment of its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from cusprun.errors import UserError
from deploy.facts import Facts
from deploy.own_wheel import own_wheel
from deploy.platforms import marker_environment, this_platform
from deploy.render import File, artifact_files, artifact_path, question, text_file
from deploy.requirements import pinned
from deploy.wheelhouse import requirement_lines

_PREFIX = re.compile(r"(/[A-Za-z0-9._-]+)+")
_TASKS_PER_THREAD = 4
_FEWEST_TASKS = 512  # two processes, and the pools of threads of their libraries on a machine of many cores
_MAX_PORT = 65535


def check(facts: Facts, options: Mapping[str, str | None]) -> None:
    """Raise ``UserError`` for a place, an address or a port that cannot be."""
    prefix_of(facts, options)
    _port(options)
    _plain_path(options.get("vllm") or "", "vllm")
    host = options.get("host") or ""
    if not re.fullmatch(r"[A-Za-z0-9.:-]+", host):
        raise UserError(f"the option host must be an address or a name, not {host!r}")
    if facts.artifact_name.startswith("-"):
        raise UserError(f"the name {facts.artifact_name!r} looks like an option; rename it")


def files(facts: Facts, options: Mapping[str, str | None]) -> Iterator[File]:
    """Yield unit, environment file, installer, cusprun's wheel, the model and the README."""
    prefix = prefix_of(facts, options)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = pinned(facts.versions, marker_environment(this_platform() or "linux-x86_64", python))
    wheel_name, wheel = own_wheel()
    route, body = question(facts)
    values: dict[str, Any] = {
        "facts": facts,
        "prefix": prefix,
        "artifact": f"{prefix}/{artifact_path(facts)}",
        "host": options.get("host"),
        "port": _port(options),
        "vllm": options.get("vllm"),
        "tasks": max(_FEWEST_TASKS, _TASKS_PER_THREAD * (facts.sizing.num_threads or 0)),
        "wheel": wheel_name,
        "route": route,
        "body": body,
        "python": python,
    }
    yield text_file(f"{facts.name}.service", "systemd/unit.service.j2", **values)
    yield text_file(f"{facts.name}.env", "systemd/unit.env.j2", **values)
    yield text_file("install.sh", "systemd/install.sh.j2", executable=True, **values)
    yield text_file("README.md", "systemd/README.md.j2", **values)
    yield File("requirements.txt", requirement_lines(versions).encode())
    yield File(wheel_name, wheel)
    yield from artifact_files(facts)


def prefix_of(facts: Facts, options: Mapping[str, str | None]) -> str:
    """Return the folder on the target machine; raises ``UserError`` for no plain absolute path."""
    return _plain_path(options.get("prefix") or f"/opt/{facts.name}", "prefix")


def _plain_path(path: str, option: str) -> str:
    if not _PREFIX.fullmatch(path) or any(part in (".", "..") for part in path.split("/")):
        raise UserError(
            f"the option {option} must be an absolute path of letters, digits, dots, hyphens, not {path!r}"
        )
    return path


def _port(options: Mapping[str, str | None]) -> int:
    text = options.get("port") or ""
    if not text.isdecimal() or not text.isascii() or not 1 <= int(text) <= _MAX_PORT:
        raise UserError(f"the option port must be from 1 to {_MAX_PORT}, not {text!r}")
    return int(text)
