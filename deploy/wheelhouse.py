"""Wheels for another machine, fetched with pip; what has no wheel there is refused with pip's own reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cusprun.errors import MissingDependencyError, UserError
from deploy.platforms import MACHINES

_TIMEOUT_S = 1800.0
_NO_INDEX = "after connection broken by"
"""What pip says when it tries again to reach an index."""


def requirement_lines(versions: Mapping[str, str]) -> str:
    """Return pinned requirements, one a line."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def fetch(versions: Mapping[str, str], platform: str, python_version: str, folder: Path) -> list[Path]:
    """Fetch the wheel of every package into ``folder`` and return them in order.

    Raises:
        UserError: a package has no wheel for that machine and Python; the text ends with pip's last line.
        MissingDependencyError: pip is not there.
    """
    machine = MACHINES[platform]
    wanted = folder / "requirements.txt"
    wanted.write_text(requirement_lines(versions), encoding="utf-8")
    wheels = folder / "wheels"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--only-binary=:all:", "--no-deps", "--implementation", "cp", "--python-version", python_version,
        *(word for tag in machine.tags for word in ("--platform", tag)),
        "--dest", str(wheels), "--requirement", str(wanted),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the wheels for {platform} were not fetched within {_TIMEOUT_S:.0f} s; try again later"
        ) from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        broken = next((line for line in lines if _NO_INDEX in line), None)
        if broken is not None:
            raise UserError(
                f"the package index cannot be reached ({broken.removeprefix('WARNING: '):.300}); check the "
                "network and pip's settings"
            )
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        if "No module named pip" in reason:
            raise MissingDependencyError("pip is not installed here; run: python -m ensurepip")
        raise UserError(
            f"the wheels for {platform} with Python {python_version} cannot be fetched: {reason}; choose "
            "another platform or -o python=VERSION"
        )
    return sorted(wheels.iterdir())
