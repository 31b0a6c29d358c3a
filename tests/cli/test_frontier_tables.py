"""The stairs of the picture against brute force, and the speed taken from a benchmark's suite."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cusprun.errors import MeasurementError
from cusprun.pipeline.frontier import SpeedOptions
from cusprun.pipeline.frontier_tables import _stairs
from cusprun.pipeline.speed import measure_speed, speed_of
from serve.bench.records import Interval

PLACES = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), min_size=1)


def height(line, x: float, *, more_is_better: bool) -> float:
    """The lowest corner of the stairs among those that are at ``x`` or better."""
    corners = zip(line.x, line.y, strict=True)
    return min(b for a, b in corners if (a >= x if more_is_better else a <= x))


@given(PLACES, st.booleans())
def test_stairs_are_the_best_at_each_place_or_better(places, more_is_better) -> None:
    line = _stairs(places, more_is_better=more_is_better)
    for x, _ in places:
        wanted = min(b for a, b in places if (a >= x if more_is_better else a <= x))
        assert height(line, x, more_is_better=more_is_better) == wanted
    corners = list(zip(line.x, line.y, strict=True))
    for (x1, y1), (x2, y2) in pairwise(corners):
        assert x1 == x2 or y1 == y2
    assert {y for _, y in corners} <= {y for _, y in places}


def comparison(value: float) -> SimpleNamespace:
    after, ratio = Interval(value, value - 1, value + 1), Interval(value / 10, 0.0, value)
    return SimpleNamespace(after=after, ratio=ratio)


def test_a_speed_is_that_of_the_artifact_after() -> None:
    metrics = {
        "decode_tokens_per_second@128": comparison(50),
        "prompt_tokens_per_second@64": comparison(500),
        "peak_memory_bytes": comparison(1e8),
    }
    suite = SimpleNamespace(
        failure=None,
        given_up=None,
        comparison=metrics.__getitem__,
        num_pairs=7,
        library="llama.cpp 1",
        noise=("loud",),
    )
    machine = SimpleNamespace(cpu_model="CPU", num_threads=2)
    speed = speed_of(suite, machine, SpeedOptions(prompt_tokens=64))
    assert speed.decode_tokens_per_second == Interval(50, 49, 51)
    assert speed.decode_ratio.median == 5
    assert speed.prompt_tokens_per_second == Interval(500, 499, 501)
    assert speed.prompt_ratio.median == 50
    assert speed.peak_memory_bytes == 1e8
    assert (speed.num_pairs, speed.library, speed.noise) == (7, "llama.cpp 1", ("loud",))
    assert speed.machine == "CPU, 2 threads"


def test_a_failed_suite_is_a_failed_measurement() -> None:
    suite = SimpleNamespace(failure="the worker was ended by SIGKILL")
    with pytest.raises(MeasurementError, match="SIGKILL"):
        speed_of(suite, None, SpeedOptions())
    suite = SimpleNamespace(failure=None, given_up="3 runs were lost, the last time because of SIGKILL")
    with pytest.raises(MeasurementError, match="3 runs were lost"):
        speed_of(suite, None, SpeedOptions())


def test_a_speed_is_the_benchmark_s(tiny_models, tmp_path) -> None:
    """The real one, in as few runs as it takes."""
    pytest.importorskip("llama_cpp")
    from exporters.gguf import export

    paths = [
        export(tiny_models / "llama", tmp_path / f"{quant}.gguf", quant=quant) for quant in ("f32", "q8_0")
    ]
    options = SpeedOptions(prompt_tokens=16, context_depth=8, decode_tokens=4, num_pairs=1, num_threads=1)
    speed = measure_speed(*paths, "llamacpp", options)
    assert speed.num_pairs == 1
    assert speed.too_few_pairs
    assert "llama" in speed.library
    assert speed.machine.endswith("1 threads")
    for interval in (speed.decode_tokens_per_second, speed.prompt_tokens_per_second, speed.decode_ratio):
        assert 0 < interval.low <= interval.median <= interval.high
    assert speed.peak_memory_bytes > paths[1].stat().st_size
