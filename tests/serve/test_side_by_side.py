"""The page with two answers, used as people do: in a browser, by keyboard, on a phone's screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, DRIVER, chromium
from endpoint import Endpoint, serving
from parrot import ANSWER, CHAT_ANSWER, LOOP, PROMPT

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with its driver")
WAIT_S = 60
PHONE, DESK = (360, 740), (1280, 900)


@pytest.fixture(scope="module")
def endpoint(artifacts: dict[str, Path]) -> Iterator[Endpoint]:
    file = str(artifacts["llamacpp"])
    with serving("--before", file, "--after", file) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def wait_for(browser: Any, condition: Any) -> None:
    WebDriverWait(browser, WAIT_S, poll_frequency=0.05).until(lambda _: condition())


def answers(browser: Any) -> list[str]:
    return [browser.find_element(By.CSS_SELECTOR, f"#{side} .answer").text for side in ("before", "after")]


def value(browser: Any, side: str, name: str) -> str:
    text: str = browser.find_element(By.CSS_SELECTOR, f"#{side} [data-value={name}]").text
    return text


def open_page(browser: Any, endpoint: Endpoint, size: tuple[int, int] = DESK) -> None:
    browser.set_window_size(*size)
    browser.get(endpoint.url.removesuffix("/v1") + "/")
    wait_for(browser, lambda: value(browser, "after", "memory"))


@needs_browser
class TestPage:
    @pytest.mark.parametrize("size", [PHONE, DESK])
    def test_both_answer_and_are_measured(
        self, browser: Any, endpoint: Endpoint, size: tuple[int, int]
    ) -> None:
        open_page(browser, endpoint, size)
        # By keyboard alone: the prompt has the focus when the page opens.
        browser.switch_to.active_element.send_keys("Größe?", Keys.CONTROL, Keys.ENTER)
        wait_for(browser, lambda: browser.find_element(By.ID, "status").text == "Both have answered.")
        assert answers(browser) == [CHAT_ANSWER, CHAT_ANSWER]
        for side in ("before", "after"):
            assert value(browser, side, "first").endswith(" ms")
            assert float(value(browser, side, "rate")) > 0
            assert int(value(browser, side, "tokens")) in (11, 12)
            assert value(browser, side, "memory").endswith(" MB")
        page = "document.documentElement"
        assert browser.execute_script(f"return {page}.scrollWidth <= {page}.clientWidth")

    def test_text_to_go_on_with_at_the_same_time(self, browser: Any, endpoint: Endpoint) -> None:
        open_page(browser, endpoint)
        browser.find_element(By.ID, "mode").send_keys("a text")
        browser.find_element(By.ID, "turns").click()
        browser.find_element(By.ID, "prompt").send_keys(PROMPT)
        browser.find_element(By.ID, "ask").click()
        wait_for(browser, lambda: browser.find_element(By.ID, "status").text == "Both have answered.")
        assert answers(browser) == [ANSWER, ANSWER]

    def test_escape_stops(self, browser: Any, endpoint: Endpoint) -> None:
        open_page(browser, endpoint)
        tokens = browser.find_element(By.ID, "max-tokens")
        tokens.clear()
        tokens.send_keys("100000")
        browser.find_element(By.ID, "mode").send_keys("a text")
        browser.find_element(By.ID, "prompt").send_keys(LOOP, Keys.CONTROL, Keys.ENTER)
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        status = browser.find_element(By.ID, "status")
        wait_for(browser, lambda: status.text in ("Stopped.", "Both have answered."))
        assert browser.find_element(By.ID, "ask").is_enabled()

    def test_refusal_is_shown(self, browser: Any, endpoint: Endpoint) -> None:
        open_page(browser, endpoint)
        browser.find_element(By.ID, "prompt").send_keys(LOOP * 500, Keys.CONTROL, Keys.ENTER)
        wait_for(browser, lambda: browser.find_element(By.ID, "status").text == "Both have answered.")
        assert all("the context holds" in text for text in answers(browser))

    def test_every_control_has_a_name_and_the_keyboard_reaches_it(
        self, browser: Any, endpoint: Endpoint
    ) -> None:
        open_page(browser, endpoint)
        reached = []
        for _ in range(7):
            element = browser.switch_to.active_element
            reached.append(element.get_attribute("id") or element.get_attribute("class"))
            assert element.accessible_name, reached[-1]
            element.send_keys(Keys.TAB)
        assert reached == ["prompt", "mode", "max-tokens", "turns", "ask", "answer", "answer"]

    def test_nothing_is_asked_of_elsewhere_and_nothing_fails(self, browser: Any, endpoint: Endpoint) -> None:
        open_page(browser, endpoint)
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
        assert loaded
        assert all(name.startswith(endpoint.url.removesuffix("v1")) for name in loaded)
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        # A refused request is shown on the page, and Chromium's console notes it as well.
        assert not [entry for entry in severe if "status of 400" not in entry["message"]], severe

    def test_key_is_asked_for(self, browser: Any, artifacts: dict[str, Path]) -> None:
        file = str(artifacts["llamacpp"])
        with serving("--before", file, "--after", file, CUSPRUN_API_KEY="secret") as running:
            assert running.request("/sides")[0] == 401
            assert running.request("/before/v1/completions", {"prompt": PROMPT})[0] == 401
            browser.get(running.url.removesuffix("/v1") + "/")
            wait_for(browser, lambda: browser.find_element(By.ID, "key").is_displayed())
            browser.find_element(By.ID, "key").send_keys("secret", Keys.TAB)
            wait_for(browser, lambda: value(browser, "before", "memory"))
            browser.find_element(By.ID, "prompt").send_keys("x", Keys.CONTROL, Keys.ENTER)
            wait_for(browser, lambda: answers(browser) == [CHAT_ANSWER, CHAT_ANSWER])


def test_each_side_is_an_endpoint_of_its_own(endpoint: Endpoint) -> None:
    for side in ("before", "after"):
        status, answer = endpoint.request(f"/{side}/v1/completions", {"prompt": PROMPT, "temperature": 0})
        assert (status, answer["choices"][0]["text"]) == (200, ANSWER)
    assert endpoint.request("/v1/completions", {"prompt": PROMPT})[0] == 404
    assert endpoint.request("/sides", headers={"Host": "evil.example"})[0] == 403
    assert endpoint.request("/before/metrics")[0] == 200
