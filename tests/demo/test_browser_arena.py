"""The page Arena in a real browser: two stories are written, read, voted on by a key, and then named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from demo import arena_handlers
from demo.arena_page import PATH, TITLE
from demo.routing import RoutingBackend
from experiments.ab.assignment import without_test
from experiments.ab.recorder import Recorder
from experiments.arena.contestants import parse_contestants
from experiments.arena.votes import read_votes
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, opening, violations
from tests.model.serving.http.serving import until

pytestmark = IN_A_BROWSER
PROMPT = "One day a fox came."
FIRST = " It saw a frog.\n\nThe frog said hello, and both of them were glad."
SECOND = " The fox was old. It slept for long, and in the end it dreamed of a very small boat."
SHIFTS = """() => { window.shifts = 0; new PerformanceObserver((list) => list.getEntries().forEach((entry) => {
  if (!entry.hadRecentInput) window.shifts += entry.value;
})).observe({ type: "layout-shift", buffered: true }); }"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('arena')}/stories.db"


@pytest.fixture(scope="module")
def served(database: str) -> Iterator[Served]:
    contestants = parse_contestants("default?temperature=0.5, other")
    routing = RoutingBackend(
        without_test("t"),
        {"default": ScriptedBackend(FIRST, pace=0.01)},
        Recorder(database, period=0.02),
        contestants=contestants,
        others={"other": ScriptedBackend(SECOND, pace=0.01)},
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arena_handlers, "pair", lambda contestants: contestants[:2])
        with serve(routing) as running:
            yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own, and holds it to silence and privacy."""
    with opening(browser) as make:

        def on_page(**options: object) -> Page:
            tab = make(url=served.url, path=PATH, **options)
            expect(tab.page.locator("#write")).to_be_enabled(timeout=TIMEOUT)
            return tab.page

        yield on_page


def stories(page: Page) -> list[str]:
    return page.locator(".arena article").all_inner_texts()


def fight(page: Page) -> None:
    """Begin a battle with the keyboard, and wait until its vote is open."""
    page.locator("#prompt textarea").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    page.locator("#prompt textarea").blur()
    expect(page.locator(".arena")).to_have_attribute("data-phase", "reading", timeout=TIMEOUT)
    page.locator(".arena .skip:visible").click()
    for story in page.locator(".arena .pair section").all():
        story.locator(".end").scroll_into_view_if_needed()
        expect(story).to_have_class(re.compile("complete"), timeout=TIMEOUT)
    expect(page.locator("[data-choice=first]")).to_be_enabled(timeout=TIMEOUT)


def test_write_read_vote_by_a_key_and_learn_who_wrote(
    served: Served, opened: Callable[..., Page], database: str
) -> None:
    page = opened(viewport={"width": 1280, "height": 900})
    expect(page).to_have_title(TITLE, timeout=TIMEOUT)
    page.evaluate(SHIFTS)
    fight(page)
    first, second = stories(page)
    assert first.split() == (PROMPT + FIRST).split()
    assert second.split() == (PROMPT + SECOND).split()
    assert page.locator(".arena article").first.locator("p").count() == 2
    assert "temperature" not in page.locator(".arena").inner_text(), "nobody is named before the vote"
    assert page.locator(".arena .result").is_hidden()
    page.keyboard.press("2")
    expect(page.locator(".arena .who")).to_have_text(["default, temperature 0.5", "other"], timeout=TIMEOUT)
    expect(page.locator(".arena .said")).to_have_text("You said: B is better.")
    expect(page.locator(".arena tbody th")).to_have_text(["other", "default, temperature 0.5"])
    expect(page.locator(".arena tbody tr.early")).to_have_count(2)
    expect(page.locator(".arena .choices button:enabled")).to_have_count(0)
    assert isinstance(served.backend, RoutingBackend)
    recorder = served.backend.recorder
    until(lambda: recorder.tally().written == 1)
    (kept,) = read_votes(database)
    assert (kept.choice, kept.fault, kept.second) == ("second", "", "other")
    assert page.evaluate("window.shifts") <= 0.05

    fight(page)  # again with the same prompt
    assert page.locator(".arena .who").all_inner_texts() == ["", ""]
    page.locator("[data-choice=alike]").click()
    said = "You said: alike. It is kept, and not counted: voted before on this prompt and pair."
    expect(page.locator(".arena .said")).to_have_text(said, timeout=TIMEOUT)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark")])
def test_axe_finds_nothing_and_nothing_sticks_out(opened: Callable[..., Page], width: int, scheme: str) -> None:
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert violations(page) == []
    fight(page)
    assert violations(page) == []
    page.keyboard.press("3")
    expect(page.locator(".arena .result")).to_be_visible(timeout=TIMEOUT)
    assert violations(page) == []
    parts = "[...document.querySelectorAll('main > *, .arena > *')]"
    widest = f"Math.max(...{parts}.map(part => part.getBoundingClientRect().right))"
    assert page.evaluate(widest) <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
