"""The page in a real browser, from disk: it loads, asks for nothing, fits a phone, and has a dark side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import report_fixtures as made
from chromium import CHROMIUM, DRIVER, chromium

pytest.importorskip("selenium")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with its driver")
PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, html: str, evil_html: str) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    for name, text in (("full", html), ("evil", evil_html)):
        (folder / f"{name}.html").write_bytes(text.encode("utf-8", "replace"))
    return {name: (folder / f"{name}.html").as_uri() for name in ("full", "evil")}


def see(browser: Any, address: str, size: tuple[int, int], scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(address)


@pytest.mark.parametrize("name", ["full", "evil"])
def test_it_loads_quietly_and_asks_for_nothing(browser: Any, pages: dict[str, str], name: str) -> None:
    see(browser, pages[name], DESK)
    assert browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return document.compatMode") == "CSS1Compat"


def colours(browser: Any) -> tuple[str, str]:
    """The ground of the page and the colour that a picture's text is drawn in."""
    ground: str = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    text: str = browser.execute_script("return getComputedStyle(document.querySelector('.plot text')).fill")
    return ground, text


@pytest.mark.parametrize(
    ("scheme", "wanted"),
    [
        ("light", ("rgb(255, 255, 255)", "rgb(27, 27, 31)")),
        ("dark", ("rgb(20, 20, 23)", "rgb(231, 231, 238)")),
    ],
)
def test_plots_are_there_in_the_scheme_of_the_system(
    browser: Any, pages: dict[str, str], scheme: str, wanted: tuple[str, str]
) -> None:
    see(browser, pages["full"], DESK, scheme)
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map((p) => p.getBoundingClientRect())"
        ".map((b) => Math.min(b.width, b.height))"
    )
    assert len(sizes) >= 10
    assert min(sizes) > 100
    assert colours(browser) == wanted


@pytest.mark.parametrize("name", ["full", "evil"])
@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_page_never_scrolls_sideways(
    browser: Any, pages: dict[str, str], name: str, size: tuple[int, int]
) -> None:
    see(browser, pages[name], size)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    page = "document.documentElement"
    width = browser.execute_script(f"return {page}.clientWidth")
    assert size[0] - 20 <= width <= size[0]  # but for a scroll bar
    assert browser.execute_script(f"return {page}.scrollWidth") <= width


def test_text_of_pictures_stays_inside_them(browser: Any, pages: dict[str, str]) -> None:
    """Text is text in the pictures, in the page's font, which is not the one they were laid out with."""
    see(browser, pages["full"], DESK)
    outside = browser.execute_script(
        "return [...document.querySelectorAll('.plot svg')].flatMap((svg) => {"
        " const box = svg.getBoundingClientRect();"
        " return [...svg.querySelectorAll('text')].filter((t) => {"
        "  const b = t.getBoundingClientRect();"
        "  return b.left < box.left - 2 || b.right > box.right + 2 || b.top < box.top - 2"
        "   || b.bottom > box.bottom + 2; }).map((t) => t.textContent); })"
    )
    assert outside == []


def test_print_is_light_on_a_dark_system_too(browser: Any, pages: dict[str, str]) -> None:
    see(browser, pages["full"], DESK, "dark")
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [dark]})
    printed = colours(browser)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert printed == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")


def test_links_lead_into_the_page(browser: Any, pages: dict[str, str]) -> None:
    see(browser, pages["full"], DESK)
    anchors = browser.execute_script("return [...document.querySelectorAll('nav a')].map((a) => a.hash)")
    assert len(anchors) == 12
    assert all(
        browser.execute_script("return !!document.querySelector(arguments[0])", one) for one in anchors
    )
    assert made.NAME in browser.title
