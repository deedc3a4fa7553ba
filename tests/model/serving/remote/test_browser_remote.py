"""The same promises in a real browser: what happened is read on the page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from model.serving.backend import Backend
from tests.demo.served import serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, chromium
from tests.model.serving.http.serving import paced, serving, until
from tests.model.serving.remote.servers import CALM, Copies, auto

pytestmark = IN_A_BROWSER

FIRST_WORD = """() => document.querySelector('#book .book[data-phase="writing"] .generated')?.textContent"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@contextlib.contextmanager
def opened(browser: Browser, backend: Backend) -> Iterator[Tab]:
    """The page over `backend` in a tab; nothing may have gone wrong on it when it is closed."""
    with serve(backend) as served:
        context = browser.new_context()
        tab = Tab(context.new_page(), served.url).open()
        yield tab
        context.close()  # before the server goes, as a user would
        assert tab.errors == []


def write(tab: Tab, tokens: int, prompt: str = "Once upon a time a fox") -> None:
    tab.page.fill("#prompt textarea", prompt)
    tab.length(tokens)
    tab.page.click("#write")


def status(tab: Tab, part: str) -> None:
    """Wait until the status line holds `part`."""
    expect(tab.page.locator("#book .status")).to_contain_text(part, timeout=TIMEOUT)


def figures(tab: Tab, part: str) -> None:
    """Wait until the story's details hold `part`."""
    expect(tab.page.locator("#book .figures p")).to_contain_text(part, timeout=TIMEOUT)


@pytest.mark.parametrize("where", ["modal", "local"])
def test_the_first_word_is_in_the_browser_before_the_second_token_is_made(where: str, browser: Browser) -> None:
    generating, network = paced()
    with contextlib.ExitStack() as stack:
        backend: Backend = generating
        if where == "modal":
            backend = auto(stack.enter_context(serving(generating)).url, timeouts=CALM)
        tab = stack.enter_context(opened(browser, backend))
        tab.more()
        tab.page.fill("#seed input", "6")
        stack.callback(network.gate.set)
        network.gate.clear()  # the first token comes of the prompt, each other one of a step
        write(tab, 25)
        tab.page.wait_for_function(FIRST_WORD)
        assert not [kind for kind, _ in network.calls if kind == "step"]
        network.gate.set()
        status(tab, "length you set · 25 tokens")
        figures(tab, {"modal": "written on Modal ·", "local": "written locally ·"}[where])


def test_stop_in_the_browser_frees_the_slot_on_modal_before_the_story_is_written(browser: Browser) -> None:
    generating, network = paced(step_seconds=0.02)
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(serving(generating))
        tab = stack.enter_context(opened(browser, auto(running.url, timeouts=CALM)))
        stack.callback(network.gate.set)
        network.gate.clear()  # the first token comes of the prompt; then the story stands still until it is stopped
        write(tab, 1000)
        tab.page.wait_for_function(FIRST_WORD)
        tab.page.click("#stop")
        status(tab, "Stopped · ")
        network.gate.set()
        until(lambda: running.figures()["story_slots_active"] == 0, 30)
        assert len([kind for kind, _ in network.calls if kind == "step"]) < 999


def test_a_client_sees_that_modal_was_lost_and_who_goes_on(browser: Browser, repository: Path) -> None:
    copies = Copies(repository, 1)
    try:
        with opened(browser, auto(copies.start(), timeouts=CALM)) as tab:
            write(tab, 150)
            figures(tab, "written on Modal ·")
            shown = tab.generated()
            copies.kill()
            status(tab, "length you set · 150 tokens")
            figures(tab, "written on Modal, then locally")
            assert tab.generated().startswith(shown)
            assert "written on Modal, then locally" in (tab.page.text_content("#book [role=status]") or "")
    finally:
        copies.close()
