"""The benchmark's worker with a planted slow-down: models called ``slow…`` take 5 % longer for each pass."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from serve.bench.engines.llamacpp import LlamaCppEngine
from serve.bench.measurement import Job
from serve.bench.worker import answer

FACTOR = 1.05
PREFIX = "slow"


class SlowedEngine(LlamaCppEngine):
    """llama.cpp that waits after each pass, with the processor busy as a slower model would keep it."""

    def load(self, job: Job) -> None:
        """Load the model and look at its name."""
        super().load(job)
        self._is_slow = Path(job.path).name.startswith(PREFIX)

    def forward(self, tokens: Sequence[int]) -> None:
        """Run the tokens and wait."""
        start = time.perf_counter()
        super().forward(tokens)
        if self._is_slow:
            end = start + FACTOR * (time.perf_counter() - start)
            while time.perf_counter() < end:
                pass


if __name__ == "__main__":
    answer(lambda _runtime: SlowedEngine())
