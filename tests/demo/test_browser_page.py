"""The page's look and manners in a real browser, over a backend whose stories the tests choose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, expect

from demo.page import EXAMPLES
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, opening

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend("")


@pytest.fixture(scope="module")
def served(backend: ScriptedBackend) -> Iterator[Served]:
    with serve(backend) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Tab]]:
    with opening(browser) as make:
        yield functools.partial(make, url=served.url)


def initials(tab: Tab) -> list[str]:
    """What is set large: the text of each first paragraph that begins with an initial, and what hangs before it."""
    found: list[str] = tab.page.locator("#book .initial").evaluate_all(
        "all => all.map(one => one.firstChild.textContent + '|' + one.textContent)"
    )
    return found


INITIALS = {
    "Once upon a time.": ["|Once upon a time."],
    "A fox sat.": ["|A fox sat."],
    "“Hello,” said he.\nShe left.": ["“|“Hello,” said he."],
    '"Éa!" said he.': ['"|"Éa!" said he.'],
    "Жила лиса.": ["|Жила лиса."],
    "— Hello.": [],
    "# One": [],
    "3 mice": [],
    "I'm here.": [],
    "🦊 sat.": [],
    "كان يا ما كان": [],
}
"""Stories, and what of each begins with a large letter."""


def test_a_first_letter_is_set_large_where_its_script_has_large_initials(
    opened: Callable[..., Tab], backend: ScriptedBackend
) -> None:
    tab = opened()
    for story, set_large in INITIALS.items():
        backend.story = story
        tab.page.click("#write")
        expect(tab.page.locator("#book article")).to_have_text(story.replace("\n", ""), timeout=TIMEOUT)
        tab.page.wait_for_selector("#write:enabled")
        assert initials(tab) == set_large
        assert tab.generated() == story.replace("\n", "")
        if set_large:
            color = "getComputedStyle(document.querySelector('#book .initial'){}).color"
            assert tab.page.evaluate(color.format(", '::first-letter'")) != tab.page.evaluate(color.format(""))


def test_the_page_is_english_in_every_browser_and_text_runs_as_its_script_does(
    opened: Callable[..., Tab], backend: ScriptedBackend
) -> None:
    backend.story = " قال الثعلب"
    tab = opened(locale="ar-EG")
    assert tab.page.evaluate("document.documentElement.lang") == "en"
    tab.page.fill("#prompt textarea", "كان يا ما كان")
    direction = "node => getComputedStyle(node).direction"
    assert tab.page.locator("#prompt textarea").evaluate(direction) == "rtl"
    tab.page.click("#write")
    tab.reaches("ended")
    assert tab.page.locator("#book article p").evaluate(direction) == "rtl"
    assert tab.page.locator("#book .status").evaluate(direction) == "ltr"


def test_an_example_can_be_undone(opened: Callable[..., Tab]) -> None:
    tab = opened()
    field = tab.page.locator("#prompt textarea")
    assert field.get_attribute("placeholder") not in EXAMPLES.values()
    field.press_sequentially("My own")
    tab.page.locator("#examples button").first.click()
    expect(field).to_have_value(next(iter(EXAMPLES.values())), timeout=TIMEOUT)
    tab.page.keyboard.press("Control+z")
    expect(field).to_have_value("My own", timeout=TIMEOUT)


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_the_page_stands_still_while_it_is_loaded_and_says_our_words_first(
    served: Served, browser: Browser, width: int, height: int
) -> None:
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme="light") as context:
        page = context.new_page()
        page.add_init_script(
            """localStorage.setItem('story-paper', 'dark');
            window.shift = 0;
            new PerformanceObserver(list => {
              for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
            }).observe({type: 'layout-shift', buffered: true});
            window.papers = new Set();
            window.loaders = 0;
            const look = () => {
              if (document.body && document.querySelector('h1')) {
                window.papers.add(getComputedStyle(document.body).backgroundColor);
                const loader = document.querySelector('.loading');
                if (loader && loader.checkVisibility()) window.loaders += 1;
              }
              requestAnimationFrame(look);
            };
            look();"""
        )
        page.goto(served.url)
        page.wait_for_selector("#more > button[aria-expanded]")
        expect(page.locator(".opening")).to_be_hidden(timeout=TIMEOUT)
        assert page.evaluate("[...window.papers]") == ["rgb(25, 23, 20)"], "a frame of light paper"
        assert page.evaluate("window.loaders") == 0
        assert page.evaluate("window.shift") <= 0.05
