"""The page as a browser's parser sees it: nothing from outside, whole, in order, safe from its content."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from typing import Any

import pytest
import report_fixtures as made

from cusprun.pipeline.report import build_page
from cusprun.pipeline.reporting.inputs import Result
from cusprun.pipeline.reporting.kinds import KINDS
from serve.report.markdown import to_markdown
from serve.report.page import POLICY, render
from serve.report.view import Page

pytest.importorskip("matplotlib")

EVIL = "<script>alert(1)</script></style><img src=x onerror=alert(2)>\"'&{{ 7*7 }}\x00\ud800"
VOID = {"meta", "link", "br", "img", "hr", "input"}


def results(**records: Any) -> list[Result]:
    return [Result(KINDS[name], f"{name}.json", record) for name, record in records.items()]


def full(run: Any = None) -> list[Result]:
    """Everything that a run and its companions hold, as reading them gives it."""
    chosen = run or made.run_report()
    return [
        *results(run=chosen, manifest=made.manifest(), bench=chosen.bench, evaluation=chosen.quality),
        *(Result(KINDS["proof"], "results.json", one) for one in chosen.parity),
        *results(overlap=made.overlap_report(), sweep=made.sweep_report()),
    ]


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
def page() -> Page:
    return build_page(full())


@pytest.fixture(scope="module")
def html(page: Page) -> str:
    return render(page)


@pytest.fixture(scope="module")
def tree(html: str) -> Tree:
    found = Tree(html)
    assert not found.open
    return found


def test_every_part_is_there(tree: Tree) -> None:
    titles = [text.strip() for text in tree.inside["h2"]]
    assert titles == [
        "Is it worth shipping?", "Before and after", "Every measurement",
        "Speed, latency and memory in pictures", "Quality", "What was pruned, and why",
        "Overlap of language, domain and task", "Size against quality", "Do the exports compute the same?",
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
        "#spe",
        "#per",
        "#kep",
        "#ref",
        "#ove",
        "#cur",
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


def test_pictures_come_in_two_colours_with_a_description_and_their_numbers(tree: Tree, page: Page) -> None:
    plots = [attributes for attributes in tree.all("div") if "plot" in str(attributes.get("class")).split()]
    assert all(one.get("role") == "img" and len(str(one.get("aria-label"))) > 20 for one in plots)
    themes = Counter(str(one["class"]).split()[1] for one in plots)
    assert themes["light"] == themes["dark"] == len(tree.all("svg")) / 2 >= 10
    pictures = [block for section in page.sections for block in section.blocks if block.kind == "picture"]
    assert len(tree.all("details")) == len(pictures)
    assert all(picture.tables for picture in pictures)  # type: ignore[union-attr]


def test_the_same_results_give_the_same_bytes(page: Page, html: str) -> None:
    again = build_page(full())
    assert again == page
    assert render(again) == html
    assert to_markdown(again) == to_markdown(page)


def evil_page() -> Page:
    sample = replace(made.SAMPLE, prompt=EVIL, before=EVIL, after=EVIL, reference=EVIL, dimension=EVIL)
    suite = replace(made.suite(), library=EVIL, noise=(EVIL,))
    first, second = made.eval_report().models
    run = made.run_report(
        source=EVIL,
        expert=EVIL,
        samples=(sample,),
        bench=made.bench_report(suite),
        quality=replace(made.eval_report(), models=(replace(first, model=EVIL), replace(second, model=EVIL))),
        parity=(made.parity_report(artifact=EVIL),),
    )
    manifest = made.manifest(source=EVIL, expert=replace(made.manifest().expert, name=EVIL))
    found = [one for one in full(run) if one.kind.name not in ("manifest", "sweep")]
    return build_page([*found, *results(manifest=manifest)])


def test_what_users_wrote_is_shown_and_never_run() -> None:
    html = render(evil_page())
    html.encode("utf-8", "replace")
    tree = Tree(html)
    assert not tree.open
    assert not tree.all("script", "img")
    assert len(tree.all("style")) == 1
    shown = "".join(tree.texts)
    assert shown.count("<script>alert(1)</script></style>") > 10
    assert "{{ 7*7 }}" in shown


def test_markdown_shows_users_text_as_text() -> None:
    text = to_markdown(evil_page())
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)
    assert "\\<script\\>alert(1)" in outside


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
    from cusprun.plots import DARK, LIGHT

    css = resources.files("serve.report").joinpath("page.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    light, dark, _print = themes
    for colours, theme in ((light, LIGHT), (dark, DARK)):
        for name in ("text", "faint", "accent", "ok", "look", "stop"):
            for ground in ("ground", "raised"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for colour in (theme.text, *theme.cycle):
            assert contrast(colour, colours["ground"]) >= 4.5, colour
