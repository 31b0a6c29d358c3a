"""How a benchmark was measured: the machine, the options, what went wrong, and each metric in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

from cusprun.pipeline.reporting.measured import title_of
from cusprun.pipeline.reporting.wording import amount, counted, metric_base, moment
from serve.bench.records import BenchOptions, BenchReport, Environment, Suite
from serve.report.view import Block, Bullets, Grid, Heading, Prose, Section

HOW: Mapping[str, tuple[str, str]] = {
    "load_time_ms": (
        "load time",
        "until the model can take a prompt, in a fresh process, from files that were read once before",
    ),
    "time_to_first_token_ms": (
        "time to first token",
        "the pass over a prompt of the stated length, from an empty cache, and the choice of a token",
    ),
    "prompt_tokens_per_second": (
        "prompt speed",
        "tokens of a prompt of the stated length over the time of its pass, from an empty cache",
    ),
    "decode_tokens_per_second": (
        "decode speed",
        "tokens per second, one by one, with the stated number in the cache at the start",
    ),
    "inter_token_latency_p50_ms": (
        "inter-token latency, median",
        "half of these tokens came after at most this time",
    ),
    "inter_token_latency_p90_ms": (
        "inter-token latency, p90",
        "nine of ten of these tokens came after at most this time",
    ),
    "inter_token_latency_p99_ms": (
        "inter-token latency, p99",
        "99 of a hundred of these tokens came after at most this time",
    ),
    "peak_memory_bytes": (
        "peak memory",
        "the largest resident set of the process, mapped weights included; of several processes the sum",
    ),
    "steady_memory_bytes": (
        "memory after decoding (RSS)",
        "the resident set after the last measurement",
    ),
    "pss_bytes": (
        "memory after decoding (PSS)",
        "the same, with pages that other processes share counted in part",
    ),
    "mapped_file_resident_bytes": (
        "of it, the mapped file",
        "how much of the model's mapped files is in that memory",
    ),
    "decode_energy_joules_per_token": (
        "energy of decoding",
        "joules of all processor packages and GPUs per token, by the machine's counters; absent without any",
    ),
    "prompt_energy_joules_per_token": (
        "energy of the prompt",
        "joules of all processor packages and GPUs per token, by the machine's counters; absent without any",
    ),
}
"""Each metric's name and how it is measured, by the metric without its length."""

_METHOD = (
    "Each run is a fresh process, warmed up first. Before and after take turns, the order of each pair "
    "drawn from the seed, so that a machine that slows down slows both. Values are medians; an interval is "
    "the wider of the bootstrap's and that of the order statistics, at 95 %. A difference is named where the "
    "interval of the ratio leaves out 1 and Wilcoxon's signed-rank test, corrected after Holm, shows it too."
)


def method_sections(reports: Sequence[BenchReport]) -> Iterator[Section]:
    """Yield the section on machine and method."""
    blocks: list[Block] = [Prose(_METHOD)]
    for report in reports:
        blocks.append(_environment(report.environment, report.created))
        blocks.append(_options(report.options))
        for suite in report.suites:
            blocks += _course(suite)
    blocks.append(_how(reports))
    yield Section("method", "Machine and method", tuple(blocks))


def _environment(machine: Environment, created: str) -> Grid:
    load = "not reported" if machine.load_average is None else f"{machine.load_average:.2f}"
    rows = [
        ("measured", moment(created)),
        ("CPU", machine.cpu_model),
        ("physical cores", str(machine.physical_cores)),
        ("threads", str(machine.num_threads)),
        ("usable CPUs", machine.usable_cpus or "not reported"),
        ("governor", machine.governor or "not reported"),
        ("memory", amount(machine.memory_bytes, "bytes")),
        ("load before the start", load),
        ("GPUs", ", ".join(machine.gpus) or "none"),
        ("system", machine.operating_system),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
    ]
    return Grid(f"The machine, {moment(created)}", ("what", "value"), tuple(rows), texts=(1,))


def _options(options: BenchOptions) -> Grid:
    rows = tuple(
        (_option_name(field.name), _option_text(getattr(options, field.name))) for field in fields(options)
    )
    return Grid("Options of the benchmark", ("option", "value"), rows, texts=(1,))


def _option_name(name: str) -> str:
    """Return the name of an option in words, such as ``time limit (s)``."""
    words = name.replace("num_", "number of ")
    return (words.removesuffix("_s") + " (s)" if words.endswith("_s") else words).replace("_", " ")


def _option_text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{one:,}" for one in value)
    return "chosen by cusprun" if value is None else str(value)


def _course(suite: Suite) -> Iterator[Block]:
    """Yield what happened while one runtime was measured."""
    context = "grows with the text" if suite.context_length is None else f"{suite.context_length:,} tokens"
    told = [f"{suite.library}.", f"Measured for {suite.elapsed_s:,.0f} s; the cache: {context}."]
    if suite.failure is not None:
        told.append(f"Failed: {suite.failure}.")
    elif suite.stopped:
        told.append(f"Stopped after {counted(suite.num_pairs, 'pair')}: {suite.stopped}.")
    told += [
        f"Lost run: pair {lost.pair + 1}, {lost.side}: {lost.reason}. The pair does not count."
        for lost in suite.lost_runs
    ]
    told += [f"Noisy machine: {sentence}." for sentence in suite.noise]
    yield Heading(f"What happened in {title_of(suite)}")
    yield Bullets(tuple(sentence.replace("..", ".") for sentence in told))


def _how(reports: Sequence[BenchReport]) -> Grid:
    measured = {
        metric_base(one.metric) for report in reports for suite in report.suites for one in suite.comparisons
    }
    rows = tuple(words for name, words in HOW.items() if name in measured)
    return Grid("How each number was measured", ("number", "how"), rows, texts=(1,))
