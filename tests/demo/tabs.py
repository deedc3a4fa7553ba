"""A browser's tab on the page, for the tests that drive one: what it shows, and what went wrong on it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

TIMEOUT = 20_000
"""Milliseconds that the browser may take for anything: the machine may be busy."""

IN_A_BROWSER = [
    pytest.mark.browser,
    # Gradio 6.31 on pandas 3, at the end of each event: as errors they would break the server's queue.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
"""Marks of every test file that drives a page."""

BEEN_HERE = {"visited": "yes", "pace": "off"}
"""Settings of a user who saw the example before, and wants stories at once."""

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Headless Chromium; skips the test where it is not installed."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("Chromium is not installed on this machine (Debian package: chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def violations(page: Page) -> list[str]:
    """What axe (https://github.com/dequelabs/axe-core) finds on the page: the rule, and what breaks it."""
    # A color that is on its way to another one has no contrast of its own.
    page.evaluate("Promise.all(document.getAnimations().filter(a => a instanceof CSSTransition).map(a => a.finished))")
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{rule['id']}: {node['html']} {node['failureSummary']}" for rule in found for node in rule["nodes"]]


@contextlib.contextmanager
def opening(browser: Browser) -> Iterator[Callable[..., Tab]]:
    """A function that opens tabs, each in a context of its own; at the end, none may have erred or gone elsewhere.

    It calls `before` with the empty page. A page other than Write is named by its `path`, and its test waits for it.
    """
    tabs: list[Tab] = []

    def make(
        *,
        url: str,
        path: str = "",
        query: str = "",
        before: Callable[[Page], object] = lambda page: None,
        settings: Mapping[str, str] = BEEN_HERE,
        **options: object,
    ) -> Tab:
        tab = Tab(browser.new_context(**options).new_page(), url, settings)  # type: ignore[arg-type]
        tabs.append(tab)
        before(tab.page)
        if path:
            tab.page.goto(f"{url}{path}{query}")
            return tab
        return tab.open(query)

    yield make
    # What a page says while it is closed in the middle of a request, nobody sees.
    seen = [[error for error in tab.errors if not error.startswith("AbortError")] for tab in tabs]
    for tab in tabs:
        tab.page.context.close()
    foreign = [tab.foreign for tab in tabs if tab.foreign]
    assert not foreign, foreign
    errors = [errors for errors in seen if errors]
    assert not errors, errors


class Tab:
    """A page with what went wrong on it: errors in the console, and requests to anyone but our own server."""

    def __init__(self, page: Page, url: str, settings: Mapping[str, str] = BEEN_HERE) -> None:
        """`settings`: what the user chose at an earlier visit, as the page keeps it in the browser."""
        page.add_init_script(
            f"for (const [name, value] of Object.entries({json.dumps(dict(settings))})) "
            "try { localStorage[`story-${name}`] ??= value; } catch { /* about:blank has none */ }"
        )
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self.foreign: list[str] = []
        page.set_default_timeout(TIMEOUT)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(request.url)

    def open(self, query: str = "") -> Tab:
        self.page.goto(self.url + query)
        self.page.wait_for_selector("#prompt textarea")
        self.page.wait_for_selector("#write:enabled")
        return self

    def follow(self, link: str, title: str) -> None:
        """Click the link to another page of ours, and wait for that page's title."""
        self.page.get_by_role("link", name=link, exact=True).click()
        expect(self.page).to_have_title(title, timeout=TIMEOUT)
        # Gradio says that the page which was left was in the middle of a request; nobody sees that.
        self.errors[:] = [error for error in self.errors if "Connection errored out" not in error]

    def length(self, tokens: int) -> None:
        self.page.fill("#length input[type=number]", str(tokens))
        self.page.locator("#length input[type=number]").blur()

    def more(self) -> None:
        self.page.click("#more > button")
        self.page.wait_for_selector("#seed input")

    def story(self) -> str:
        return self.page.locator("#book article").text_content() or ""

    def generated(self) -> str:
        return "".join(self.page.locator("#book .generated").all_text_contents())

    def figures(self) -> str:
        return self.page.locator("#book .figures p").text_content() or ""

    def phase(self) -> str:
        return self.page.locator("#book .book").get_attribute("data-phase") or ""

    def reaches(self, *phases: str) -> None:
        wanted = ", ".join(f'#book .book[data-phase="{phase}"]' for phase in phases)
        self.page.wait_for_selector(wanted)

    def enabled(self) -> list[str]:
        names = ("write", "stop", "skip", "continue", "again", "save", "link")
        return [name for name in names if self.page.locator(f"#{name}").is_enabled()]

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))
