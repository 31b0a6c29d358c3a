"""The part of parity that needs no weights: token ids, chat prompts and special tokens."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import Protocol

from cusprun.errors import UserError
from cusprun.records import Message
from exporters.parity_records import TextParity, TokenMismatch

_KEPT_MISMATCHES = 20
_NEXT_LINE = "\x85"

CHATS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "What is 17 + 25?"),),
    (Message("system", "Answer in one word."), Message("user", "Which planet is largest?")),
    (
        Message("user", "Grüß dich, wie heißt du?"),
        Message("assistant", "Ich bin ein Programm."),
        Message("user", "  Two  spaces,\n\ta tab, and ünïcödé 😀."),
    ),
)
"""Chats whose prompts are compared: one turn, a system turn, and several turns with awkward text."""


class Specials(Protocol):
    """Special tokens as a runtime sees them; ``stop`` are the ids that end generation."""

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def stop(self) -> tuple[int, ...]: ...


class TextRuntime(Protocol):
    """What the comparison of texts needs of a runtime."""

    def tokenize(self, text: str, add_special: bool) -> list[int]: ...
    def render_chat(self, messages: Sequence[Message]) -> str | None: ...
    def chat_token_ids(self, messages: Sequence[Message]) -> list[int]: ...
    @property
    def special_ids(self) -> Specials: ...
    @property
    def special_texts(self) -> tuple[str, ...]: ...


@cache
def probe_texts() -> tuple[str, ...]:
    """Return the probe strings that ship with the package: over 220 in many scripts."""
    lines = resources.files("exporters").joinpath("probes.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines)


def compare_texts(reference: TextRuntime, candidate: TextRuntime, texts: Sequence[str]) -> TextParity:
    """Compare token ids on ``texts``, prompts and ids of ``CHATS``, and special tokens."""
    mismatches: list[TokenMismatch] = []
    explained: Counter[str] = Counter()
    for text in texts:
        for add_special in (False, True):
            wanted, found = reference.tokenize(text, add_special), candidate.tokenize(text, add_special)
            if wanted == found:
                continue
            reason = _explanation(reference, candidate, text, add_special, wanted, found)
            if reason:
                explained[reason] += 1
            else:
                mismatches.append(TokenMismatch(text, tuple(wanted), tuple(found)))
            break
    chat_faults, bos_counts = _compare_chats(reference, candidate, explained)
    ours, theirs = reference.special_ids, candidate.special_ids
    return TextParity(
        probe_texts=len(texts),
        mismatch_count=len(mismatches),
        mismatches=tuple(mismatches[:_KEPT_MISMATCHES]),
        explained=dict(sorted(explained.items())),
        chats=len(CHATS),
        chat_mismatches=tuple(chat_faults),
        leading_bos_reference=max((pair[0] for pair in bos_counts), default=0),
        leading_bos_candidate=max((pair[1] for pair in bos_counts), default=0),
        missing_stop_ids=tuple(sorted(set(ours.stop) - set(theirs.stop))),
        extra_stop_ids=tuple(sorted(set(theirs.stop) - set(ours.stop))),
        special_mismatches=tuple(_special_faults(ours, theirs)),
    )


def text_failures(parity: TextParity) -> Iterator[str]:
    """Yield one sentence for each way in which the texts fail the gate."""
    if parity.mismatch_count:
        first = parity.mismatches[0]
        yield (
            f"{parity.mismatch_count} of {parity.probe_texts} probe texts have other token ids "
            f"(first: {first.text[:40]!r} is {list(first.reference[:8])} and {list(first.candidate[:8])})"
        )
    yield from parity.chat_mismatches
    yield from parity.special_mismatches
    if parity.missing_stop_ids:
        yield f"the artifact does not stop at the token ids {list(parity.missing_stop_ids)}"
    if parity.leading_bos_candidate > 1:
        yield f"a chat starts with {parity.leading_bos_candidate} BOS tokens in the artifact"


def _explanation(
    reference: TextRuntime,
    candidate: TextRuntime,
    text: str,
    add_special: bool,
    wanted: list[int],
    found: list[int],
) -> str | None:
    """Name what the runtime lacks, when doing it by hand makes the ids equal.

    ``not_nfc``, ``leading_space`` and ``space_after_special`` are normalisations. onnxruntime-genai gives -1
    to a byte without a token, which stock tokenizers drop, and does not take U+0085 for white space.
    """
    composed = unicodedata.normalize("NFC", text)
    if composed != text and candidate.tokenize(composed, add_special) == wanted:
        return "not_nfc"
    if text.startswith(" ") and candidate.tokenize(text[1:], add_special) == wanted:
        return "leading_space"
    spaced = _space_after_specials(text, reference.special_texts)
    if spaced != text and reference.tokenize(spaced, add_special) == found:
        return "space_after_special"
    if [token for token in found if token >= 0] == wanted:
        return "byte_without_token"
    plain = text.replace(_NEXT_LINE, " ")
    if plain != text and candidate.tokenize(plain, add_special) == reference.tokenize(plain, add_special):
        return "next_line"
    return None


def _space_after_specials(text: str, specials: Sequence[str]) -> str:
    for special in specials:
        if special:
            text = text.replace(special, f"{special} ")
    return text


def _compare_chats(
    reference: TextRuntime, candidate: TextRuntime, explained: Counter[str]
) -> tuple[list[str], list[tuple[int, int]]]:
    faults: list[str] = []
    counts: list[tuple[int, int]] = []
    for number, messages in enumerate(CHATS, start=1):
        wanted, found = _prompt(reference, messages), _prompt(candidate, messages)
        if wanted != found:
            faults.append(
                f"chat {number} is rendered as {_short(found)} where the checkpoint has {_short(wanted)}"
            )
            continue
        if wanted is None:
            continue
        ours, theirs = reference.chat_token_ids(messages), candidate.chat_token_ids(messages)
        counts.append((_leading(ours, reference), _leading(theirs, candidate)))
        if ours[counts[-1][0] :] == theirs[counts[-1][1] :]:
            if counts[-1][1] < counts[-1][0]:
                faults.append(f"chat {number} starts without the BOS token that the checkpoint has")
            elif counts[-1][1] > counts[-1][0]:
                explained["chat_bos_added_by_runtime"] += 1
        elif _explanation(reference, candidate, wanted, False, ours, theirs):
            explained["chat_space_after_special"] += 1
        else:
            faults.append(f"chat {number} has other token ids than in the checkpoint")
    return faults, counts


def _prompt(runtime: TextRuntime, messages: Sequence[Message]) -> str | None:
    """Return the rendered prompt; ``None`` when there is no template or it refuses the messages."""
    try:
        return runtime.render_chat(messages)
    except UserError:
        return None


def _leading(token_ids: Sequence[int], runtime: TextRuntime) -> int:
    """Count the BOS tokens at the start."""
    bos = runtime.special_ids.bos
    count = 0
    while count < len(token_ids) and token_ids[count] == bos:
        count += 1
    return count


def _short(text: str | None) -> str:
    return "nothing" if text is None else repr(text if len(text) <= 60 else text[:57] + "...")


def _special_faults(ours: Specials, theirs: Specials) -> Iterator[str]:
    for name in ("bos", "eos"):
        wanted, found = getattr(ours, name), getattr(theirs, name)
        if wanted is not None and wanted != found:
            yield f"the {name.upper()} token is {found} where the checkpoint has {wanted}"
