"""A systemd service: a hardened unit, its environment file, and an installer of the program beside them.

The folder becomes ``prefix``. The program is installed there from pinned requirements, without cusprun's own
dependencies, which serving never imports (see ``deploy.bundle``); vLLM has an environment of its own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cusprun.errors import UserError
from deploy.facts import Facts
from deploy.own_wheel import own_wheel
from deploy.platforms import marker_environment, python_there, this_platform
from deploy.render import File, artifact_files, artifact_path, question, text_file
from deploy.requirements import ENGINE_MODULES, LIBRARIES, pinned
from deploy.wheelhouse import requirement_lines

_PREFIX = re.compile(r"(/[A-Za-z0-9._-]+)+")
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp", "/dev", "/proc", "/sys")
"""What the unit's sandbox replaces: ProtectHome, PrivateTmp and the kernel's own."""

_TASKS_PER_THREAD = 4
_FEWEST_TASKS = {True: 4096, False: 512}
"""Two processes, and the pools of threads of their libraries on a machine of many cores; vLLM compiles with
as many processes as there are cores."""

_MAX_PORT = 65535


def check(facts: Facts, options: Mapping[str, str | None]) -> None:
    """Raise ``UserError`` for a place, an address, a port or a Python that cannot be."""
    vllm = _plain_path(options.get("vllm") or "", "vllm")
    for option, path in (("prefix", prefix_of(facts, options)), ("vllm", vllm)):
        _refuse_hidden(path, option)
    _port(options)
    python_there(options.get("python"))
    host = options.get("host") or ""
    if not re.fullmatch(r"[A-Za-z0-9.:-]+", host):
        raise UserError(f"the option host must be an address or a name, not {host!r}")
    if facts.artifact_name.startswith("-"):
        raise UserError(f"the name {facts.artifact_name!r} looks like an option; rename it")


def files(facts: Facts, options: Mapping[str, str | None]) -> Iterator[File]:
    """Yield unit, environment file, installer, cusprun's wheel, the model and the README."""
    python = python_there(options.get("python"))
    versions = pinned(facts.versions, marker_environment(this_platform() or "linux-x86_64", python))
    wheel_name, wheel = own_wheel()
    values = {**_values(facts, options), "python": python, "wheel": wheel_name}
    yield text_file(f"{facts.name}.service", "systemd/unit.service.j2", **values)
    yield text_file(f"{facts.name}.env", "systemd/unit.env.j2", **values)
    yield text_file("install.sh", "systemd/install.sh.j2", executable=True, **values)
    yield text_file("wait.py", "systemd/wait.py.j2", **values)
    yield text_file("README.md", "systemd/README.md.j2", **values)
    yield File("requirements.txt", requirement_lines(versions).encode())
    yield File(wheel_name, wheel)
    yield from artifact_files(facts)


def _values(facts: Facts, options: Mapping[str, str | None]) -> dict[str, Any]:
    prefix, host = prefix_of(facts, options), str(options.get("host"))
    route, body = question(facts)
    env = f"{prefix}/{facts.name}.env"
    is_open = not _is_loopback(host)
    key = f' -H "Authorization: Bearer $(sudo sed -n s/^CUSPRUN_API_KEY=//p {env})"'
    return {
        "facts": facts,
        "prefix": prefix,
        "artifact": f"{prefix}/{artifact_path(facts)}",
        "host": host,
        "is_loopback": not is_open,
        "port": _port(options),
        "url": f"http://{f'[{host}]' if ':' in host else host}:{_port(options)}",
        "key_header": key if is_open else "",
        "vllm": options.get("vllm"),
        "is_gpu": facts.engine == "vllm",
        "limit_mib": facts.memory_limit_mib,
        "tasks": max(
            _FEWEST_TASKS[facts.engine == "vllm"], _TASKS_PER_THREAD * (facts.sizing.num_threads or 0)
        ),
        "module": ENGINE_MODULES.get(facts.engine),
        "libraries": LIBRARIES.get(("linux", facts.engine), ""),
        "route": route,
        "body": body,
    }


def prefix_of(facts: Facts, options: Mapping[str, str | None]) -> str:
    """Return the folder on the target machine; raises ``UserError`` for no plain absolute path."""
    return _plain_path(options.get("prefix") or f"/opt/{facts.name}", "prefix")


def _plain_path(path: str, option: str) -> str:
    if not _PREFIX.fullmatch(path) or any(part in (".", "..") for part in path.split("/")):
        raise UserError(
            f"the option {option} must be an absolute path of letters, digits, dots, hyphens, not {path!r}"
        )
    return path


def _refuse_hidden(path: str, option: str) -> None:
    hidden = next((folder for folder in _HIDDEN if f"{path}/".startswith(f"{folder}/")), None)
    if hidden is not None:
        raise UserError(
            f"the service sees nothing below {hidden}; choose another {option} than {path}, such as one "
            "below /opt or /srv"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _port(options: Mapping[str, str | None]) -> int:
    text = options.get("port") or ""
    if not text.isdecimal() or not text.isascii() or not 1 <= int(text) <= _MAX_PORT:
        raise UserError(f"the option port must be from 1 to {_MAX_PORT}, not {text!r}")
    return int(text)
