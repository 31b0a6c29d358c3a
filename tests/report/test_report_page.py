"""The page as a browser's parser sees it: nothing from outside, whole, in order, safe from its content."""

from __future__ import annotations

import re
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise

import pytest
from report_fixtures import everything

from cusprun.pipeline.report import build_page
from serve.report.markdown import _quoted, to_markdown
from serve.report.page import POLICY, render
from serve.report.view import Page

pytest.importorskip("matplotlib")

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Tree(HTMLParser):
    """Tags with their attributes, texts, and whether every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], (tag, self.open[-5:], self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open:
            self.inside.setdefault(self.open[-1], []).append(data)

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def tree(html: str) -> Tree:
    found = Tree(html)
    assert not found.open
    return found


def test_every_part_is_there(tree: Tree) -> None:
    titles = [text.strip() for text in tree.inside["h2"]]
    assert titles == [
        "Is it worth shipping?", "Before and after", "Every measurement",
        "Speed, latency and memory in pictures", "Quality", "Under load",
        "What was pruned, and why",
        "Overlap of language, domain and task", "Size against quality",
        "Exports, and whether they compute the same",
        "Answers side by side", "Machine and method", "How to make it again",
    ]  # fmt: skip


def test_nothing_is_asked_from_outside(tree: Tree, html: str) -> None:
    for tag, attributes in tree.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,")), (tag, value[:60])
    assert not tree.all("script", "link", "iframe", "object", "embed", "base", "form")
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]{0,3})", html)) <= {
        "#sp",
        "#pe",
        "#ke",
        "#re",
        "#ov",
        "#cu",
        "#fr",
        "#lo",
    }
    (policy,) = (one for one in tree.all("meta") if one.get("http-equiv"))
    assert policy["content"] == POLICY


def test_ids_are_unique_and_links_inside_lead_somewhere(tree: Tree, html: str) -> None:
    ids = Counter(attributes["id"] for _, attributes in tree.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    targets = {attributes["href"] for attributes in tree.all("a", "use") if attributes.get("href")}
    targets |= {f"#{name}" for name in re.findall(r"url\(#([^)]+)\)", html)}
    assert {target[1:] for target in targets if target} <= set(ids)


def test_headings_are_in_order_and_the_page_has_landmarks(tree: Tree) -> None:
    levels = [int(tag[1]) for tag, _ in tree.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [tag for tag, _ in tree.tags]
    assert [names.count(name) for name in ("header", "nav", "main", "footer")] == [1, 1, 1, 1]
    assert tree.all("html")[0]["lang"] == "en"


def test_tables_have_captions_and_scopes(tree: Tree) -> None:
    names = [tag for tag, _ in tree.tags]
    assert names.count("table") == names.count("caption") > 15
    assert all(attributes.get("scope") in ("col", "row") for attributes in tree.all("th"))


def test_pictures_have_a_description_and_their_numbers(tree: Tree, page: Page) -> None:
    plots = [attributes for attributes in tree.all("div") if attributes.get("class") == "plot"]
    assert all(one.get("role") == "img" and len(str(one.get("aria-label"))) > 20 for one in plots)
    assert len(plots) == len(tree.all("svg")) >= 10
    pictures = [block for section in page.sections for block in section.blocks if block.kind == "picture"]
    assert len(tree.all("details")) == len(pictures)
    assert all(picture.tables for picture in pictures)  # type: ignore[union-attr]


def test_the_same_results_give_the_same_bytes(page: Page) -> None:
    again = build_page(everything())
    assert again == page
    assert to_markdown(again) == to_markdown(page)
    # One picture of each sort is enough here: a heat map, lines and a forest.
    found = [one for one in everything() if one.kind.name in ("manifest", "evaluation")]
    assert render(build_page(found)) == render(build_page(found))


def test_without_matplotlib_the_numbers_stay(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    html = render(page)
    tree = Tree(html)
    assert not tree.all("svg")
    assert "pip install" in html
    details = tree.all("details")
    assert details
    assert all("open" in one for one in details)


def test_what_users_wrote_is_shown_and_never_run(evil_html: str) -> None:
    evil_html.encode("utf-8", "replace")
    tree = Tree(evil_html)
    assert not tree.open
    assert not tree.all("script", "img")
    assert len(tree.all("style")) == 1
    shown = "".join(tree.texts)
    assert shown.count("<script>alert(1)</script></style>") > 10
    assert "{{ 7*7 }}" in shown


def test_markdown_shows_users_text_as_text(evil_page: Page) -> None:
    text = to_markdown(evil_page)
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)
    assert "\\<script\\>alert(1)" in outside


def test_markdown_keeps_the_lines_of_an_answer() -> None:
    """By what a reader of CommonMark makes of it: no heading, list, code, rule or entity of its own."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark")
    for text in (
        "def f(x):\n    if x:\n\n        return x_1 * 2\n\tdone",
        "Sum\n===\nand\n---\n- - -\n# one\n#\n+ a\n- b\n1. c\n2) d\n10.5 e",
        "&lt;b&gt; &amp; $x$ ~~no~~ `y` [z](w) <i> a\\",
    ):
        html = markdown.render("\n".join(_quoted(text)))
        assert set(re.findall(r"</?(\w+)", html)) <= {"blockquote", "p", "br"}
        shown = unescape(re.sub(r"<[^>]+>", "", html)).replace("\xa0", " ")
        assert [line for line in shown.splitlines() if line] == [
            line.expandtabs(4) for line in text.splitlines() if line
        ]


def test_markdown_tables_are_rectangular(page: Page) -> None:
    rows: list[int] = []
    for line in [*to_markdown(page).splitlines(), ""]:
        if line.startswith("|"):
            rows.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(rows)) <= 1, line
            rows = []


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_every_colour_can_be_read_on_its_ground() -> None:
    css = resources.files("serve.report").joinpath("page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    light, dark, paper = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks)
    lines = [f"plot-{number}" for number in range(5)]
    assert light.keys() == dark.keys() == paper.keys()
    for colours in (light, dark, paper):
        for name in ("text", "faint", "accent", "ok", "look", "stop", "plot-text", "plot-muted", *lines):
            for ground in ("ground", "raised"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def test_every_colour_of_a_picture_is_one_that_the_page_sets(html: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    used = dict(re.findall(r"var\(--([\w-]+), (#\w+)\)", pictures))
    css = resources.files("serve.report").joinpath("page.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", css.partition("@media")[0]))
    assert used.keys() >= {"plot-text", "plot-grid", "plot-0", "plot-1"}
    assert all(light[name] == colour for name, colour in used.items() if name != "plot-muted")
