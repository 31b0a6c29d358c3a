"""The report as Markdown: the same words and tables; of pictures, the numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from serve.report.view import (
    Answers,
    Aspect,
    Bullets,
    Code,
    Grid,
    Heading,
    Page,
    Picture,
    Prose,
    Verdict,
)

_MARKUP = re.compile(r"([\\`*_\[\]<>|~&$])")
_NUMBERED = re.compile(r"^([ \t]*\d+)([.)])(?=\s|$)", re.MULTILINE)
_BLOCK_START = re.compile(r"^([ \t]*)(#|[-+](?=\s|$)|[-=](?=[-=\s]*$))", re.MULTILINE)
_INDENT = re.compile(r"^[ \t]+")


def to_markdown(page: Page) -> str:
    """Return the report in Markdown; what users wrote is shown, never read as markup."""
    lines = [f"# {_line(page.title)}", ""]
    for sentence in page.summary:
        lines += [_line(sentence), ""]
    if page.unread:
        lines += ["## Could not be read", ""]
        lines += [f"- **{_line(one.name)}** could not be read: {_line(one.reason)}." for one in page.unread]
        lines.append("")
    if page.verdict:
        lines += _verdict(page.verdict)
    for section in page.sections:
        lines += [f"## {_line(section.title)}", ""]
        for block in section.blocks:
            lines += [*_WRITTEN[type(block)](block), ""]
    until = f"Measured until {_line(page.created)}. " if page.created else ""
    lines.append(f"{until}Written by cusprun {_line(page.cusprun_version)}.")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Return text with what Markdown would read as markup escaped."""
    return _BLOCK_START.sub(r"\1\\\2", _NUMBERED.sub(r"\1\\\2", _MARKUP.sub(r"\\\1", text)))


def _line(text: str) -> str:
    """Return escaped text in one line."""
    return _escaped(" ".join(text.split()))


def _quoted(text: str) -> list[str]:
    """Return text of several lines as a quotation that keeps its lines and their indents."""
    lines = [_INDENT.sub(_hard_spaces, line) for line in _escaped(text).splitlines()]
    ends = [
        "\\" if line and following else "" for line, following in zip(lines, [*lines[1:], ""], strict=False)
    ]
    return [f"> {line}{end}".rstrip() for line, end in zip(lines, ends, strict=True)] or [">"]


def _hard_spaces(indent: re.Match[str]) -> str:
    return "&nbsp;" * len(indent[0].expandtabs(4))


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield from ("## Is it worth shipping?", "", f"**{verdict.sentence}.**", "")
    yield from (f"- {_line(reason)}" for reason in verdict.reasons)
    yield from ("", _line(verdict.rule), "")
    rows = tuple(row for aspect in verdict.aspects for row in _aspect_rows(aspect))
    columns = ("aspect", "verdict", "what", "before", "after", "change")
    yield from _table(Grid("Every aspect", columns, rows, texts=(1, 2, 5)))
    yield ""
    yield from (f"- {_line(aspect.name)}: {_line(aspect.rule)}" for aspect in verdict.aspects)
    yield ""


def _aspect_rows(aspect: Aspect) -> Iterator[tuple[str, ...]]:
    said = aspect.word if aspect.word == aspect.meaning else f"{aspect.word} ({aspect.meaning})"
    if not aspect.facts:
        yield aspect.name, said, "", "", "", ""
    for fact in aspect.facts:
        yield aspect.name, said, fact.label, fact.before, fact.after, fact.change


def _table(grid: Grid) -> Iterator[str]:
    left = (0, *grid.texts)
    yield f"**{_line(grid.caption)}**"
    yield ""
    yield _row(grid.columns)
    yield f"|{'|'.join('---' if place in left else '--:' for place in range(len(grid.columns)))}|"
    yield from map(_row, grid.rows)
    if grid.notes:
        yield ""
        yield from (f"- {_line(note)}" for note in grid.notes)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(map(_line, cells))} |"


def _picture(picture: Picture) -> Iterator[str]:
    yield _line(picture.description)
    for grid in picture.tables:
        yield ""
        yield from _table(grid)


def _code(code: Code) -> Iterator[str]:
    longest = max((len(run) for run in re.findall(r"`+", code.text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{_line(code.title)}", "", fence, code.text, fence)


def _answers(answers: Answers) -> Iterator[str]:
    yield f"### {_line(answers.title)}"
    parts = {
        "Prompt": answers.prompt,
        "Before": answers.before,
        "After": answers.after,
        "In the corpus": answers.reference,
    }
    for name, text in parts.items():
        if text or name != "In the corpus":
            yield from ("", f"**{name}**", "", *_quoted(text))
    yield from ("", _line(answers.note))


_WRITTEN: Mapping[type, Callable[[Any], Any]] = {
    Prose: lambda block: [_line(block.text)],
    Bullets: lambda block: [f"- {_line(item)}" for item in block.items],
    Heading: lambda block: [f"### {_line(block.text)}"],
    Grid: _table,
    Picture: _picture,
    Code: _code,
    Answers: _answers,
}
"""How each kind of block is written."""
