"""What a search down one valley may end with."""

from __future__ import annotations

from collections.abc import Mapping


def bottoms(errors: Mapping[float, float], *, rel: float = 1e-6, absolute: float = 0.0) -> list[float]:
    """Return the ridges that have no better neighbour but for rounding; one valley has one bottom."""
    ridges = sorted(errors)
    return [
        ridge
        for position, ridge in enumerate(ridges)
        if all(
            errors[ridge] <= errors[other] * (1 + rel) + absolute
            for other in ridges[max(0, position - 1) : position + 2]
        )
    ]
