"""What outputs say of time, which differs from run to run unless ``SOURCE_DATE_EPOCH`` is set.

With that variable (reproducible-builds.org, seconds since 1970) outputs of the same inputs are equal to the
byte: ``created`` is that time, and no durations are told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone

from cusprun.errors import UserError

VARIABLE = "SOURCE_DATE_EPOCH"


def check() -> None:
    """Raise ``UserError`` when the variable is set to what is no time; before the work that ends with one."""
    created()


def created() -> str:
    """Return the time as ISO 8601, in UTC to the second.

    Raises:
        UserError: the variable is set to what is no time.
    """
    return _moment().isoformat(timespec="seconds")


def took(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return durations for people, to the hundredth; none where outputs are to be equal to the byte."""
    if os.environ.get(VARIABLE):
        return {}
    return {stage: round(value, 2) for stage, value in seconds.items()}


def _moment() -> datetime:
    text = os.environ.get(VARIABLE)
    if not text:
        return datetime.now(timezone.utc)
    try:
        return datetime.fromtimestamp(int(text), timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise UserError(
            f"{VARIABLE} is {text!r:.40}, which is no time; set it to seconds since 1970, or unset it"
        ) from None
