"""What every test shares."""

from __future__ import annotations

from hypothesis import settings

# No test may depend on the wall clock: on a busy machine an example takes ten times as long.
settings.register_profile("cusprun", deadline=None)
settings.load_profile("cusprun")
