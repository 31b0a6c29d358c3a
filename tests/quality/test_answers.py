"""Scores of answers: numbers on tricky cases, words against lm-eval's own MLQA and against plain rules."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cusprun.quality.answers import answer_number, answer_words, em, exact_match, f1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("The answer is 18.", "18"),
        ("$18", "18"),
        ("She makes $18.", "18"),
        ("It costs $1,234.50 in all.", "1234.50"),
        ("1,234,567", "1234567"),
        ("**18**", "18"),
        (r"\boxed{18}", "18"),
        ("18%", "18"),
        ("USD18", "18"),
        ("€ 18", "18"),
        ("-5", "-5"),
        ("x = −5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("(-3)", "-3"),
        ("10-5", "5"),
        ("20–25", "25"),
        ("5 - 3", "3"),
        ("- 4 apples", "4"),
        (".5", "0.5"),
        ("0.50.", "0.5"),
        ("2.5e3", "2500"),
        ("16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 9", "9"),
        ("so 3 of 4\n#### $1,000\nQuestion: What is 7 + 8?", "1000"),
        ("####18 eggs of 20", "18"),
        ("It is 12\n#### none", "12"),
        ("3/4 of 8 is 6", "6"),
        ("007", "7"),
    ],
)
def test_the_number_of_an_answer(text: str, number: str) -> None:
    assert answer_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        "3/4",
        "it is 3 / 4.",
        "2 1/2",
        "1/2/2024",
        r"\frac{3}{4}",
        r"$\dfrac{1}{2}$",
        "3½",
        "⅓",
        "1,5",
        "12,34",
        "1.2.3",
        "1,2345",
        "9" * 2000,
        "1e999999999",
        "#### 3/4",
    ],
)
def test_what_is_no_number(text: str) -> None:
    assert answer_number(text) is None
    assert exact_match(text, ["4"]) == 0
    assert exact_match("4", [text]) == 0


@given(
    st.fractions(-(10**9), 10**9, max_denominator=1000), st.sampled_from(["{}", "${}", "= {}.", "#### {}"])
)
def test_a_number_is_read_as_it_is_written(value: Fraction, form: str) -> None:
    cents = round(value * 100)
    written = f"{'-' if cents < 0 else ''}{abs(cents) // 100:,}.{abs(cents) % 100:02}"
    found = answer_number(form.format(written))
    assert found is not None
    assert Fraction(found) == Fraction(cents, 100)


def test_exact_match_is_of_values_and_any_right_answer_will_do() -> None:
    assert exact_match("That makes 18.00 dollars", ["#### 18"]) == 1
    assert exact_match("18", ["17", "18"]) == 1
    assert exact_match("18", ["17"]) == 0
    assert exact_match("none", ["none"]) == 0


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        ("The  Cat, sat!", "en", ["cat", "sat"]),
        ("an apple-pie", "en", ["applepie"]),
        ("Theatre", "en", ["theatre"]),
        ("„Die Brücke“ von 1890", "de", ["brücke", "von", "1890"]),
        ("an der Elbe", "de", ["an", "elbe"]),
        ("the end", "none", ["the", "end"]),
        ("在 6%至9%。", "zh", ["在", "6", "至", "9"]),
    ],
)
def test_the_words_that_count(text: str, language: str, words: list[str]) -> None:
    assert answer_words(text, language) == words


def test_f1_and_em_by_hand() -> None:
    # 2 of 3 words are right, and 2 of the 4 wanted: 2 * (2/3 * 2/4) / (2/3 + 2/4)
    assert f1("red green blue", ["green red white black"]) == pytest.approx(4 / 7)
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert f1("green", ["red", "the green", "blue"]) == 1
    assert (f1("", ["red"]), f1("red", ["the"]), f1("", ["the"])) == (0, 0, 1)
    assert em("The Green.", ["red", "green"]) == 1
    assert em("green red", ["red green"]) == 0


ANSWERS = st.text(
    st.sampled_from([*"abcdieht nrsABT 19.,;:!?'\"-_()$€+“”„–ßü\t\n", *" 在建筑。"]), max_size=30
)


@given(ANSWERS, ANSWERS)
def test_against_plain_rules(generated: str, answer: str) -> None:
    """The same rules by removal of signs and by counting words one at a time."""

    def words(text: str) -> list[str]:
        text = re.sub(r"""[!-/:-@\[-`{-~“”„–。]""", "", text.lower())
        for sign in "\t\n":
            text = text.replace(sign, " ")
        parts = re.split(r"(\W)", text)
        return "".join(part if part not in ("a", "an", "the") else " " for part in parts).split()

    left, right = words(generated), words(answer)
    assert em(generated, [answer]) == (left == right)
    rest, hits = list(right), 0
    for word in left:
        if word in rest:
            rest.remove(word)
            hits += 1
    if hits:
        precision, recall = hits / len(left), hits / len(right)
        assert f1(generated, [answer]) == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert f1(generated, [answer]) == (not left and not right)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "de", "zh"])
def test_against_lm_eval(language: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.mlqa import utils

    @given(ANSWERS, ANSWERS)
    def check(generated: str, answer: str) -> None:
        assert em(generated, [answer], language) == utils.exact_match_score(generated, answer, language)
        if answer_words(generated, language) or answer_words(answer, language):  # SQuAD 2.0: both empty are 1
            assert f1(generated, [answer], language) == pytest.approx(
                utils.f1_score(generated, answer, language)
            )

    check()
