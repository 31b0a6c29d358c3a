from __future__ import annotations

import pytest

from serve.bench.metrics import metrics_of
from serve.bench.records import (
    Artifact,
    BenchOptions,
    BenchReport,
    Comparison,
    Environment,
    Interval,
    LostRun,
    Suite,
)
from serve.bench.table import (
    bench_table,
    exact_change,
    format_bytes,
    format_count,
    measured_change,
    suite_title,
    to_markdown,
    to_text,
)


def comparison(
    metric: str, low: float, median: float, high: float, verdict: str, unit: str = "ms"
) -> Comparison:
    value = Interval(100.0, 90.0, 110.0)
    return Comparison(metric, metric, unit, "lower", value, value, Interval(median, low, high), 0.01, verdict)


OPTIONS = BenchOptions(context_depths=(512,), prompt_lengths=(64,))
METRICS = metrics_of(OPTIONS)
SUITE = Suite(
    runtime="llamacpp",
    library="llama.cpp in llama-cpp-python 0.3",
    before=Artifact("a.gguf", 270_900_000, 134_515_008, 16.1, "f16"),
    after=Artifact("b.gguf", 217_700_000, 107_900_000, 16.1, "f16"),
    context_length=1024,
    comparisons=tuple(comparison(m.name, 0.8, 0.9, 0.95, m.better_word, m.unit) for m in METRICS),
    runs=(),
    lost_runs=(LostRun("after", 2, "the worker was ended by SIGSEGV"),),
    noise=("other processes took 34% of the CPU time during the benchmark",),
    stopped="9 pairs, as asked",
    roofline=None,
    elapsed_s=1.0,
)
REPORT = BenchReport(
    created="2025-01-01T00:00:00+00:00",
    options=OPTIONS,
    environment=Environment("Some CPU", 4, 2, 8, 0.1, "0-3", None, (), "Linux", {}),
    suites=(SUITE,),
    elapsed_s=1.0,
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (comparison("x", 0.70, 0.75, 0.78, "faster"), "↓ 25.0 % (22.0 to 30.0), faster"),
        (comparison("x", 1.301, 1.312, 1.32, "faster"), "↑ 31.2 % (30.1 to 32.0), faster"),
        (comparison("x", 0.98, 1.01, 1.02, "no difference shown"), "no difference shown (-2.0 to +2.0 %)"),
        (comparison("x", 0.7, 0.8, 0.9, "too few pairs to tell"), "too few pairs to tell (-30.0 to -10.0 %)"),
    ],
)
def test_change_in_words(change: Comparison, text: str) -> None:
    assert measured_change(change) == text


def test_exact_changes_have_no_interval() -> None:
    assert exact_change(200, 150, "smaller", "larger") == "↓ 25.0 %, smaller"
    assert exact_change(200, 250, "smaller", "larger") == "↑ 25.0 %, larger"
    assert exact_change(200, 200, "smaller", "larger") == "same"


def test_values_carry_their_units() -> None:
    assert [format_bytes(n) for n in (2_000, 98_362_432, 1.6e10)] == ["2.0 kB", "98.4 MB", "16.00 GB"]
    assert [format_count(n) for n in (999, 134_515_008, 8e9)] == ["999", "134.5 M", "8.00 B"]


def test_table_begins_with_size_and_ends_with_what_a_reader_must_know() -> None:
    table = bench_table(REPORT, SUITE)
    assert [row.metric for row in table.rows[:3]] == ["Parameters", "File size", "peak_memory_bytes"]
    assert table.rows[1].change == "↓ 19.6 %, smaller"
    assert "llama-cpp-python 0.3" in table.notes[0]
    assert "9 pairs, as asked" in table.notes[0]
    assert "2 threads on Some CPU" in table.notes[1]
    assert table.notes[2] == "Lost run: pair 3, after, the worker was ended by SIGSEGV."
    assert table.notes[3].startswith("Noisy machine: other processes")
    assert len(bench_table(REPORT, SUITE, tuple(m.name.partition("@")[0] for m in METRICS)).rows) == 2 + len(
        METRICS
    )


def test_a_suite_is_named_by_runtime_and_precision() -> None:
    assert suite_title(SUITE) == "llama.cpp (f16)"


def test_text_is_aligned_and_markdown_has_four_cells_a_row() -> None:
    table = bench_table(REPORT, SUITE)
    lines = to_text(table).splitlines()[: len(table.rows) + 1]
    column = lines[0].index("change")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    rows = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    assert len(rows) == len(table.rows) + 2
    assert all(row.count("|") == 5 for row in rows)
