"""Which calibration documents a model goes on with, and which of its continuations are new. No I/O."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cusprun.records import Augment, Corpora, TokenizedDocument


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document of ``dimension``, and how it is gone on with.

    ``seed`` depends on that document, on how often it was begun, and on the expert's seed, so that a
    continuation is the same whatever other documents there are.
    """

    dimension: str
    token_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int


def choose_prompts(corpora: Corpora, settings: Augment, seed: int, max_tokens: int) -> tuple[Prompt, ...]:
    """Return the beginnings to go on with: calibration documents in their order, the dimensions in turn.

    When a dimension's documents are used up, they come again with other seeds; at temperature 0, where that
    would give the same again, they do not. Prompt and continuation have at most ``max_tokens`` tokens.
    """
    waiting: dict[str, list[TokenizedDocument]] = {}
    for document in corpora.calibration:
        waiting.setdefault(document.dimension, []).append(document)
    chosen: list[Prompt] = []
    turn = 0
    while waiting and len(chosen) < settings.documents:
        for dimension, documents in list(waiting.items())[: settings.documents - len(chosen)]:
            again, position = divmod(turn, len(documents))
            if again and settings.temperature == 0:
                del waiting[dimension]
                continue
            chosen.append(_prompt(documents[position], again, settings, seed, max_tokens))
        turn += 1
    return tuple(chosen)


def _prompt(document: TokenizedDocument, again: int, settings: Augment, seed: int, max_tokens: int) -> Prompt:
    length = max(1, min(settings.prompt_tokens, len(document.token_ids) // 2))
    name = f"{seed}:{document.dimension}:{document.text_hash}:{again}"
    digest = hashlib.sha256(name.encode()).digest()
    return Prompt(
        dimension=document.dimension,
        token_ids=document.token_ids[:length],
        max_new_tokens=min(settings.max_new_tokens, max_tokens - length),
        seed=int.from_bytes(digest[:8], "big") >> 1,
    )


def keep_new(
    corpora: Corpora,
    generated: Iterable[TokenizedDocument],
    hash_of: Callable[[tuple[int, ...]], str],
) -> tuple[TokenizedDocument, ...]:
    """Return the generated documents that say something new, in their order.

    One is dropped when its tokens are the beginning of another document's, calibration, held-out, general or
    generated before it, when it begins with all of a held-out or general one, or when its text is another's:
    a model that knows a text by heart must not bring held-out text among the calibration documents.
    ``hash_of`` gives the hash of the text that tokens spell, which differs from a document's own where that
    was cut or is a chat.
    """
    unseen = _shortest(document.token_ids for document in (*corpora.held_out, *corpora.general))
    existing = (*corpora.calibration, *corpora.held_out, *corpora.general)
    known_ids = sorted(document.token_ids for document in existing)
    known_texts = {document.text_hash for document in existing}
    known_texts.update(hash_of(document.token_ids) for document in existing)
    new = []
    for document in generated:
        ids = document.token_ids
        # The first that does not sort before it is the one that begins with it, if any does.
        place = bisect_left(known_ids, ids)
        begins = place < len(known_ids) and known_ids[place][: len(ids)] == ids
        if begins or _goes_on(ids, unseen) or document.text_hash in known_texts:
            continue
        insort(known_ids, ids)
        known_texts.add(document.text_hash)
        new.append(document)
    return tuple(new)


def _shortest(texts: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the texts that begin with no other of them, sorted."""
    chosen: list[tuple[int, ...]] = []
    for ids in sorted(texts):
        if not chosen or ids[: len(chosen[-1])] != chosen[-1]:
            chosen.append(ids)
    return chosen


def _goes_on(ids: tuple[int, ...], shortest: list[tuple[int, ...]]) -> bool:
    """Tell whether ``ids`` begin with one of :func:`_shortest`; only the last not above them can be it."""
    place = bisect_right(shortest, ids)
    return place > 0 and ids[: len(shortest[place - 1])] == shortest[place - 1]
