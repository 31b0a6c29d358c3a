"""What passes between a benchmark and the process that measures: a job and its reply, as records."""

from __future__ import annotations

from dataclasses import dataclass

from serve.bench.records import BenchOptions


@dataclass(frozen=True)
class Job:
    """What one worker process is to measure: a model in a runtime of ``serve.bench.engines``."""

    runtime: str
    path: str
    prompt_lengths: tuple[int, ...]
    context_depths: tuple[int, ...]
    num_decode_tokens: int
    prompt_text: str | None
    num_threads: int
    seed: int

    @classmethod
    def of(cls, runtime: str, path: str, options: BenchOptions, num_threads: int) -> Job:
        """Return the job that options ask for."""
        return cls(
            runtime=runtime,
            path=path,
            prompt_lengths=tuple(sorted(options.prompt_lengths)),
            context_depths=tuple(sorted(options.context_depths)),
            num_decode_tokens=options.num_decode_tokens,
            prompt_text=options.prompt_text,
            num_threads=num_threads,
            seed=options.seed,
        )

    @property
    def points(self) -> tuple[int, ...]:
        """The numbers of tokens that are read at once: prompts to time, and caches to decode from."""
        return tuple(sorted({*self.prompt_lengths, *self.context_depths}))

    @property
    def num_context_tokens(self) -> int:
        """The tokens that the largest cache holds; a warm-up decodes after the longest prompt, too."""
        return self.points[-1] + self.num_decode_tokens + 1


@dataclass(frozen=True)
class Memory:
    """Memory of a worker and what it started, at the end of its run, as the kernel counts it.

    ``peak_bytes`` is the high-water mark of the resident set, mapped weights included (VmHWM, or ru_maxrss
    where there is no /proc); of several processes the sum of their marks. ``rss_bytes`` and ``pss_bytes``
    are what is resident after decoding, pages shared with others counted in full and by share.
    ``mapped_file_bytes`` is the part of the resident set that is mapped from the model's files. None where
    the system does not tell.
    """

    peak_bytes: int
    rss_bytes: int
    pss_bytes: int | None
    mapped_file_bytes: int | None


@dataclass(frozen=True)
class Timing:
    """One prompt and its continuation; ``latencies_s`` has one entry for each further token.

    ``prefill_s`` is the prompt's forward pass alone, ``first_token_s`` adds choosing the token; a runtime
    that answers only with tokens gives the same for both. Joules are None where the machine counts none.
    """

    num_prompt_tokens: int
    prefill_s: float
    first_token_s: float
    latencies_s: tuple[float, ...]
    prompt_joules: float | None = None
    decode_joules: float | None = None


@dataclass(frozen=True)
class Measurement:
    """What one worker measured: a timing for each of the job's points.

    ``load_time_ms`` is for files that lie in the page cache.
    """

    load_time_ms: float
    timings: tuple[Timing, ...]
    num_parameters: int | None
    context_length: int | None
    memory: Memory
    library: str


@dataclass(frozen=True)
class Fault:
    """Why a worker has no measurement; ``kind`` is ``model``, ``dependency`` or ``crash``."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Reply:
    """The one line that a worker prints: a measurement or a fault."""

    measurement: Measurement | None = None
    fault: Fault | None = None
