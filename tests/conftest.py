"""What every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# No test may depend on the wall clock: on a busy machine an example takes ten times as long.
settings.register_profile("cusprun", deadline=None)
settings.load_profile("cusprun")


@pytest.fixture(autouse=True, scope="module")
def _environment_as_found() -> Iterator[None]:
    """Refuse a module that leaves behind a variable that cusprun reads: the tests after it would change."""
    before = _read_by_cusprun()
    yield
    assert _read_by_cusprun() == before


def _read_by_cusprun() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("CUSPRUN_") or name == "SOURCE_DATE_EPOCH"
    }
