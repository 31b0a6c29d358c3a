"""A run that a launcher such as torchrun has given to several processes: how they meet, and how they end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cusprun.errors import CusprunError, RankError, UserError
from cusprun.version import __version__
from cusprun.walk.launch import Launch, launch_of
from cusprun.walk.ranks import ALONE, Ranks
from cusprun.walk.watch import Failure, Watch

if TYPE_CHECKING:
    from cusprun.walk.group import GroupRanks

START_S = 300.0
"""How long the processes wait for one another at the start: they load torch from one disk, and no model."""

STORE_S = 60.0
"""How long the store may take to answer once all have met."""

WORD_S = 20.0
"""How long a process that fails before all have met waits until the first one has said why."""

_TOLD = "told"
_PAUSE_S = 0.02

OnFailure = Callable[[Failure], None]


class SharedRun:
    """This process' part in a run; where no launcher started several, it is alone and this does nothing.

    As a context manager it makes a failure of its block known to the other processes and waits at a good end
    until all have come to theirs. A process opens one at a time.
    """

    def __init__(self, environment: Mapping[str, str], on_failure: OnFailure | None = None) -> None:
        """Read what the launcher says; raises ``UserError`` when that contradicts itself.

        ``on_failure`` is called in a thread of its own when the run fails elsewhere.
        """
        self.launch = launch_of(environment)
        self._on_failure = on_failure
        self._watch: Watch | None = None
        self._ranks: GroupRanks | None = None
        self._ended_well = False

    def ranks(self) -> Ranks:
        """Return the ranks, once all have come with the same version of the package.

        Raises:
            RankError: a process did not come, or its launcher cannot be reached.
            UserError: a process runs another version, or torch cannot join processes.
        """
        if self.launch is None:
            return ALONE
        if self._ranks is None:
            self._ranks = _joined(self.launch, self._connected(self.launch))
        return self._ranks

    def _connected(self, launch: Launch) -> Watch:
        """Return the watch on the launcher's store."""
        if self._watch is None:
            self._watch = Watch(_store(launch), launch.rank, launch.size, on_failure=self._on_failure)
        return self._watch

    def failed(self, exit_code: int, text: str, *, told_to_end: bool = False) -> Failure:
        """Make a failure of this process known; return it, or another's where that is why this one ends.

        ``told_to_end`` says that a signal did, as a launcher sends when another process has failed.
        """
        if self.launch is None:
            return Failure(0, exit_code, text)
        rank = self.launch.rank
        own, known = Failure(rank, exit_code, text), Failure(rank, exit_code, f"rank {rank} failed: {text}")
        first: Failure | None = None
        if self._ranks is not None:
            cause = self._ranks.watch.explain() if told_to_end else None
            self._ranks.watch.close()
            first = cause or self._ranks.watch.post(known)
        elif self.launch.store_is_kept and not _is_half_loaded("torch"):
            first = self._failed_alone(self.launch, known)
        if first is None or first == known:
            return own
        is_echo = first.text == text  # this one only passes on what it was told
        return first if told_to_end or is_echo else own

    def _failed_alone(self, launch: Launch, known: Failure) -> Failure | None:
        """Make a failure known before all have met; return the first that was.

        A launcher ends all as soon as one has ended: so the others wait for the first, which is to speak.
        """
        try:
            watch = self._connected(launch)
            first = watch.post(known)
            if launch.is_first:
                watch.store.set(_TOLD, "1")
            deadline = time.monotonic() + WORD_S
            while not launch.is_first and not watch.store.check([_TOLD]) and time.monotonic() < deadline:
                time.sleep(_PAUSE_S)
        except (RankError, RuntimeError):  # nobody to tell
            return None
        return first

    def finish(self) -> None:
        """Wait until every rank has come to its good end; raises ``RankError`` when one does not."""
        if self._ranks is not None:
            self._ranks.watch.expect_the_end()
            self._ranks.meet()
            self._ended_well = True

    def close(self) -> None:
        """Leave the group."""
        if self._ranks is not None:
            self._ranks.watch.close()
            if self._ended_well:
                self._ranks.links.close()
            else:
                self._ranks.links.abandon()
            self._ranks = None

    def __enter__(self) -> SharedRun:
        """Return the run."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell the others of a failure, or wait for their good end; leave the group."""
        try:
            if error is None:
                self.finish()
            elif not isinstance(error, RankError):
                code = error.exit_code if isinstance(error, CusprunError) else 1
                self.failed(code, str(error) or type(error).__name__)
        finally:
            self.close()


def _joined(launch: Launch, watch: Watch) -> GroupRanks:
    """Meet the other processes and join the group."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError(
            "this build of torch cannot join processes (it has no gloo); install another build, or start one "
            "process"
        )
    from cusprun.walk.group import GroupRanks, Links

    watch.begin()
    _meet(watch, launch)
    watch.store.set_timeout(timedelta(seconds=STORE_S))
    links = Links(watch.store, launch, timedelta(seconds=START_S))
    watch.start()
    return GroupRanks(launch.rank, launch.size, launch.local_rank, links, watch)


def _is_half_loaded(package: str) -> bool:
    """Whether a signal ended the import of a package: to import torch again can then end the process."""
    return package not in sys.modules and any(name.startswith(f"{package}.") for name in sys.modules)


def _store(launch: Launch) -> Any:
    """Return the launcher's store of keys and values, with a part of it for this run alone."""
    import torch.distributed

    dist: Any = torch.distributed  # its type hints leave out what it is made of
    try:
        store = dist.TCPStore(
            launch.address,
            launch.port,
            launch.size,
            is_master=launch.is_first and not launch.store_is_kept,
            timeout=timedelta(seconds=START_S),
            wait_for_workers=False,
        )
        prefix = f"cusprun/{launch.attempt}"
        runs = store.add(f"{prefix}/runs/{launch.rank}", 1)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RankError(
            f"rank {launch.rank} cannot reach the launcher's store at {launch.address}:{launch.port} "
            f"({reason:.200}); check MASTER_ADDR, MASTER_PORT and the network"
        ) from None
    return dist.PrefixStore(f"{prefix}/{runs}", store)


def version_of_this() -> str:
    """Return the version that all processes must have."""
    return __version__


def _meet(watch: Watch, launch: Launch) -> None:
    """Wait until every process is here.

    Raises:
        RankError: one does not come, or failed before.
        UserError: their versions differ.
    """
    import torch

    from cusprun.walk.group import require_equal

    about = {"version of cusprun": version_of_this(), "version of torch": torch.__version__.partition("+")[0]}
    keys = [f"here/{rank}" for rank in range(launch.size)]
    store = watch.store
    store.set(keys[launch.rank], json.dumps(about))
    deadline = time.monotonic() + START_S
    while not store.check(keys):
        watch.read()
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise RankError(
                f"of {launch.size} processes rank {', '.join(map(str, missing))} did not come within "
                f"{START_S:.0f} s; start every one with the same command"
            )
        time.sleep(_PAUSE_S)
    require_equal([json.loads(text) for text in store.multi_get(keys)])
