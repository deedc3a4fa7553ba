"""Branches, futures, dice, shelf and links of a story in a real browser, over a real engine."""

from __future__ import annotations

import functools
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from demo import theme
from tests.demo.engines import local_backend
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, opening, violations

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(local_backend(slots=8, queue=16, end_bias=-50)) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Tab]]:
    with opening(browser) as make:
        yield functools.partial(make, url=served.url)


def written(tab: Tab, tokens: int = 30) -> str:
    """Write a story, and wait until its words can be looked at."""
    tab.length(tokens)
    tab.page.fill("#prompt textarea", "One sunny day")
    tab.page.click("#write")
    tab.reaches("open", "ended")
    tab.page.wait_for_selector("#book article.alive")
    return tab.story()


def look(tab: Tab, word: int) -> None:
    """Go to a word, by its number from 1, and wait for what else could stand there."""
    tab.page.focus("#book article")
    for _ in range(word):
        tab.page.keyboard.press("ArrowRight")
    tab.page.wait_for_selector("#choices li >> nth=1")


def branched(tab: Tab, word: int = 3, choice: str = "2") -> str:
    """Fork at a word, by the number of another one."""
    rows = tab.page.locator("#book .branches .name").count()
    look(tab, word)
    tab.page.keyboard.press(choice)
    expect(tab.page.locator("#book .branches .name")).to_have_count(max(2, rows + 1), timeout=TIMEOUT)
    tab.reaches("open", "ended")
    tab.page.wait_for_selector("#book article.alive")
    return tab.story()


def test_a_branch_is_starred_compared_and_pruned_and_pruning_can_be_undone(opened: Callable[..., Tab]) -> None:
    tab = opened()
    page = tab.page
    first = written(tab)
    second = branched(tab)
    assert violations(page) == []
    name = page.locator("#book .branches .name").nth(1)
    star = page.locator("#book .branches .star").nth(1)
    star.focus()
    page.keyboard.press("Enter")
    expect(star).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("document.activeElement.className") == "star"
    page.click("#book .branches .compare")
    columns = page.locator("#book .comparison p")
    assert columns.all_text_contents() == [second, first]
    same = ["".join(column.locator(":scope > span").all_text_contents()) for column in (columns.nth(0), columns.nth(1))]
    assert same[0] == same[1] != ""
    assert page.locator("#book .comparison mark").count() >= 2
    assert violations(page) == []
    page.keyboard.press("Enter")  # Close has the focus
    expect(page.locator("#book .comparison")).to_be_hidden()
    page.click("#book .branches .prune")
    expect(page.locator("#book article")).to_have_text(first)
    expect(page.locator("#book .branches")).to_be_hidden()
    page.keyboard.press("Control+z")
    expect(page.locator("#book article")).to_have_text(second)
    expect(star).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(name).to_have_attribute("aria-current", "true", timeout=TIMEOUT)
    expect(star).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#book article")).to_have_text(second)


