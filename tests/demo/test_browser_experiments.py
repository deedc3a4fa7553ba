"""The Experiments page in a real browser, over a real store that a real process of its own reads.

`EXPERIMENTS_STORE=sqlite:///PATH EXPERIMENTS_SCREENSHOT=docs/experiments.png` makes the manual's picture of a store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from demo.experiments_page import PATH
from experiments.dashboard.client import StoreClient
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, violations
from tests.experiments.dashboard.made import made

pytestmark = IN_A_BROWSER
FIRST_TIMEOUT = 120_000
"""Milliseconds in which MLflow may be loaded, on a machine that does other things as well."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    store = os.environ.get("EXPERIMENTS_STORE") or made().uri
    client = StoreClient(store, ttl=600, first_timeout=FIRST_TIMEOUT / 1000, timeout=60)
    with serve(ScriptedBackend("A story."), experiments=client) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own, and holds it to silence and privacy."""
    tabs: list[Tab] = []

    def make(*, query: str = "", url: str = served.url, **options: object) -> Page:
        tab = Tab(browser.new_context(**options).new_page(), url)  # type: ignore[arg-type]
        tabs.append(tab)
        tab.page.goto(f"{url}{PATH}{query}")
        expect(tab.page.locator("#note .note")).not_to_contain_text("Reading", timeout=FIRST_TIMEOUT)
        return tab.page

    yield make
    for tab in tabs:
        tab.page.context.close()
    assert [tab.foreign for tab in tabs if tab.foreign] == []
    assert [tab.errors for tab in tabs if tab.errors] == []


def column(page: Page, number: int) -> list[str]:
    """The cells of a column of the table of runs, as they stand on the page."""
    rows = page.locator("#runs .virtual-row")
    return [rows.nth(at).locator("[role=gridcell]").nth(number).inner_text().strip() for at in range(rows.count())]


def points(page: Page) -> set[str]:
    """The runs that the picture's legend names."""
    return set(page.locator("#curves .legend .name").all_text_contents())


def test_runs_are_sorted_filtered_and_pressed_into_the_picture(opened: Callable[..., Page]) -> None:
    page = opened(viewport={"width": 1280, "height": 900})
    expect(page.locator("#runs .virtual-row")).to_have_count(2, timeout=TIMEOUT)
    expect(page.locator("#curves .legend .name")).to_have_count(2, timeout=TIMEOUT)
    assert points(page) == {"stopped", "learned"}
    assert column(page, 0) == ["stopped", "learned"], "the newest first"
    for order, runs in (("ascending", ["learned", "stopped"]), ("descending", ["stopped", "learned"])):
        page.click("#runs [data-testid=header-4] .cell-menu-button")
        page.get_by_role("menuitem", name=f"Sort {order}").click()
        expect(page.locator("#runs .virtual-row [data-col='0']")).to_have_text(runs, timeout=TIMEOUT)
        numbers = [int(text.replace(",", "")) for text in column(page, 4)]
        assert numbers == sorted(numbers, reverse=order == "descending"), "as numbers, however they are written"

    page.fill("#runs .search-input", "learned")
    expect(page.locator("#runs .virtual-row")).to_have_count(1, timeout=TIMEOUT)
    page.locator("#runs .virtual-row [role=gridcell]").nth(1).click()
    expect(page.locator("#curves .legend .name")).to_have_count(1, timeout=TIMEOUT)
    assert points(page) == {"stopped"}, "the pressed run has left the picture"
    page.wait_for_function("location.search.includes('runs=')")

    page.get_by_role("radio", name="Loss in training, nats a token").check()
    expect(page.locator("#curves figcaption").last).to_contain_text("nats", timeout=TIMEOUT)
    chosen = parse_qs(urlsplit(page.url).query)
    assert chosen["measure"] == ["training"]
    again = opened(query="?" + urlsplit(page.url).query)
    expect(again.locator("#curves .legend .name")).to_have_text(["stopped"], timeout=TIMEOUT)
    expect(again.locator("#curves figcaption").last).to_contain_text("nats", timeout=TIMEOUT)
    expect(again.get_by_role("radio", name="Loss in training, nats a token")).to_be_checked(timeout=TIMEOUT)


