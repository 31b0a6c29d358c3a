"""One thread that works on several jobs in turn, one step each."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")
ENDED = "the server is ending"
REST_AFTER_S = 10.0


class Job(Generic[T]):
    """Work that is done in steps, each of which may give something to ``deliver``.

    ``steps`` makes the work's generator when the job's turn comes; ``deliver`` gets what it yields, but None;
    ``failed`` gets the exception that ends it early. All three are called in the scheduler's thread.
    """

    def __init__(
        self,
        steps: Callable[[], Generator[T | None, None, None]],
        deliver: Callable[[T], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.steps = steps
        self.deliver = deliver
        self.failed = failed
        self.is_cancelled = False


class Scheduler:
    """Works on up to ``parallel`` jobs; the others wait in the order in which they came.

    ``rest`` is called, in the scheduler's thread, once there has been no job for ``rest_after_s``.
    """

    def __init__(
        self, parallel: int, rest: Callable[[], None] = lambda: None, rest_after_s: float = REST_AFTER_S
    ) -> None:
        self._parallel = parallel
        self._rest = rest
        self._rest_after_s = rest_after_s
        self._is_rested = True
        self._waiting: deque[Job[object]] = deque()
        self._active: list[tuple[Job[object], Generator[object, None, None]]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Jobs that are worked on."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for one of those to end."""
        return len(self._waiting)

    def submit(self, job: Job[T]) -> None:
        """Add a job; raises ``RuntimeError`` when the thread has ended."""
        with self._changed:
            if self._is_closed:
                raise RuntimeError(self.failure or ENDED)
            self._waiting.append(job)  # type: ignore[arg-type]  # each job gets only what it yields itself
            self._changed.notify()

    def cancel(self, job: Job[T]) -> None:
        """End a job after the step that is being worked on, if any; it gets nothing more."""
        with self._changed:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the thread after the step that is being worked on; jobs that are left fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                self._active = [pair for pair in self._active if _step(*pair)]
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self._changed:
                self._is_closed = True
                active, waiting = self._active, list(self._waiting)
                self._active = []
                self._waiting.clear()
            for job, steps in active:
                steps.close()
                job.failed(RuntimeError(ENDED))
            for job in waiting:
                job.failed(RuntimeError(ENDED))

    def _admit(self) -> bool:
        """Wait until there is work and take one more job if there is room; False when closed.

        One at a time, since a job's first step, which reads its prompt, is the longest.
        """
        with self._changed:
            while not (self._waiting or self._active or self._is_closed):
                if not self._changed.wait(None if self._is_rested else self._rest_after_s):
                    self._rest()
                    self._is_rested = True
            self._is_rested = False
            if self._waiting and len(self._active) < self._parallel and not self._is_closed:
                job = self._waiting.popleft()
                self._active.append((job, job.steps()))
            return not self._is_closed


def _step(job: Job[object], steps: Generator[object, None, None]) -> bool:
    """Do one step of a job; False when it has ended."""
    if job.is_cancelled:
        steps.close()
        return False
    try:
        made = next(steps)
    except StopIteration:
        return False
    except Exception as error:
        job.failed(error)
        return False
    if made is not None and not job.is_cancelled:
        job.deliver(made)
    return True
