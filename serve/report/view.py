"""What a report shows, in plain records that every form of it, a page, Markdown or JSON, is made from.

Texts are plain, of any content: names, prompts and answers are the users'. Each block tells its ``kind``,
so that readers of the JSON know what they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from cusprun.panels import AnyPanel

STATUSES = {
    "ok": "fine",
    "look": "look closer",
    "stop": "speaks against it",
    "unknown": "not measured",
    "told": "for information",
}
"""What an aspect's status means, in words that stand beside its sign."""

ANSWERS = {
    "ship": "Ship it",
    "look": "Look closer before shipping it",
    "stop": "Do not ship it",
    "unknown": "Not enough was measured to say",
}
"""What a recommendation says."""


@dataclass(frozen=True)
class Prose:
    """One paragraph."""

    text: str
    kind: str = "prose"


@dataclass(frozen=True)
class Bullets:
    """Sentences that each stand alone."""

    items: tuple[str, ...]
    kind: str = "bullets"


@dataclass(frozen=True)
class Grid:
    """A table; ``columns`` are its headings, and each row begins with its own.

    ``texts`` are the positions of further columns that hold words: they stand to the left, numbers to the
    right.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """Diagrams side by side with the same numbers as tables; ``description`` says what they show.

    ``name`` is unique in the page.
    """

    name: str
    description: str
    panels: tuple[AnyPanel, ...]
    tables: tuple[Grid, ...]
    kind: str = "picture"


@dataclass(frozen=True)
class Heading:
    """The title of what follows in its section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Code:
    """Commands or a file, to be copied as they are."""

    title: str
    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Answers:
    """One prompt, and what was answered; ``reference`` is what the corpus itself holds."""

    title: str
    prompt: str
    before: str
    after: str
    reference: str
    note: str
    kind: str = "answers"


Block: TypeAlias = Prose | Bullets | Grid | Picture | Heading | Code | Answers


@dataclass(frozen=True)
class Section:
    """A part of the report; ``name`` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Fact:
    """One number of an aspect, before and after, and its change with the interval."""

    label: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Aspect:
    """One side of the verdict: a key of ``STATUSES``, a plain word, the numbers, and its rule."""

    name: str
    status: str
    word: str
    facts: tuple[Fact, ...]
    rule: str

    @property
    def meaning(self) -> str:
        """The status in words."""
        return STATUSES[self.status]


@dataclass(frozen=True)
class Verdict:
    """Whether to ship: a key of ``ANSWERS``, the reasons, every aspect, and the rule that joins them."""

    answer: str
    reasons: tuple[str, ...]
    aspects: tuple[Aspect, ...]
    rule: str

    @property
    def sentence(self) -> str:
        """The answer in words."""
        return ANSWERS[self.answer]


@dataclass(frozen=True)
class Unread:
    """One input that could not be read, and what to do."""

    name: str
    reason: str


@dataclass(frozen=True)
class Page:
    """The whole report. ``created`` is when the newest of its inputs was made: a report adds no date."""

    title: str
    summary: tuple[str, ...]
    verdict: Verdict | None
    unread: tuple[Unread, ...]
    sections: tuple[Section, ...]
    created: str
    cusprun_version: str
    schema_version: int = 1
