"""The same promises in a real browser: who writes is read on the page, and the clocks are the browser's own."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from model.serving.backend import Backend
from tests.demo.served import serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, chromium
from tests.model.serving.http.serving import paced, serving
from tests.model.serving.remote.servers import CALM, Copies, auto

pytestmark = IN_A_BROWSER

FIRST_WORD = """() => document.querySelector('#book .book[data-phase="writing"] .generated')?.textContent"""

NOTE_STOP = """() => document.querySelector('#stop').addEventListener(
    'click', () => { window.stopped = Date.now() / 1000 }, true)"""


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
        status(tab, {"modal": "written on Modal ·", "local": "written locally ·"}[where])


@pytest.mark.slow  # it measures
def test_stop_in_the_browser_frees_the_slot_on_modal_within_200_ms(browser: Browser) -> None:
    took = []
    with (
        serving(paced(step_seconds=0.02)[0]) as running,
        httpx.Client(base_url=running.url) as asking,
        opened(browser, auto(running.url, timeouts=CALM)) as tab,
    ):
        tab.page.evaluate(NOTE_STOP)
        for _ in range(4):
            write(tab, 1000)
            tab.reaches("writing")
            busy = threading.Event()
            freed: list[float] = []
            watcher = threading.Thread(target=_watch, args=(asking, busy, freed))
            watcher.start()
            assert busy.wait(20)
            tab.page.click("#stop")
            watcher.join(20)
            tab.reaches("open")
            took.append(freed[0] - tab.page.evaluate("window.stopped"))
            status(tab, "Stopped · ")
    assert max(took) < 0.2, took


def _watch(service: httpx.Client, busy: threading.Event, freed: list[float]) -> None:
    """Ask for the service's metrics until a slot was taken and is free again, and note that second."""
    end = time.monotonic() + 15
    while time.monotonic() < end:
        free = re.search(r"^story_slots_active 0\.0$", service.get("/metrics").text, re.MULTILINE)
        if not free:
            busy.set()
        elif busy.is_set():
            freed.append(time.time())
            return
        time.sleep(0.01)


def test_a_client_sees_that_modal_was_lost_and_who_goes_on(browser: Browser, repository: Path) -> None:
    copies = Copies(repository, 1)
    try:
        with opened(browser, auto(copies.start(), timeouts=CALM)) as tab:
            write(tab, 150)
            status(tab, "written on Modal ·")
            shown = tab.generated()
            copies.kill()
            status(tab, "length you set · 150 tokens")
            status(tab, "written on Modal, then locally")
            assert tab.generated().startswith(shown)
            assert "written on Modal, then locally" in (tab.page.text_content("#book [role=status]") or "")
    finally:
        copies.close()
