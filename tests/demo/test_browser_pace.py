"""Reading pace, Skip and the first visit, in a real browser over a backend that writes faster than anybody reads."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, expect

from demo.handlers import EXAMPLE
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, opening, violations

pytestmark = IN_A_BROWSER
SENTENCES = [f" The fox {number} went home to its den." for number in range(12)]
STORY = "".join(SENTENCES)
READS = {"visited": "yes"}
"""Settings of a user who was here before, and reads as the page proposes."""

FOLLOW = """() => {
  window.seen = [];
  window.said = [];
  const article = document.querySelector('#book article');
  const words = () => article.textContent.trim().split(/\\s+/).length;
  new MutationObserver(() => seen.push([performance.now(), words(), article.textContent]))
    .observe(article, { childList: true, characterData: true, subtree: true });
  const live = document.querySelector('#book [role=status]');
  new MutationObserver(() => said.push(live.textContent))
    .observe(live, { childList: true, characterData: true, subtree: true });
}"""
"""Keeps what is shown, and when, and what a screen reader hears."""


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend(STORY)


@pytest.fixture(scope="module")
def served(backend: ScriptedBackend) -> Iterator[Served]:
    with serve(backend) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Tab]]:
    with opening(browser) as make:
        yield functools.partial(make, url=served.url, settings=READS)


def begun(tab: Tab, words: int) -> None:
    """Wait until so many words of the story are shown."""
    tab.page.wait_for_function(
        f"document.querySelector('#book article').textContent.trim().split(/\\s+/).length >= {words}"
    )


def test_at_a_first_visit_an_example_is_being_written_and_takes_nothing_from_the_user(
    opened: Callable[..., Tab], backend: ScriptedBackend
) -> None:
    before = len(backend.streams)
    tab = opened(settings={})
    tab.page.fill("#prompt textarea", "My own beginning")
    begun(tab, 14)
    assert tab.story().startswith(EXAMPLE.prompt)
    expect(tab.page.locator("#book .note")).to_contain_text("An example.")
    assert {"write", "stop", "skip"} <= set(tab.enabled())
    assert violations(tab.page) == []
    assert tab.page.input_value("#prompt textarea") == "My own beginning"
    tab.page.reload()
    tab.page.wait_for_selector("#write:enabled")
    expect(tab.page.locator("#book article")).to_have_text(EXAMPLE.prompt + STORY)  # not from the first word again
    tab.page.click("#write")
    expect(tab.page.locator("#book article")).to_contain_text("My own beginning The", timeout=TIMEOUT)
    expect(tab.page.locator("#book .note")).to_be_hidden()
    assert [stream.request.prompt for stream in backend.streams[before:]] == [EXAMPLE.prompt, "My own beginning"]
    later = Tab(tab.page.context.new_page(), tab.url, {}).open()
    assert later.phase() == "empty"
    assert later.errors == []


def test_a_link_opens_written_at_a_first_visit_too(opened: Callable[..., Tab], backend: ScriptedBackend) -> None:
    tab = opened(settings={}, query="?prompt=One%20day&seed=5")
    begun(tab, 4)
    assert tab.story().startswith("One day The fox")
    assert (backend.streams[-1].request.prompt, backend.streams[-1].request.sampling.seed) == ("One day", 5)


def test_words_come_as_fast_as_one_reads_and_what_is_selected_stays_so(opened: Callable[..., Tab]) -> None:
    tab = opened()
    tab.page.evaluate(FOLLOW)
    tab.page.fill("#prompt textarea", "One day")
    tab.page.click("#write")
    begun(tab, 5)
    tab.page.evaluate("getSelection().selectAllChildren(document.querySelector('#book article'))")
    selected = tab.page.evaluate("String(getSelection())")
    begun(tab, 19)
    assert tab.page.evaluate("String(getSelection())").startswith(selected)
    (start, first, _), (end, last, _) = tab.page.evaluate("[seen[2], seen.at(-1)]")
    # A step that a busy machine makes late is not made up for, so only the upper bound is sharp.
    assert 2 <= (last - first) / (end - start) * 1000 <= 6.5
    assert tab.phase() == "writing"
    assert tab.page.evaluate("said.slice(-2).map((text) => text.trim())") == [text.strip() for text in SENTENCES[:2]]
    tab.page.click("#skip")
    assert tab.story() == "One day" + STORY
    assert tab.phase() == "ended"
    status = tab.page.inner_text("#book .status")
    assert re.fullmatch(r"The end · 97 tokens in \d+\.\d\d s", status)
    assert tab.page.evaluate("document.activeElement.id") == "write"


def test_stop_leaves_what_was_read_and_continue_goes_on_from_there(
    opened: Callable[..., Tab], backend: ScriptedBackend
) -> None:
    tab = opened()
    tab.page.fill("#prompt textarea", "One day")
    tab.page.click("#write")
    begun(tab, 6)
    tab.page.keyboard.press("Escape")
    assert tab.phase() == "open"
    story = tab.story()
    assert len(story) < len(STORY) / 2
    assert tab.page.inner_text("#book .status") == "Stopped"
    tab.page.click("#continue")
    tab.page.click("#skip")
    tab.reaches("ended")
    assert backend.streams[-1].request.prompt == story
    assert tab.story() == story + STORY


def test_reading_pace_can_be_switched_off_and_stays_so(opened: Callable[..., Tab]) -> None:
    tab = opened()
    tab.page.click("#write")
    begun(tab, 3)
    tab.page.click("#book .figures summary")
    assert violations(tab.page) == []
    tab.page.click("#book .figures input")
    assert tab.story() == STORY
    later = Tab(tab.page.context.new_page(), tab.url, READS).open()
    assert later.page.locator("#book .figures input").is_checked() is False
    later.page.evaluate(FOLLOW)
    later.page.click("#write")
    later.reaches("ended")
    assert later.page.evaluate("seen.length") < 10
    assert later.enabled() == ["write", "again", "save", "link"]


def test_where_motion_is_to_be_reduced_whole_sentences_come(opened: Callable[..., Tab]) -> None:
    tab = opened(reduced_motion="reduce")
    tab.page.evaluate(FOLLOW)
    tab.page.click("#write")
    begun(tab, 20)
    texts = {text for _, _, text in tab.page.evaluate("seen")}
    assert texts == {"".join(SENTENCES[:count]) for count in range(1, len(texts) + 1)}
