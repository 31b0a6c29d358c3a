"""Budgets as people write them: ``100M`` parameters, ``80MB``, ``5%``."""

from __future__ import annotations

import re

from cusprun.errors import UserError

_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)"
_SIZE = re.compile(rf"{_NUMBER}\s*([kmg]?)b?", re.IGNORECASE)
_COUNT = re.compile(rf"{_NUMBER}\s*([kmgb]?)", re.IGNORECASE)
_SHARE = re.compile(rf"{_NUMBER}\s*(%?)")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def parse_size(text: str) -> int:
    """Return the bytes of a size like ``5GB`` or ``800M``; raises ``UserError`` for anything else."""
    return _scaled(text, _SIZE, "size", "MB or GB; write for example 5GB")


def parse_count(text: str) -> int:
    """Return a number of parameters like ``100M`` or ``1.5B``; raises ``UserError`` for anything else."""
    return _scaled(text, _COUNT, "number of parameters", "M or B; write for example 100M")


def _scaled(text: str, pattern: re.Pattern[str], what: str, hint: str) -> int:
    match = pattern.fullmatch(text.strip())
    number = int(float(match[1]) * _FACTORS[match[2].lower()]) if match else 0
    if number < 1:
        raise UserError(f"the {what} {text!r} is not a number with {hint}")
    return number


def parse_share(text: str) -> float:
    """Return a share like ``5%`` or ``0.05``; raises ``UserError`` for anything else."""
    match = _SHARE.fullmatch(text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if match is None or share <= 0 or (share >= 1 and not match[2]):
        raise UserError(f"the share {text!r} is not one like 5% or 0.05")
    return share