STROKES = """() => Object.fromEntries([...document.querySelectorAll('#curves .legend li')].map((line) => {
  const { stroke, strokeDasharray } = getComputedStyle(line.querySelector('.key line'));
  return [line.querySelector('.name').textContent, [stroke, strokeDasharray]];
}))"""
"""Of each run in the picture, the color of its line and its pattern of dashes."""


def test_a_run_keeps_its_color_and_both_papers_have_colors_of_their_own(opened: Callable[..., Page]) -> None:
    page = opened(color_scheme="light")
    names = page.locator("#curves .legend .name")
    expect(names).to_have_count(2, timeout=TIMEOUT)
    light = page.evaluate(STROKES)
    assert len({str(look) for look in light.values()}) == 2
    assert len({dashes for _, dashes in light.values()}) == 2, "those who see no colors tell them apart"
    for _ in range(2):
        page.locator("#runs .virtual-row").filter(has_text="stopped").locator("[role=gridcell]").nth(1).click()
        expect(names).to_have_text(["learned"], timeout=TIMEOUT)
        assert page.evaluate(STROKES) == {"learned": light["learned"]}
        page.locator("#runs .virtual-row").filter(has_text="stopped").locator("[role=gridcell]").nth(1).click()
        expect(names).to_have_text(["learned", "stopped"], timeout=TIMEOUT)
        assert page.evaluate(STROKES) == light
    page.click("#paper")
    dark = page.evaluate(STROKES)
    assert all(dark[name][0] != light[name][0] for name in light), "charts stayed in the old theme"
    lines = page.locator("#curves figure").first.locator("polyline")
    drawn = lines.evaluate_all("all => all.map(one => getComputedStyle(one).stroke)")
    assert drawn == [dark["learned"][0], dark["stopped"][0]]


def test_a_curve_is_read_by_pointer_and_by_keys(opened: Callable[..., Page]) -> None:
    page = opened(query="?measure=held-out")
    figure = page.locator("#curves figure").first
    expect(figure.locator("polyline")).to_have_count(2, timeout=TIMEOUT)
    tip = figure.locator(".tip")
    expect(tip).to_be_hidden()
    figure.locator(".plot").hover()
    expect(tip).to_contain_text("learned: ")
    assert tip.evaluate("node => getComputedStyle(node).backgroundColor") == "rgb(255, 253, 248)", "opaque"
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    figure.focus()
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("learned: ")
    first = made().trained.evaluations[0]
    assert f"learned: {float(f'{first.bits_per_byte:.4g}'):g}" in tip.inner_text(), "the point that is nearest"
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_memory_stays_flat_while_the_measure_is_changed(opened: Callable[..., Page]) -> None:
    page = opened()
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")

    def change(times: int) -> dict[str, float]:
        for _ in range(times):
            for label, unit in (("Loss in training, nats a token", "nats"), ("Bits per byte on", "Bits")):
                page.get_by_role("radio", name=label).check()
                expect(page.locator("#curves figcaption").last).to_contain_text(unit, timeout=TIMEOUT)
        devtools.send("HeapProfiler.collectGarbage")
        figures = devtools.send("Performance.getMetrics")["metrics"]
        return {each["name"]: each["value"] for each in figures}

    expect(page.locator("#curves figure").first.locator("polyline")).to_have_count(2, timeout=TIMEOUT)
    before, after = change(3), change(15)
    print({name: (before[name], after[name]) for name in ("Nodes", "JSEventListeners", "JSHeapUsedSize")})
    assert after["JSEventListeners"] <= before["JSEventListeners"] + 2
    assert after["Nodes"] <= before["Nodes"] + 50
    assert after["JSHeapUsedSize"] < before["JSHeapUsedSize"] + 1e6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Callable[..., Page], scheme: str) -> None:
    page = opened(color_scheme=scheme)
    expect(page.locator("#curves figure").first.locator("polyline")).to_have_count(2, timeout=TIMEOUT)
    page.locator("#version-2 summary").click()
    assert violations(page) == []


