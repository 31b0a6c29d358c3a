"""The share of each head that is rotated, and the models that say so of code that rotates whole heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cusprun.checkpoint.index import CheckpointIndex
from cusprun.errors import ExportError

_KEY = "partial_rotary_factor"


def rope_groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rope settings of a config, of transformers 5 or older: one, or one per kind of block."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    inner = [value for value in settings.values() if isinstance(value, Mapping)]
    return inner or [settings]


def rotated_share(index: CheckpointIndex) -> float:
    """Return the share of each head that is rotated.

    Raises:
        ExportError: the config states a share and stock code of the family rotates whole heads all the same,
            where the runtimes would do what the config says.
    """
    stated = [group.get(_KEY) for group in (*rope_groups(index.config), index.config)]
    share = next((float(value) for value in stated if value), 1.0)
    if share != 1 and not index.family.partial_rotary:
        raise ExportError(
            f"{index.folder / 'config.json'}: {_KEY} is {share:g}, which stock code of "
            f"{index.family.model_type} ignores; remove it if whole heads are rotated"
        )
    return share
