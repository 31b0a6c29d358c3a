"""What a launcher such as torchrun tells each process of a run, in the variables of its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cusprun.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch's own launcher sets, and others that start torch programs."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Launch:
    """One process of several: who it is, and where the launcher's store of keys and values listens.

    ``local_rank`` and ``local_size`` count the processes of one machine. ``store_is_kept`` says that the
    launcher itself holds the store; else the first rank does. ``attempt`` counts the launcher's restarts.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    store_is_kept: bool = False
    attempt: int = 0

    @property
    def is_on_one_machine(self) -> bool:
        """Whether no process is on another machine, so that nothing needs to be heard from outside."""
        return self.local_size == self.size

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints."""
        return self.rank == 0


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """Return what a launcher says; None when there is none, or it started this process alone.

    Raises:
        UserError: the variables contradict one another or are no numbers.
    """
    if not all(environment.get(name) for name in VARIABLES) or environment["WORLD_SIZE"] == "1":
        return None
    rank, size, port = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    alone_here = environment["MASTER_ADDR"] in _LOOPBACK
    launch = Launch(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", rank if alone_here else 0),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", size if alone_here else 1),
        address=environment["MASTER_ADDR"],
        port=port,
        store_is_kept=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
    )
    if not rank < size or not launch.local_rank < launch.local_size <= size or not 0 < port < 2**16:
        raise UserError(
            f"the launcher's variables contradict one another (RANK={rank}, WORLD_SIZE={size}, "
            f"LOCAL_RANK={launch.local_rank}, LOCAL_WORLD_SIZE={launch.local_size}, MASTER_PORT={port}); "
            "start the command with torchrun, or unset WORLD_SIZE"
        )
    return launch


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise UserError(
            f"the variable {name} must be a whole number, not {text!r:.40}; start the command with torchrun, "
            "or unset WORLD_SIZE"
        )
    return int(text)
