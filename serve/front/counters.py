"""The front's own metrics: requests by how they ended, and how many are under way."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from serve.api.errors import ApiError

LEFT = 499
"""The status under which requests are counted whose client left before the end."""


class Counters:
    """Counts requests; to be used from one event loop."""

    def __init__(self) -> None:
        self.num_under_way = 0
        self._ended: Counter[int] = Counter()
        self._seconds = 0.0

    @contextmanager
    def request(self) -> Iterator[Seen]:
        """Count a request while it is under way, and how it ended by the exception that passes."""
        self.num_under_way += 1
        seen = Seen(self)
        try:
            yield seen
        except ApiError as error:
            seen.done(error.status)
            raise
        except BaseException:
            seen.done(500)
            raise
        finally:
            if not seen.goes_on:
                seen.done(LEFT)

    def end(self, status: int, seconds: float) -> None:
        """Count the end of a request."""
        self.num_under_way -= 1
        self._ended[status] += 1
        self._seconds += seconds

    def text(self) -> str:
        """Return the counters in Prometheus' text format."""
        lines = [
            "# HELP cusprun_requests_total Requests that ended, by status; 499: the client left.",
            "# TYPE cusprun_requests_total counter",
            *(f'cusprun_requests_total{{status="{s}"}} {n}' for s, n in sorted(self._ended.items())),
            "# HELP cusprun_request_seconds_total Seconds that ended requests took.",
            "# TYPE cusprun_request_seconds_total counter",
            f"cusprun_request_seconds_total {self._seconds:.6f}",
            "# HELP cusprun_requests_under_way Requests that are being answered or wait for it.",
            "# TYPE cusprun_requests_under_way gauge",
            f"cusprun_requests_under_way {self.num_under_way}",
        ]
        return "\n".join(lines) + "\n"


class Seen:
    """One request; its end is counted once."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._started = time.monotonic()
        self._is_done = False
        self.goes_on = False

    def done(self, status: int) -> None:
        """Count the end, unless it was."""
        if not self._is_done:
            self._is_done = True
            self._counters.end(status, time.monotonic() - self._started)

    def go_on(self) -> None:
        """Leave the end to :meth:`through`."""
        self.goes_on = True

    async def through(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass events on and count how the stream ended."""
        try:
            async for event in events:
                yield event
            self.done(200)
        except (GeneratorExit, asyncio.CancelledError):
            self.done(LEFT)
            raise
        except BaseException:
            self.done(500)
            raise
        finally:
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()
