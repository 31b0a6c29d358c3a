"""What errors are made of: the nearest name, and the reason of another library's exception."""

from __future__ import annotations

import pytest

from cusprun.errors import UserError, nearest, reason_of, require_known


@pytest.mark.parametrize(
    ("given", "known", "hint"),
    [
        ("GGUF", ("gguf", "onnx"), "; did you mean 'gguf'?"),
        ("gpfs", ("GPUs", "CPUs"), "; did you mean 'GPUs'?"),
        ("Q4_K", ("q4_k_s", "f16"), "; did you mean 'q4_k_s'?"),
        ("xyz", ("gguf", "onnx"), ""),
    ],
)
def test_nearest_minds_no_case_and_keeps_the_spelling(given: str, known: tuple[str, ...], hint: str) -> None:
    assert nearest(given, known) == hint


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Validation error for field 'x':\n    TypeError: not a float\nmore",
            "Validation error for field 'x': TypeError: not a float",
        ),
        ("first\nsecond", "first"),
        ("\n  one  \n", "one"),
        ("alone:", "alone:"),
        ("", "ValueError"),
    ],
)
def test_reason_is_one_line_that_says_something(text: str, reason: str) -> None:
    assert reason_of(ValueError(text)) == reason


def test_an_unknown_name_among_many_lists_the_nearest_few() -> None:
    many = [f"option_{number:03d}" for number in range(200)]
    with pytest.raises(
        UserError, match=r"unknown option 'n_bach'; did you mean 'n_batch'\? \(of 201 known"
    ) as caught:
        require_known("n_bach", [*many, "n_batch"], "option")
    assert len(str(caught.value)) < 250
    with pytest.raises(UserError, match=r"\(known: a, b\)"):
        require_known("c", ["b", "a"], "option")
