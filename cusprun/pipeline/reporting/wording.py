"""Numbers as a report writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from serve.bench.records import NO_DIFFERENCE, TOO_FEW_PAIRS, Comparison, Interval, Suite

NOT_SHOWN = (NO_DIFFERENCE, TOO_FEW_PAIRS)
"""Verdicts of a comparison that found nothing."""


class Spread(Protocol):
    """An estimate of quality: a value with its interval."""

    @property
    def value(self) -> float:
        """The value over all documents."""
        ...

    @property
    def low(self) -> float:
        """The lower end of its interval."""
        ...

    @property
    def high(self) -> float:
        """The upper end of its interval."""
        ...


def number(value: float) -> str:
    """Return a number with three digits or more, thousands set off."""
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{decimals}f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def _scaled(steps: tuple[tuple[float, str], ...]) -> Callable[[float], tuple[float, str]]:
    """Return a function that says what a size is divided by and called."""

    def scale(value: float) -> tuple[float, str]:
        return next((step for step in steps if abs(value) >= step[0]), steps[-1])

    return scale


_SCALES: Mapping[str, Callable[[float], tuple[float, str]]] = {
    "bytes": _scaled(((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))),
}


def amount(value: float, unit: str) -> str:
    """Return a value with its unit, bytes in decimal multiples."""
    return _with_unit((value,), unit)


def interval(spread: Interval, unit: str) -> str:
    """Return a median with its interval, such as ``12.3 ms (12.1 to 12.6)``."""
    shown = _with_unit((spread.median,), unit)
    low, high = (_bare(value, spread.median, unit) for value in (spread.low, spread.high))
    return f"{shown} ({low} to {high})"


def _with_unit(values: tuple[float, ...], unit: str) -> str:
    divisor, name = _scale(values[0], unit)
    return f"{number(values[0] / divisor)} {name}".strip()


def _bare(value: float, like: float, unit: str) -> str:
    """Return a value without its unit, in the multiple that ``like`` is written in."""
    return number(value / _scale(like, unit)[0])


def _scale(value: float, unit: str) -> tuple[float, str]:
    return _SCALES[unit](value) if unit in _SCALES else (1.0, unit)


def ratio(spread: Interval) -> str:
    """Return a ratio with its interval, such as ``1.31 (1.29 to 1.33)``."""
    return f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"


def change(low: float, middle: float, high: float) -> str:
    """Return a ratio as a change, such as ``+21.0 % (+16.5 to +26.5)``; an exact one has no interval."""
    first, second, third = (f"{100 * (value - 1):+.1f}".replace("-", "−") for value in (low, middle, high))
    if low == middle == high:
        return "the same" if middle == 1 else f"{second} %"
    return f"{second} % ({first} to {third})"


def moment(iso: str) -> str:
    """Return a moment as ISO 8601 writes it in a form that is easier to read."""
    return f"{iso[:10]} {iso[11:16]} UTC" if iso.endswith("+00:00") and len(iso) >= 22 else iso


def estimate(spread: Spread, form: str = ".2f") -> str:
    """Return an estimate with its interval."""
    return f"{spread.value:{form}} ({spread.low:{form}} to {spread.high:{form}})"


def metric_base(metric: str) -> str:
    """Return the name of a metric without the length or depth it was measured at."""
    return metric.partition("@")[0]


def metric_tokens(metric: str) -> int | None:
    """Return the prompt length or context depth of a metric; None for one that has none."""
    tokens = metric.partition("@")[2]
    return int(tokens) if tokens.isdigit() else None


def metric_label(comparison: Comparison) -> str:
    """Return what people call a metric, with the length or depth that it was measured at."""
    tokens = metric_tokens(comparison.metric)
    if tokens is None or str(tokens) in comparison.label.replace(",", ""):
        return comparison.label
    return f"{comparison.label} at {tokens:,} tokens"


def shown(comparison: Comparison) -> bool:
    """Tell whether a difference was found."""
    return comparison.verdict not in NOT_SHOWN


def improved(comparison: Comparison) -> bool:
    """Tell whether the median went the way that is better."""
    up = comparison.ratio.median > 1
    return up == (comparison.better == "higher")


def suite_name(suite: Suite) -> str:
    """Return what tells a suite from others: its runtime, and the precision that it ran."""
    return f"{suite.runtime} {suite.before.precision}" if suite.before.precision else suite.runtime


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless it is one."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
