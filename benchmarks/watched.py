"""A command that is run to its end while the kernel is asked what it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from processes import anonymous_bytes

from cusprun.clock import VARIABLE
from cusprun.errors import CusprunError

ROOT = Path(__file__).parent.parent
_MEMORY_EVERY_S = 0.02
_DISK_EVERY_S = 0.5
_TOLD_LINES = 12
_BLOCK_BYTES = 512
"""The unit of ``st_blocks``, whatever the file system's own."""


class CommandError(CusprunError):
    """A command that a benchmark ran has failed; the text has the end of what it said."""


@dataclass(frozen=True)
class Watched:
    """What a command took and said.

    ``anonymous_bytes`` is the most that no file held (``RssAnon`` and ``RssShmem``), asked for every 20 ms.
    ``resident_bytes`` counts pages of files too, which the kernel takes back when others need them:
    ``VmHWM`` as last seen, and ``max_resident_bytes`` as the kernel's accounting has it at the end
    (``ru_maxrss``, which is at least what the parent held when it started the command). ``disk_bytes`` is the
    most that stood in the folders, unlinked files included.
    """

    seconds: float
    anonymous_bytes: int
    resident_bytes: int
    max_resident_bytes: int
    disk_bytes: int
    output: str


def cusprun(*arguments: object) -> list[str]:
    """Return the command line of cusprun with some arguments."""
    return [sys.executable, "-m", "cusprun", *map(str, arguments)]


def watched(
    command: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, folders: Iterable[Path] = ()
) -> Watched:
    """Run a command and watch it; what it says goes to the file ``log``.

    Args:
        command: the program and its arguments; it must do its work in its own process.
        log: a file that is made, or written anew.
        env: what is added to the environment, from which ``SOURCE_DATE_EPOCH`` is taken: a manifest that
            has to be equal to the byte tells no durations.
        folders: where its files are counted.

    Raises:
        CommandError: it ended with another exit code than 0.
    """
    places = tuple(folders)
    inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
    log.parent.mkdir(parents=True, exist_ok=True)
    anonymous = resident = disk = 0
    looked_at_disk = 0.0
    with log.open("wb") as stream:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env={**inherited, **(env or {})}
        )
        try:
            while True:
                # Not poll(): only wait4 tells what the kernel counted.
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                if ended:
                    break
                anonymous = max(anonymous, anonymous_bytes(process.pid))
                resident = max(resident, _high_water_bytes(process.pid))
                if places and time.monotonic() - looked_at_disk > _DISK_EVERY_S:
                    disk = max(disk, _disk_bytes(places, process.pid))
                    looked_at_disk = time.monotonic()
                time.sleep(_MEMORY_EVERY_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    output = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        told = "\n".join(output.splitlines()[-_TOLD_LINES:])
        raise CommandError(f"{' '.join(command)} ended with {process.returncode}:\n{told}")
    disk = max(disk, sum(_file_bytes(places)))
    return Watched(seconds, anonymous, resident, usage.ru_maxrss << 10, disk, output)


def _high_water_bytes(pid: int) -> int:
    """Return the most that was resident so far; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


def _disk_bytes(folders: Sequence[Path], pid: int) -> int:
    """Return what stands in some folders and in the unlinked files that a process has open."""
    return sum(_file_bytes(folders)) + sum(_unlinked_bytes(pid))


def _file_bytes(folders: Sequence[Path]) -> Iterator[int]:
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):  # gone meanwhile
                    yield (Path(path) / name).lstat().st_blocks * _BLOCK_BYTES


def _unlinked_bytes(pid: int) -> Iterator[int]:
    seen = set()
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found = entry.stat()
                if S_ISREG(found.st_mode) and not found.st_nlink and found.st_ino not in seen:
                    seen.add(found.st_ino)
                    yield found.st_blocks * _BLOCK_BYTES
