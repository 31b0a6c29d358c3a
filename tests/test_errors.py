"""Values of the wrong type are refused with the type that is wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cusprun.errors import CorpusError, UserError, require_kind, require_known, require_list


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, int),
        (np.int64(1), int),
        (1, float),
        (0.5, float),
        (np.float32(0.5), float),
        ("a", str),
        (True, bool),
    ],
)
def test_values_of_their_kind_are_taken(value: Any, kind: type) -> None:
    require_kind(value, kind, "it")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ("0.2", float, "it must be a number, not '0.2'"),
        (True, float, "it must be a number, not True"),
        (True, int, "it must be a whole number, not True"),
        (1.5, int, "it must be a whole number, not 1.5"),
        (None, str, "it must be text, not None"),
        (1, bool, "it must be True or False, not 1"),
        ("x" * 99, int, "it must be a whole number, not '" + "x" * 59),
    ],
)
def test_others_are_refused_and_cut(value: Any, kind: type, text: str) -> None:
    with pytest.raises(UserError) as found:
        require_kind(value, kind, "it")
    assert str(found.value) == text


@pytest.mark.parametrize("values", [[0.1, 2], (0.1, 2), iter([0.1, 2]), np.array([0.1, 2])])
def test_lists_of_any_sort_are_taken(values: Any) -> None:
    assert require_list(values, float, "ratios") == (0.1, 2)


@pytest.mark.parametrize("values", [0.1, "0.1", b"0.1", {0.1: 0.2}, None])
def test_what_is_no_list_is_refused(values: Any) -> None:
    with pytest.raises(UserError, match="ratios must be a list of numbers, not "):
        require_list(values, float, "ratios")


def test_an_item_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"each of ratios must be a number, not '0\.2'"):
        require_list([0.1, "0.2"], float, "ratios")


@pytest.mark.parametrize("name", [None, 3, ["unit"]])
def test_a_name_that_is_no_text_is_no_known_one(name: Any) -> None:
    with pytest.raises(CorpusError, match="the granularity must be text, not "):
        require_known(name, ("unit", "neuron"), "granularity", CorpusError)
