"""What a benchmark measures: one row for each quantity, at each prompt length and context depth."""

from __future__ import annotations

from dataclasses import dataclass, replace

from serve.bench.records import BenchOptions


@dataclass(frozen=True)
class Metric:
    """One measured quantity; ``better`` is ``lower`` or ``higher``, the words say which way it went.

    ``is_speed`` marks those whose interval decides when to stop. One with a ``resolution`` hardly varies
    between runs: it needs no test, and changes by less than that share count as none.
    """

    name: str
    label: str
    unit: str
    better: str
    better_word: str = "faster"
    worse_word: str = "slower"
    is_speed: bool = False
    resolution: float | None = None

    def at(self, num_tokens: int) -> Metric:
        """Return the metric at a prompt length or a context depth."""
        name, label = at(self.name, num_tokens), f"{self.label}, {num_tokens:,} tokens"
        return replace(self, name=name, label=label)


def at(name: str, num_tokens: int) -> str:
    """Return the name of a metric at a prompt length or a context depth."""
    return f"{name}@{num_tokens}"


LOAD = Metric("load_time_ms", "Load time", "ms", "lower")
FIRST_TOKEN = Metric("time_to_first_token_ms", "Time to first token", "ms", "lower")
PROMPT_SPEED = Metric("prompt_tokens_per_second", "Prompt speed", "tokens/s", "higher", is_speed=True)
DECODE_SPEED = Metric("decode_tokens_per_second", "Decode speed", "tokens/s", "higher", is_speed=True)
LATENCIES = {
    0.5: Metric("inter_token_latency_p50_ms", "Inter-token latency, median", "ms", "lower"),
    0.9: Metric("inter_token_latency_p90_ms", "Inter-token latency, p90", "ms", "lower"),
    0.99: Metric("inter_token_latency_p99_ms", "Inter-token latency, p99", "ms", "lower"),
}
"""By the quantile of a run's latencies."""

_MEMORY = Metric("", "", "bytes", "lower", "less", "more", resolution=0.005)
PEAK_MEMORY = replace(_MEMORY, name="peak_memory_bytes", label="Peak memory")
STEADY_MEMORY = replace(_MEMORY, name="steady_memory_bytes", label="Memory after decoding (RSS)")
PSS = replace(_MEMORY, name="pss_bytes", label="Memory after decoding (PSS)")
MAPPED = replace(_MEMORY, name="mapped_file_resident_bytes", label="Of it, the mapped file")
_ENERGY = Metric("", "", "J/token", "lower", "less", "more")
PROMPT_ENERGY = replace(_ENERGY, name="prompt_energy_joules_per_token", label="Energy of the prompt")
DECODE_ENERGY = replace(_ENERGY, name="decode_energy_joules_per_token", label="Energy of decoding")


def metrics_of(options: BenchOptions) -> tuple[Metric, ...]:
    """Return every metric that a run with these options may have, in the order of the tables."""
    lengths, depths = sorted(options.prompt_lengths), sorted(options.context_depths)
    return (
        LOAD,
        *(FIRST_TOKEN.at(length) for length in lengths),
        *(PROMPT_SPEED.at(length) for length in lengths),
        *(DECODE_SPEED.at(depth) for depth in depths),
        *(metric.at(depth) for depth in depths for metric in LATENCIES.values()),
        PEAK_MEMORY,
        STEADY_MEMORY,
        PSS,
        MAPPED,
        PROMPT_ENERGY,
        DECODE_ENERGY,
    )
