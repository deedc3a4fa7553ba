"""The Status page in a real browser: it renews itself, does not grow, and loses no figure when the service is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, expect

from demo.status_page import PATH
from tests.demo.engines import local_backend
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, opening, violations

pytestmark = IN_A_BROWSER
ROWS = "document.querySelectorAll('#status *').length"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(local_backend(slots=4, end_bias=-50)) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Tab]]:
    with opening(browser) as make:

        def on_status(**options: object) -> Tab:
            tab = make(url=served.url, path=PATH, **options)
            expect(tab.page.locator("#status .state b")).to_have_text("Ready", timeout=TIMEOUT)
            return tab

        yield on_status


def test_figures_renew_themselves_and_rows_stay_the_same_nodes(served: Served, opened: Callable[..., Tab]) -> None:
    page = opened().page
    row = page.locator("#status .figures tr").filter(has_text="First token, 95th percentile")
    before = page.evaluate(ROWS)
    told = page.locator("#status .window").inner_text()
    page.evaluate("window.row = document.querySelector('#status .figures tr')")
    for seed in range(3):
        asked = {"model": "story-writer", "prompt": "One day", "max_tokens": 8, "seed": seed}
        httpx.post(f"{served.url}v1/completions", json=asked, timeout=60).raise_for_status()
    expect(page.locator("#status .window")).not_to_have_text(told, timeout=TIMEOUT)
    expect(row.locator(".value")).to_contain_text(" ", timeout=TIMEOUT)
    expect(row.locator(".threshold")).to_have_text("≤ 1 s")
    expect(row.locator(".verdict")).to_have_text("✓ holds", timeout=TIMEOUT)
    assert page.evaluate("window.row.isConnected")
    assert page.evaluate(ROWS) == before
    expect(page.locator("#status .load")).to_contain_text("0 of 4")


def test_a_user_finds_the_page(served: Served, browser: Browser) -> None:
    with opening(browser) as make:
        tab = make(url=served.url)
        page = tab.page
        tab.follow("Status", "Status · Write me a story")
        expect(page.get_by_role("heading", name="Status", exact=True)).to_be_visible(timeout=TIMEOUT)
        expect(page.locator("#status .state b")).to_have_text("Ready", timeout=TIMEOUT)


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (1280, "dark")])
def test_axe_finds_nothing_and_nothing_sticks_out(opened: Callable[..., Tab], width: int, scheme: str) -> None:
    tab = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    expect(tab.page.locator("#status .figures tr").first).to_be_visible(timeout=TIMEOUT)
    assert tab.overflow() <= 0
    assert violations(tab.page) == []