def test_the_slider_shows_how_it_learned_to_write(opened: Callable[..., Page]) -> None:
    page = opened()
    looks = made().trained.evaluations
    page.click("#sample-run input")
    page.get_by_role("option").filter(has_text="learned").click()
    last = f"step {looks[-1].step} · {looks[-1].tokens:,} tokens read"
    expect(page.locator("#learn .moment")).to_contain_text(last, timeout=TIMEOUT)
    slider = page.locator("#learn input[type=range]")
    assert slider.get_attribute("max") == str(len(looks) - 1)
    slider.focus()
    page.keyboard.press("Home")
    for number, look in enumerate(looks):
        expect(page.locator("#learn .moment")).to_contain_text(f"step {look.step} · ", timeout=TIMEOUT)
        shown = [
            text.removesuffix(" … and not a word more.") for text in page.locator("#learn .story").all_text_contents()
        ]
        assert shown == [prompt + continuation for prompt, continuation in look.samples]
        assert f"step={look.step}" in page.url or number == 0
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    page.click("#learn .play")
    expect(page.locator("#learn .moment")).to_contain_text(last, timeout=TIMEOUT)
    expect(page.locator("#learn .play")).to_have_attribute("aria-label", "Play", timeout=TIMEOUT)


def test_verdicts_are_distinguished_without_colors_and_each_has_an_address(opened: Callable[..., Page]) -> None:
    page = opened(query="#version-1", viewport={"width": 390, "height": 800}, color_scheme="dark")
    card = page.locator("#version-1")
    expect(card).to_have_attribute("open", "", timeout=TIMEOUT)
    badges = [" ".join(text.split()) for text in card.locator("td .verdict").all_inner_texts()]
    assert sorted(badges) == ["? Undecided", "✓ Pass", "✗ Fail"]
    styles = card.locator("td .verdict").evaluate_all("all => all.map(one => getComputedStyle(one).borderStyle)")
    assert sorted(styles) == ["dashed", "solid", "solid"]
    assert card.locator(".alias").all_inner_texts() == ["champion"]
    page.locator("#version-2 summary").click()
    page.wait_for_function("location.hash === '#version-2'")


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (820, "dark")])
def test_nothing_sticks_out(opened: Callable[..., Page], width: int, scheme: str) -> None:
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    expect(page.locator("#curves polyline").first).to_be_visible(timeout=TIMEOUT)
    parts = "[...document.querySelectorAll('main > *, #findings > *')]"
    widest = f"Math.max(...{parts}.map(part => part.getBoundingClientRect().right))"
    assert page.evaluate(widest) <= width
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")


def test_a_user_goes_there_and_back(served: Served, browser: Browser) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(served.url)
        page.get_by_role("link", name="How it was made").click()
        expect(page.get_by_role("heading", name="Experiments")).to_be_visible(timeout=TIMEOUT)
        expect(page).to_have_title("Experiments · Write me a story", timeout=TIMEOUT)
        page.get_by_role("link", name="Write", exact=True).click()
        expect(page.locator("#prompt textarea")).to_be_visible(timeout=TIMEOUT)
        expect(page).to_have_title("Write me a story", timeout=TIMEOUT)


def test_without_a_store_the_page_is_one_line(browser: Browser, tmp_path: Path) -> None:
    with (
        serve(ScriptedBackend("A story."), experiments=StoreClient(f"sqlite:///{tmp_path}/mlflow.db")) as served,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.goto(f"{served.url}{PATH}")
        line = page.locator("#note .note")
        expect(line).to_contain_text("There is no experiment yet", timeout=TIMEOUT)
        assert line.locator("code").all_inner_texts() == ["story train"]
        assert page.locator("#findings").count() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("EXPERIMENTS_SCREENSHOT" not in os.environ, reason="makes the manual's picture when it is named")
def test_the_picture_of_the_readme(opened: Callable[..., Page], repository: Path) -> None:
    page = opened(viewport={"width": 1280, "height": 900}, color_scheme="light")
    expect(page.locator("#curves polyline").first).to_be_visible(timeout=TIMEOUT)
    page.wait_for_timeout(1500)
    page.screenshot(path=repository / os.environ["EXPERIMENTS_SCREENSHOT"], full_page=True)
