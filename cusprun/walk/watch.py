"""Whether the other processes of a run are alive, and why the run ended: a beat each second, one failure.

Collectives cannot tell a peer that computes for an hour from one that hangs, and their own timeouts would end
the former. So every rank beats in the launcher's store, from a thread of its own that no computation stops;
the first rank watches all others, and all others watch the first.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from cusprun.errors import RankError

BEAT_S = 1.0
SILENT_S = 60.0
"""A rank that has not beaten for this long hangs or is cut off; no work stops its beating thread so long."""

SUSPECT_BEATS = 3
"""Once a connection broke or a process was told to end, whoever misses this many beats is gone; two beats
later the others know."""

LOST_CODE = 3
"""The exit code when a process ended without a word: no user's fault, and none of ours to report."""

RESUME = "the same command goes on from what is finished"

_FAILURE, _SUSPECT, _AGAIN = "failure", "suspect", "again"
_PAUSE_S = 0.02


@dataclass(frozen=True)
class Failure:
    """Why a run ended: the rank, the exit code, one sentence; ``is_silent`` when others had to find it."""

    rank: int
    exit_code: int
    text: str
    is_silent: bool = False

    def error(self) -> RankError:
        """Return the failure as every other rank raises it."""
        return RankError(self.text, self.exit_code)


class Watch:
    """This rank's beat and its eyes: :meth:`begin`, :meth:`start` once all have, :meth:`close` at the end.

    ``on_failure`` is called once, in a thread of its own, when the run fails elsewhere: the main thread may
    be in a computation that no collective ends.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        on_failure: Callable[[Failure], None] | None = None,
        beat_s: float = BEAT_S,
        silent_s: float = SILENT_S,
    ) -> None:
        self.store, self._rank = store, rank
        self._watched = tuple(range(1, size)) if rank == 0 else (0,)
        self._on_failure, self._silent_s = on_failure, silent_s
        # The first rank reads every beat: not more than 64 keys each second.
        self._beat_s = beat_s * max(1.0, size / 64)
        self._beats: dict[int, bytes] = {}
        self._seen: dict[int, float] = {}
        self._failure: Failure | None = None
        self._again = 0
        self._ending = threading.Event()
        self._closed = threading.Event()
        self._found = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cusprun-watch", daemon=True)

    def begin(self) -> None:
        """Leave the first beat, which the others may look for once they know of this rank."""
        self.store.set(_beat_key(self._rank), "0")

    def start(self) -> None:
        """Beat and look, from now on."""
        self._thread.start()

    def expect_the_end(self) -> None:
        """Take a store that goes for no failure: whoever holds it may be the first to leave."""
        self._ending.set()

    def close(self) -> None:
        """Stop; what happens to the others or to the store is no failure any more."""
        self._ending.set()
        self._closed.set()
        if self._thread.is_alive() and not self._found.is_set():
            self._thread.join(self._beat_s * 2)

    def check(self) -> None:
        """Raise ``RankError`` when the run has failed."""
        if self._failure is not None:
            raise self._failure.error()

    def read(self) -> None:
        """Raise ``RankError`` when a failure was posted to this moment."""
        if self.store.check([_FAILURE]):
            raise Failure(**json.loads(self.store.get(_FAILURE))).error()

    def call_again(self, number: int) -> None:
        """Ask every rank to begin its work again, for the ``number``-th time."""
        self.store.set(_AGAIN, str(number))
        self._again = number

    def asked_again(self, *, now: bool = False) -> int:
        """Return how many times that was asked, to a beat or, with ``now``, to this moment."""
        if now:
            with suppress(RuntimeError):  # the store is gone, and so is the run
                self._again = self._asked()
        return self._again

    def _asked(self) -> int:
        return int(self.store.get(_AGAIN)) if self.store.check([_AGAIN]) else 0

    def wait_for(self, name: str, size: int) -> None:
        """Return when every rank has called this; raises ``RankError`` when the run fails meanwhile."""
        self.store.set(f"{name}/{self._rank}", "1")
        keys = [f"{name}/{rank}" for rank in range(size)]
        while not self.store.check(keys):
            self.check()
            time.sleep(_PAUSE_S)

    def post(self, failure: Failure) -> Failure:
        """Make a failure known to all ranks; return the first that was, which may be another's."""
        try:
            text = self.store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))
            first = Failure(**json.loads(text))
        except RuntimeError:  # the store went with whoever held it
            first = self._failure or failure
        self._failure = first
        return first

    def explain(self) -> Failure | None:
        """Return why the run fails, after a broken connection or a signal to end; None when nobody knows."""
        try:
            self.store.set(_SUSPECT, "1")
        except RuntimeError:
            self._failure = self._failure or self._storeless()
            return self._failure
        self._found.wait(self._beat_s * (SUSPECT_BEATS + 2))
        return self._failure

    def _run(self) -> None:
        count = 0
        while not self._closed.wait(self._beat_s):
            count += 1
            try:
                failure = self._look(count)
            except RuntimeError:
                if self._ending.is_set():
                    return
                failure = self._storeless()
            if failure is not None:
                self._failure = failure
                self._found.set()
                if self._on_failure is not None:
                    self._on_failure(failure)
                return

    def _look(self, count: int) -> Failure | None:
        """Beat, and return a failure that was posted or is seen."""
        self.store.set(_beat_key(self._rank), str(count))
        if self.store.check([_FAILURE]):
            return Failure(**json.loads(self.store.get(_FAILURE)))
        self._again = self._asked()
        limit = self._beat_s * SUSPECT_BEATS if self.store.check([_SUSPECT]) else self._silent_s
        moment = time.monotonic()
        beats = self.store.multi_get([_beat_key(rank) for rank in self._watched])
        for rank, beat in zip(self._watched, beats, strict=True):
            if self._beats.get(rank) != beat:
                self._beats[rank], self._seen[rank] = beat, moment
        silent = [rank for rank in self._watched if moment - self._seen[rank] > limit]
        return self.post(_silence(silent)) if silent else None

    def _storeless(self) -> Failure:
        return Failure(
            0,
            LOST_CODE,
            "the launcher, or the first process, which holds the store of this run, is gone or cannot be "
            f"reached; {RESUME}",
            is_silent=True,
        )


def _silence(ranks: list[int]) -> Failure:
    names = ", ".join(map(str, ranks))
    return Failure(
        ranks[0],
        LOST_CODE,
        f"{'rank' if len(ranks) == 1 else 'the ranks'} {names} ended without a word, killed or out of "
        f"memory, or cannot be reached; {RESUME}",
        is_silent=True,
    )


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
