"""Calibration and held-out documents: a split by what a text says, never by where it stands."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping

from cusprun.records import Document


def text_hash(document: Document) -> str:
    """Return the SHA-256, in hex, that identifies the text of a document across sources and dimensions.

    Differences in white space and in the composition of letters do not count. A chat is its turns' contents,
    one after another, so that the same text with other roles, or as plain text, is the same.
    """
    text = "\n".join(message.content for message in document.messages) or document.text
    normalised = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(normalised.encode("utf-8", "surrogatepass")).hexdigest()


def split(
    documents: Iterable[Document], held_out: float, seed: int
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Split into (calibration, held-out); ``held_out`` is the wanted share, 0 < ``held_out`` <= 0.5.

    Each distinct text draws a number in [0, 1) from ``seed`` and its own hash, and is held out when that is
    below ``held_out``. Two exceptions, for small corpora: a dimension that would lose all of its texts keeps
    the one with the largest number, and when nothing at all is held out, the text with the smallest number
    is, if every dimension that has it has another. So the sides are a function of the set of texts, their
    dimensions and the seed: the same text never stands on both sides, whatever its source, dimension or
    place. A text that comes twice in one dimension is kept once. The documents come back in the order of
    dimension and number, whatever order they came in.
    """
    unique = _unique(documents)
    draws = {key: _draw(key, seed) for _, key in unique}
    texts: dict[str, set[str]] = {}
    for dimension, key in unique:
        texts.setdefault(dimension, set()).add(key)
    kept_apart = _held_out_texts(texts, draws, held_out)
    ordered = sorted(unique, key=lambda place: (place[0], draws[place[1]], place[1]))
    calibration = tuple(unique[place] for place in ordered if place[1] not in kept_apart)
    return calibration, tuple(unique[place] for place in ordered if place[1] in kept_apart)


def _unique(documents: Iterable[Document]) -> dict[tuple[str, str], Document]:
    """Return one document for each (dimension, text hash); of variants in white space always the same one."""
    unique: dict[tuple[str, str], Document] = {}
    for document in documents:
        place = document.dimension, text_hash(document)
        other = unique.get(place)
        if other is None or _spelling(document) < _spelling(other):
            unique[place] = document
    return unique


def _spelling(document: Document) -> tuple[str, tuple[tuple[str, str], ...]]:
    return document.text, tuple((message.role, message.content) for message in document.messages)


def _draw(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    # 53 bits, what a float holds exactly, so that the draw is below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _held_out_texts(texts: Mapping[str, set[str]], draws: Mapping[str, float], held_out: float) -> set[str]:
    def rank(key: str) -> tuple[float, str]:
        return draws[key], key

    drawn = {key for key, draw in draws.items() if draw < held_out}
    drawn -= {max(keys, key=rank) for keys in texts.values() if keys <= drawn}
    if drawn:
        return drawn
    scarce = {key for keys in texts.values() if len(keys) == 1 for key in keys}
    spare = draws.keys() - scarce
    return {min(spare, key=rank)} if spare else set()
