"""How well a generated answer meets the right ones: numbers of maths answers, and words of passage answers.

Exact match of numbers is scored as is usual for GSM8K (arXiv 2110.14168): the number after ``####``, else the
last number of the text. F1 and EM are SQuAD's (arXiv 1606.05250), with the articles and the Unicode
punctuation of its multilingual successor MLQA (arXiv 1910.07475). No I/O.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

_DIGITS = r"[0-9][0-9.,]*"
_FRACTIONS = "¼-¾⅐-⅞↉"
_NUMBER = re.compile(
    rf"""
    (?P<fraction> {_DIGITS} \s* [/⁄] \s* {_DIGITS} (?: \s* [/⁄] \s* {_DIGITS} )*
                | \\[dt]?frac \s* \{{ [^{{}}]* \}} \s* \{{ [^{{}}]* \}}
                | [0-9]* [{_FRACTIONS}] )
  | (?P<sign> (?<![0-9A-Za-z)\]%.]) [-−–] )? (?: [$€£¥] (?P<inner> [-−] )? )?
    (?P<digits> {_DIGITS} | \.[0-9]+ ) (?P<exponent> [eE][+-]?[0-9]+ (?![0-9A-Za-z]) )?
    """,
    re.VERBOSE,
)
_PLAIN = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+")
_MARK = "####"
_MOST_DIGITS = 1000
"""A model that repeats a digit to its last token has written no number."""


def answer_number(text: str) -> Decimal | None:
    """Return the number that a maths answer ends in: the one after ``####``, else the last of the text.

    Thousands are set off by commas and decimals by a point, as in ``$1,234.50``; a full stop that ends the
    sentence is none. ``None`` when there is no number, or the last one is a fraction (``3/4``) or written in
    another way (``1,5``): half of such a number must not count as one.
    """
    if _MARK in text:
        after = text.split(_MARK, 1)[1].lstrip().partition("\n")[0]
        first = _NUMBER.search(after)
        if first:
            return _value(first)
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    return None if last is None else _value(last)


def _value(match: re.Match[str]) -> Decimal | None:
    if match["fraction"] is not None:
        return None
    digits = match["digits"].rstrip(".,")
    if not _PLAIN.fullmatch(digits) or len(match[0]) > _MOST_DIGITS:
        return None
    exponent = match["exponent"] or ""
    if len(exponent) > 4:  # 1e999999 is 1 MB of digits once it is compared
        return None
    number = Decimal(digits.replace(",", "") + exponent)
    return -number if match["sign"] or match["inner"] else number


def exact_match(generated: str, answers: Sequence[str]) -> float:
    """Return 1 when the number of the generated text is that of one of the answers, else 0."""
    number = answer_number(generated)
    return float(number is not None and number in [answer_number(answer) for answer in answers])


ARTICLES: Mapping[str, frozenset[str]] = {
    "en": frozenset({"a", "an", "the"}),
    "de": frozenset({"ein", "eine", "einen", "eines", "einer", "einem"})
    | frozenset({"der", "die", "das", "den", "dem", "des"}),
    "zh": frozenset(),
    "none": frozenset(),
}
"""The words that do not count in an answer, by language; in Chinese each character is a word."""

_CHINESE = re.compile("([\u4e00-\u9fa5])")


def answer_words(text: str, language: str = "en") -> list[str]:
    """Return the words of an answer that count: lower case, without punctuation and articles."""
    kept = "".join(sign for sign in text.lower() if not _is_punctuation(sign))
    if language == "zh":
        return _CHINESE.sub(r" \1 ", kept).split()
    articles = "|".join(sorted(ARTICLES[language]))
    # By \b and not word by word: signs like the euro's are no punctuation, and end a word all the same.
    return (re.sub(rf"\b(?:{articles})\b", " ", kept) if articles else kept).split()


def _is_punctuation(sign: str) -> bool:
    return sign in string.punctuation or unicodedata.category(sign).startswith("P")


def em(generated: str, answers: Sequence[str], language: str = "en") -> float:
    """Return 1 when the words that count are those of one of the answers, else 0."""
    words = answer_words(generated, language)
    return float(any(words == answer_words(answer, language) for answer in answers))


def f1(generated: str, answers: Sequence[str], language: str = "en") -> float:
    """Return the harmonic mean of precision and recall of the words, the best over the answers.

    When either has no words, it is 1 if both have none, else 0.
    """
    words = answer_words(generated, language)
    return max(_f1(words, answer_words(answer, language)) for answer in answers)


def _f1(words: Sequence[str], wanted: Sequence[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    # 2 / (1 / precision + 1 / recall)
    return 2 * common / (len(words) + len(wanted))


METRICS: Mapping[str, Callable[[str, Sequence[str], str], float]] = {
    "exact_match": lambda generated, answers, _language: exact_match(generated, answers),
    "f1": f1,
    "em": em,
}
"""Scores in [0, 1] of (generated text, right answers, language), by name."""
