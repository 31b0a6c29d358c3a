"""Numbers as a report writes them, by examples worked out by hand."""

from __future__ import annotations

import pytest

from cusprun.pipeline.reporting.wording import amount, change, interval, moment, number
from serve.bench.records import Interval


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (357_400_576, "bytes", "357 MB"),
        (999, "bytes", "999 bytes"),
        (25_276_502_016, "bytes", "25.3 GB"),
        (1.2345, "ms", "1.23 ms"),
        (12345.6, "tokens/s", "12,346 tokens/s"),
        (0, "ms", "0.000 ms"),
        (0.00042, "joules", "0.00042 joules"),
    ],
)
def test_amounts(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text


def test_an_interval_has_one_unit_and_one_multiple() -> None:
    assert interval(Interval(1.0e9, 9.9e8, 1.01e9), "bytes") == "1.00 GB (0.990 to 1.01)"
    assert interval(Interval(12.34, 12.1, 12.6), "ms") == "12.3 ms (12.1 to 12.6)"


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ((1.165, 1.21, 1.265), "+21.0 % (+16.5 to +26.5)"),
        ((0.85, 0.9, 0.95), "−10.0 % (−15.0 to −5.0)"),
        ((0.8, 0.8, 0.8), "−20.0 %"),
        ((1, 1, 1), "the same"),
    ],
)
def test_changes(ratios: tuple[float, float, float], text: str) -> None:
    assert change(*ratios) == text


def test_moments() -> None:
    assert moment("2026-11-26T09:14:41+00:00") == "2026-11-26 09:14 UTC"
    assert moment("yesterday") == "yesterday"
    assert number(-1234.5) == "-1,234"
