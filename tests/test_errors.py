"""What errors are made of: the nearest name, and the reason of another library's exception."""

from __future__ import annotations

import pytest

from cusprun.errors import nearest, reason_of


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