def common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, computed row by row."""
    row = [0] * (len(second) + 1)
    for one in first:
        above = row.copy()
        for at, other in enumerate(second):
            row[at + 1] = above[at] + 1 if one == other else max(row[at], above[at + 1])
    return row[-1]


def test_a_difference_is_both_texts_and_as_much_in_common_as_can_be(browser: Browser) -> None:
    rng = random.Random(5)
    cases = [[[rng.choice("abcd") for _ in range(rng.randrange(14))] for _ in range(2)] for _ in range(300)]
    page = browser.new_page()
    found = page.evaluate(
        f"(cases) => {{ {theme.asset('difference.js')} return cases.map(([a, b]) => difference(a, b)); }}", cases
    )
    page.close()
    for (first, second), parts in zip(cases, found, strict=True):
        assert "".join(part["first"] for part in parts) == "".join(first)
        assert "".join(part["second"] for part in parts) == "".join(second)
        assert all(part["first"] == part["second"] for part in parts if part["same"])
        shared = sum(len(part["first"]) for part in parts if part["same"])
        assert shared == common(first, second)
        assert shared >= sum(block.size for block in SequenceMatcher(None, first, second).get_matching_blocks())


def test_a_future_is_looked_at_closer_left_again_and_taken(opened: Callable[..., Tab]) -> None:
    tab = opened()
    page = tab.page
    written(tab, 40)
    look(tab, 4)
    page.keyboard.press("f")
    limbs = page.locator("#book .fan li button")
    expect(limbs.first).to_be_focused(timeout=TIMEOUT)
    every = limbs.count()
    assert every > 1
    assert violations(page) == []
    page.keyboard.press("Enter")
    take = page.get_by_role("button", name="Go on from here")
    expect(take).to_be_focused()
    zoomed = limbs.count()
    assert zoomed < every
    assert violations(page) == []
    limbs.first.click()  # back
    expect(limbs).to_have_count(every)
    page.keyboard.press("Enter")
    words = limbs.first.text_content() or ""
    page.keyboard.press("Enter")
    expect(page.locator("#book .branches .name")).to_have_count(2, timeout=TIMEOUT)
    tab.reaches("open", "ended")
    assert words.split()[0] in tab.story()


def test_dice_write_one_word_at_a_time_as_the_user_or_chance_decides(opened: Callable[..., Tab]) -> None:
    tab = opened()
    page = tab.page
    page.fill("#prompt textarea", "One sunny day")
    page.click("#book .dicing")
    texts = [tab.story()]
    assert texts == ["One sunny day"]
    for key in ("1", "2", "Enter", "Enter"):
        page.wait_for_selector("#choices li >> nth=1")
        chosen = page.locator("#choices li span").nth(2 * (int(key) - 1)).text_content() if key.isdigit() else ""
        page.keyboard.press(key)
        page.wait_for_function("(text) => document.querySelector('#book article').textContent !== text", arg=texts[-1])
        texts.append(tab.story())
        assert texts[-1].startswith(texts[-2])
        assert texts[-1].endswith(chosen or "")
    assert violations(page) == []
    page.wait_for_selector("#choices li >> nth=1")
    page.keyboard.press("Backspace")
    expect(page.locator("#book article")).to_have_text(texts[-2])
    page.wait_for_selector("#choices li >> nth=1")
    page.keyboard.press("Escape")
    expect(page.locator("#choices")).to_be_hidden()
    assert page.get_attribute("#book .dicing", "aria-pressed") == "false"
    tab.length(10)
    page.click("#continue")
    expect(page.locator("#book .status")).to_contain_text("10 tokens", timeout=TIMEOUT)
    assert tab.story().startswith(texts[-2])


def test_a_link_opens_the_whole_tree_and_nothing_of_it_is_sent_in_an_address(opened: Callable[..., Tab]) -> None:
    tab = opened()
    page = tab.page
    first = written(tab)
    second = branched(tab)
    page.click("#book .branches .star >> nth=1")
    page.click("#link")
    page.wait_for_function("location.hash.startsWith('#tree=')")
    assert len(page.url) < 1000
    page.reload()
    expect(page.locator("#book article")).to_have_text(second, timeout=TIMEOUT)

    asked: list[str] = []
    other = opened(
        query=page.url.removeprefix(tab.url),
        before=lambda page: page.on("request", lambda request: asked.append(request.url)),
        settings={},
    )
    expect(other.page.locator("#book article")).to_have_text(second, timeout=TIMEOUT)
    assert [url for url in asked if "tree" in url and "#" not in url] == []
    expect(other.page.locator("#book .note")).to_have_text("From a link.")
    expect(other.page.locator("#book .branches .star").nth(1)).to_have_attribute("aria-pressed", "true")
    other.page.click("#book .branches .name >> nth=0")
    expect(other.page.locator("#book article")).to_have_text(first)
    other.page.goto("about:blank")
    other.page.goto(f"{tab.url}#tree=damaged")
    expect(other.page.locator("#book .status")).to_have_text("This link is damaged.", timeout=TIMEOUT)


def test_stories_stand_on_a_shelf_until_they_are_deleted_which_can_be_undone(opened: Callable[..., Tab]) -> None:
    tab = opened()
    page = tab.page
    first = written(tab)
    branch = branched(tab)
    page.fill("#prompt textarea", "Another day")
    page.click("#write")
    expect(page.locator("#book article")).to_contain_text("Another day", timeout=TIMEOUT)
    tab.reaches("open", "ended")
    later = Tab(page.context.new_page(), tab.url).open()
    shelf = later.page.locator(".shelf li")
    later.page.click(".shelf summary")
    expect(shelf).to_have_count(2, timeout=TIMEOUT)
    assert violations(later.page) == []
    shelf.nth(1).locator("button").first.click()
    expect(later.page.locator("#book article")).to_have_text(branch)
    later.page.click("#book .branches .name >> nth=0")
    expect(later.page.locator("#book article")).to_have_text(first)
    shelf.first.get_by_text("Delete").click()
    expect(shelf).to_have_count(1)
    later.page.click("#book .undo button")
    expect(shelf).to_have_count(2)
    later.page.click(".shelf .clear")
    expect(shelf).to_have_count(0)
    later.page.keyboard.press("Control+z")
    expect(shelf).to_have_count(2)
    assert (later.errors, later.foreign) == ([], [])


def saved(tab: Tab, button: str) -> tuple[str, bytes]:
    with tab.page.expect_download() as download:
        tab.page.click(button)
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def test_a_story_is_saved_with_its_tree_as_markdown_and_as_a_cover(opened: Callable[..., Tab]) -> None:
    tab = opened()
    tab.page.fill("#prompt textarea", "One *sunny* day.\n1. Mia")
    tab.length(20)
    tab.page.click("#write")
    tab.reaches("open", "ended")
    name, text = saved(tab, "#save-md")
    assert name == "one-sunny-day-1-mia.md"
    assert text.decode().startswith("# One \\*sunny\\* day.\n\nOne \\*sunny\\* day.\n\n1\\. Mia")
    name, text = saved(tab, "#save-json")
    data: dict[str, Any] = json.loads(text)
    assert name == "one-sunny-day-1-mia.json"
    assert data["prompt"] + "".join(word["text"] for word in data["words"]) == data["story"]
    assert data["settings"]["max_tokens"] == "20"
    assert data["branches"][0]["story"] == data["story"]
    name, image = saved(tab, "#save-png")
    assert name == "one-sunny-day-1-mia.png"
    assert struct.unpack(">II", image[16:24]) == (1200, 1600)
    assert len(set(zlib.decompress(b"".join(chunks(image)))[:2_000_000])) > 20  # something is drawn


def chunks(image: bytes) -> Iterator[bytes]:
    """The compressed pixels of a PNG image."""
    at = 8
    while at < len(image):
        size, kind = struct.unpack(">I4s", image[at : at + 8])
        if kind == b"IDAT":
            yield image[at + 8 : at + 8 + size]
        at += size + 12


@pytest.mark.parametrize(("width", "height"), [(320, 740), (320, 256)], ids=["phone", "zoomed to 400 %"])
def test_nothing_of_a_tree_sticks_out_on_a_phone(opened: Callable[..., Tab], width: int, height: int) -> None:
    tab = opened(viewport={"width": width, "height": height})
    written(tab)
    branched(tab)
    assert tab.overflow() <= 0
    tab.page.click("#book .branches .compare")
    assert tab.overflow() <= 0
    tab.page.click("#book .comparison button")
    look(tab, 2)
    assert tab.overflow() <= 0
    tab.page.keyboard.press("f")
    tab.page.wait_for_selector("#book .fan li")
    assert tab.overflow() <= 0
    box = tab.page.locator("#book .fan").bounding_box()
    assert box is not None
    assert tab.page.locator("#book .fan").evaluate("node => node.scrollWidth - node.clientWidth") <= 0
    tab.page.click(".shelf summary")
    assert tab.overflow() <= 0
