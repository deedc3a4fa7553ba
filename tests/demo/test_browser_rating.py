"""A user's rating, from the button in a real browser to the row in the database; and the same user's next visit."""

from __future__ import annotations

import sqlalchemy as sa
from playwright.sync_api import Browser, expect

from demo.routing import RoutingBackend
from experiments.ab.assignment import parse_split
from experiments.ab.recorder import Recorder
from experiments.ab.store import connect, endings, exposures, ratings
from tests.demo.engines import local_backend
from tests.demo.served import serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab

pytestmark = IN_A_BROWSER


def write(tab: Tab) -> None:
    tab.page.fill("#prompt textarea", "One sunny day")
    tab.length(8)
    tab.page.click("#write")
    tab.page.wait_for_selector("#like:enabled")


def test_a_thumb_becomes_a_row_and_the_user_is_known_again(browser: Browser) -> None:
    variants = {name: local_backend(end_bias=-50) for name in ("a", "b")}
    recorder = Recorder("sqlite:///stories.db", period=0.02)
    backend = RoutingBackend(parse_split("a:1,b:1", "t"), variants, recorder)
    context = browser.new_context(viewport={"width": 360, "height": 740})
    with serve(backend) as served:
        tab = Tab(context.new_page(), served.url).open()
        expect(tab.page.locator("#rating")).to_be_hidden(timeout=TIMEOUT)
        write(tab)
        expect(tab.page.get_by_role("button", name="I like it")).to_be_visible(timeout=TIMEOUT)
        assert tab.overflow() <= 0
        tab.page.click("#like")
        tab.page.wait_for_selector('#like[aria-pressed="true"]')
        assert tab.page.inner_text("#book .spoken") == "Noted: you like it."
        tab.page.focus("#dislike")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector('#dislike[aria-pressed="true"]')
        assert tab.page.get_attribute("#like", "aria-pressed") == "false"
        shown = tab.page.inner_text("body")
        assert "one of 2 versions that are being compared" in shown
        tab.page.close()
        later = Tab(context.new_page(), served.url).open()  # the same browser, another visit
        write(later)
        assert later.page.get_attribute("#like", "aria-pressed") == "false"
        other = browser.new_context()
        write(Tab(other.new_page(), served.url).open())
        other.close()
        assert (tab.errors, tab.foreign, later.errors) == ([], [], [])
    context.close()
    with connect("sqlite:///stories.db", writes=False).connect() as connection:
        stories = connection.execute(sa.select(exposures).order_by(exposures.c.id)).all()
        verdicts = connection.execute(sa.select(ratings).order_by(ratings.c.id)).all()
        ended = connection.execute(sa.select(endings).order_by(endings.c.id)).all()
    assert [(row.story, row.rating) for row in verdicts] == [(stories[0].story, 1), (stories[0].story, -1)]
    assert [row.outcome for row in ended] == ["length"] * 3
    users = [row.user_hash for row in stories]
    assert users[0] == users[1] != users[2]
    assert stories[0].variant == stories[1].variant
