"""The pictures of the manual, one a page: `make pictures`. The app runs as `story demo` does, with the shipped model.

`PICTURES` names their folder, `PICTURES_STORE` an MLflow store for the page Experiments instead of a small one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.demo.tabs import BEEN_HERE, IN_A_BROWSER, Tab
from tests.experiments.dashboard.made import made
from tests.load.service_process import service_process

pytestmark = [
    *IN_A_BROWSER,
    pytest.mark.skipif("PICTURES" not in os.environ, reason="makes the manual's pictures: `make pictures`"),
]
PATIENCE = 60_000
"""Milliseconds for what is looked at first: then the app's helpers are being loaded."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = os.environ.get("PICTURES_STORE") or made().uri
    kept = f"sqlite:///{tmp_path_factory.mktemp('pictures')}/stories.db"
    with service_process("demo", MLFLOW_TRACKING_URI=store, DATABASE_URL=kept, STORY_EXPERIMENTS="true") as running:
        yield running.url


@pytest.fixture
def page(url: str, browser: Browser) -> Iterator[Page]:
    with browser.new_context(viewport={"width": 1280, "height": 900}, device_scale_factor=1.5) as context:
        tab = Tab(context.new_page(), url, BEEN_HERE)
        tab.page.set_default_timeout(PATIENCE)
        yield tab.page


def at_a_word_of_a_story(page: Page) -> None:
    page.fill("#prompt textarea", "One night, Ember the dragon heard a knock at the door.")
    page.click("#more > button")
    page.fill("#seed input", "3")
    page.click("#more > button")
    page.click("#write")
    page.wait_for_selector("#book article.alive")
    page.focus("#book article")
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#choices li >> nth=1")
    page.keyboard.press("2")
    page.wait_for_selector("#book .branches li >> nth=1")
    page.wait_for_selector("#book article.alive")
    page.focus("#book article")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#choices li >> nth=1")


def at_what_spoke_for_a_word(page: Page) -> None:
    page.click("#inside summary")
    text = "Tom had a red kite. Tim had a blue ball. One day, the wind took the ball. Tim was sad. Tom ran to help Tim."
    page.fill("#inside textarea", text)
    page.click("#inside .read")
    expect(page.locator("#inside .note")).to_contain_text("The story", timeout=PATIENCE)
    page.get_by_role("button", name="Which words spoke for it?").click()
    expect(page.locator("#inside .evidence .found")).to_contain_text("times as likely as", timeout=PATIENCE)


def at_the_end_of_a_battle(page: Page) -> None:
    page.fill("#prompt textarea", "Zuri and Kofi found a map.")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".arena")).to_have_attribute("data-phase", "reading", timeout=PATIENCE)
    page.locator(".arena .skip:visible").click()
    for story in page.locator(".arena .pair section").all():
        story.locator(".end").scroll_into_view_if_needed()
    page.locator("[data-choice=first]:enabled").wait_for()


def at_the_curves(page: Page) -> None:
    page.set_viewport_size({"width": 1280, "height": 1500})
    expect(page.locator("#curves polyline:not(.faint)").first).to_be_visible(timeout=PATIENCE)


def at_the_figures(page: Page) -> None:
    expect(page.locator("#status .state b")).to_have_text("Ready", timeout=PATIENCE)
    expect(page.locator("#status .figures tr").first).to_be_visible(timeout=PATIENCE)


PAGES: dict[str, tuple[str, Callable[[Page], None]]] = {
    "demo": ("", at_a_word_of_a_story),
    "inside": ("inside", at_what_spoke_for_a_word),
    "arena": ("arena", at_the_end_of_a_battle),
    "experiments": ("experiments", at_the_curves),
    "status": ("status", at_the_figures),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_picture_of_each_page(name: str, url: str, page: Page, repository: Path) -> None:
    path, prepare = PAGES[name]
    page.goto(f"{url}{path}")
    page.wait_for_selector("main")
    prepare(page)
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    picture = repository / os.environ["PICTURES"] / f"{name}.png"
    page.screenshot(path=picture, full_page=name not in ("inside", "experiments"))
    assert picture.stat().st_size > 20_000
