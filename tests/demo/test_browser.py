"""The page in a real browser: headless Chromium, a real server, a real engine.

The network behind most of these tests is untrained and slowed down (see `engines.py`), so that there is time
to watch and to stop. The last test uses the model that ships with the repository.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

from demo.form import Form, encode_link
from demo.page import EXAMPLES
from model import generation
from model.serving.backend import LocalBackend
from model.serving.cache import LRUCache, ResponseCache
from model.serving.http.app import SharedState
from model.serving.rate_limit import Limiter, quotas_of
from model.settings import Settings
from tests.demo.engines import local_backend
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, opening, violations

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(local_backend(slots=2, queue=2, step_seconds=0.02, end_bias=-50)) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Tab]]:
    with opening(browser) as make:
        yield functools.partial(make, url=served.url)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.02)


def test_a_user_at_the_limit_reads_when_there_is_more_and_a_story_opened_again_comes_from_the_cache(
    opened: Callable[..., Tab],
) -> None:
    limiter = Limiter(quotas_of("2/minute", "client", "stories"))
    shared = SharedState(limiter, ResponseCache(LRUCache(1_000_000, 60), 60))
    with serve(shared.with_cache(local_backend(slots=2, queue=2, end_bias=-50)), shared=shared) as served:
        tab = opened(url=served.url, query=f"?{encode_link(Form(prompt='One day', max_tokens=20, seed=7), '')}")
        status = tab.page.locator("#book .status")
        expect(tab.page.locator("#book .figures p")).to_contain_text("written locally", timeout=TIMEOUT)
        expect(tab.page.locator("#prompt textarea")).to_have_value("One day", timeout=TIMEOUT)
        for expected in ("20 tokens from the cache", "You have had as many stories"):
            tab.page.click("#write")
            expect(status).to_contain_text(expected, timeout=TIMEOUT)
        assert "Please try again in" in (status.text_content() or "")
        tab.page.goto("about:blank")
        assert httpx.post(f"{served.url}api/generate", json={"prompt": "One day"}, timeout=None).status_code == 429
        tab.page.context.close()


def active(served: Served) -> int:
    assert isinstance(served.backend, LocalBackend)
    return served.backend.engine.stats().active


def test_a_story_is_begun_grows_is_stopped_half_way_and_another_is_read_to_its_end(
    served: Served, opened: Callable[..., Tab]
) -> None:
    tab = opened()
    assert tab.enabled() == ["write"]
    tab.page.fill("#prompt textarea", "One sunny day")
    tab.length(1000)
    tab.page.click("#write")
    lengths: set[int] = set()

    def grown() -> bool:
        lengths.add(len(tab.generated()))
        return len(lengths) >= 5

    wait_until(grown, "five lengths of one story")
    assert active(served) == 1
    assert tab.enabled() == ["stop", "save", "link"]
    assert re.search(r"\d+ tokens · .*tokens/s · first after .* · seed \d+", tab.figures())

    tab.page.click("#stop")
    tab.reaches("open")
    wait_until(lambda: active(served) == 0, "the engine's slot to be free")
    expect(tab.page.locator("#book .status")).to_contain_text("Stopped · ")  # its length comes from the server
    assert tab.story().startswith("One sunny day")
    half = tab.generated()
    assert len(half) > 0
    assert "1,000 tokens" not in tab.figures()
    assert tab.enabled() == ["write", "continue", "again", "save", "link"]

    tab.length(10)
    tab.page.click("#continue")
    expect(tab.page.locator("#book .status")).to_contain_text("length you set · 10 tokens", timeout=TIMEOUT)
    assert tab.generated().startswith(half)
    assert len(tab.generated()) > len(half)

    tab.length(30)
    tab.page.fill("#prompt textarea", "Tom had a robot")
    tab.page.click("#write")
    expect(tab.page.locator("#book .status")).to_contain_text("30 tokens", timeout=TIMEOUT)
    tab.reaches("open")
    assert tab.story().startswith("Tom had a robot")
    assert tab.page.inner_text("#book .status").startswith("Stopped at the length you set · 30 tokens")
    assert active(served) == 0


def test_a_button_that_would_not_answer_yet_cannot_be_pressed(opened: Callable[..., Tab]) -> None:
    first = """new MutationObserver(() => {
      const write = document.getElementById("write");
      if (write) window.atFirst ??= write.disabled;
    }).observe(document, { childList: true, subtree: true });"""
    tab = opened(before=lambda page: page.add_init_script(first))
    assert tab.page.evaluate("atFirst") is True
    assert tab.enabled() == ["write"]


def test_the_keyboard_writes_and_stops_and_the_focus_is_never_lost(opened: Callable[..., Tab]) -> None:
    tab = opened()
    assert tab.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    tab.length(1000)
    tab.page.focus("#prompt textarea")
    tab.page.keyboard.type("Sam and Mia")
    tab.page.keyboard.press("Control+Enter")
    tab.reaches("writing")
    assert tab.page.input_value("#prompt textarea") == "Sam and Mia"
    tab.page.keyboard.press("Escape")
    tab.reaches("open")
    tab.page.focus("#write")
    tab.page.keyboard.press("Enter")
    tab.reaches("writing")
    tab.page.wait_for_function("document.activeElement.id === 'stop'")
    outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    tab.page.keyboard.press("Enter")
    tab.reaches("open")
    tab.page.wait_for_function("document.activeElement.id === 'write'")


def test_a_screen_reader_hears_that_writing_begins_and_how_it_ended(opened: Callable[..., Tab]) -> None:
    tab = opened()
    live = tab.page.locator("#book [role=status]")
    assert live.get_attribute("aria-live") == "polite"
    tab.page.evaluate(
        """() => {
            window.said = [];
            const node = document.querySelector('#book [role=status]');
            new MutationObserver(() => window.said.push(node.textContent)).observe(node, {childList: true});
        }"""
    )
    tab.length(40)
    tab.page.click("#write")
    tab.reaches("open")
    said = tab.page.evaluate("window.said")
    assert said[0] == "Writing."
    assert said[-1] == "Stopped at the length you set."
    assert len(said) == 2
    for field in ("#prompt textarea", "#length input[type=range]"):
        assert tab.page.locator(field).evaluate("node => (node.labels?.length ?? 0) > 0 || !!node.ariaLabel")


@pytest.mark.parametrize(
    ("scheme", "sizes"), [("light", [(320, 740), (820, 1100)]), ("dark", [(360, 740), (1280, 800)])]
)
def test_nothing_sticks_out_and_the_actions_stay_in_reach(
    opened: Callable[..., Tab], scheme: str, sizes: list[tuple[int, int]]
) -> None:
    tab = opened(viewport={"width": sizes[0][0], "height": sizes[0][1]}, color_scheme=scheme)
    assert tab.page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    assert tab.overflow() <= 0
    tab.more()
    for width, height in sizes:
        tab.page.set_viewport_size({"width": width, "height": height})
        assert tab.overflow() <= 0
        lines = "all => all.map(one => one.getClientRects().length && one.scrollWidth - one.clientWidth)"
        assert set(tab.page.locator("#actions button").evaluate_all(lines)) == {0}, "a button's word is cut or broken"
        tab.page.fill("#prompt textarea", "A" * 300 + " very long word")
        tab.length(400)  # 8 s of writing: on a busy machine a shorter story is over before it is looked at
        column = "document.querySelector('main.contain').getBoundingClientRect().width"
        before = tab.page.evaluate(column)
        tab.page.click("#write")
        tab.reaches("writing")
        expect(tab.page.locator("#stop")).to_be_in_viewport(timeout=TIMEOUT)
        assert tab.page.evaluate(column) == before, "the page jumps when words come"
        tab.page.keyboard.press("Escape")
        tab.reaches("open")
        assert tab.overflow() <= 0
        for end in ("0", "document.body.scrollHeight"):  # nor can they be scrolled away from
            tab.page.evaluate(f"scrollTo(0, {end})")
            expect(tab.page.locator("#stop")).to_be_in_viewport(ratio=1)


def test_the_paper_can_be_turned_and_stays_so(opened: Callable[..., Tab]) -> None:
    tab = opened(color_scheme="light")
    background = "getComputedStyle(document.querySelector('#book .book')).backgroundColor"
    light = tab.page.evaluate(background)
    tab.page.click("#paper")
    assert tab.page.get_attribute("#paper", "aria-pressed") == "true"
    dark = tab.page.evaluate(background)
    assert dark != light
    tab.open()
    assert tab.page.evaluate(background) == dark


def test_another_word_makes_a_branch_and_nothing_is_lost(opened: Callable[..., Tab]) -> None:
    tab = opened()
    page = tab.page
    tab.length(30)
    page.fill("#prompt textarea", "One sunny day")
    page.click("#write")
    tab.reaches("open", "ended")
    first = tab.story()
    page.wait_for_selector("#book article.alive")
    page.focus("#book article")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector("#choices li >> nth=1")
    assert violations(page) == []
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    word = page.locator('#choices li[aria-selected="true"] span').first.text_content()
    page.keyboard.press("Enter")
    branch = page.locator("#book .branches .name").nth(1)
    expect(branch).to_have_attribute("aria-current", "true")
    tab.reaches("open", "ended")
    second = tab.story()
    assert second != first
    assert (branch.text_content() or "").endswith(word or "?")
    page.focus("#book article")
    page.keyboard.press("Backspace")
    expect(page.locator("#book article")).to_have_text(first)
    page.reload()
    expect(branch).to_be_visible(timeout=TIMEOUT)
    branch.click()
    expect(page.locator("#book article")).to_have_text(second)
    page.click("#write")
    expect(branch).to_be_hidden()


def test_a_link_opens_the_same_prompt_and_settings_which_give_the_same_story(
    served: Served, opened: Callable[..., Tab]
) -> None:
    tab = opened()
    tab.more()
    tab.page.fill("#prompt textarea", "One day & night: 50% rain?\nYes")
    tab.page.fill("#seed input", "4711")
    tab.page.fill("#temperature input[type=number]", "1.3")
    tab.page.locator("#temperature input[type=number]").blur()
    tab.length(25)
    tab.page.click("#write")
    tab.reaches("open")
    first = tab.story()
    tab.page.click("#link")
    tab.page.wait_for_function("location.search.includes('seed=4711')")
    address = tab.page.url
    assert parse_qs(urlsplit(address).query)["model"] == [served.backend.model.version[:12]]

    other = opened(query="?" + urlsplit(address).query)
    expect(other.page.locator("#prompt textarea")).to_have_value("One day & night: 50% rain?\nYes", timeout=TIMEOUT)
    other.reaches("open")
    assert other.story() == first
    assert other.page.inner_text("#book .note") == "From a link."
    other.more()
    assert other.page.input_value("#seed input") == "4711"
    assert other.page.input_value("#temperature input[type=number]") == "1.3"
    other.page.click("#write")
    expect(other.page.locator("#book .note")).to_be_hidden(timeout=TIMEOUT)
    other.reaches("open")
    assert other.story() == first


def test_write_and_again_bring_a_new_story_and_the_same_seed_the_same_one(opened: Callable[..., Tab]) -> None:
    tab = opened()
    tab.more()
    tab.page.fill("#prompt textarea", "One day")
    tab.length(25)
    stories = []
    for button in ("write", "write", "again"):
        tab.page.click(f"#{button}")
        tab.page.wait_for_function("document.querySelector('#book .book').ariaBusy === 'true'")
        tab.reaches("open")
        stories.append(tab.generated())
        assert tab.story().startswith("One day")
    assert len(set(stories)) == 3
    assert tab.page.input_value("#seed input") == ""
    tab.page.click("#same-seed")
    tab.page.wait_for_function("document.querySelector('#seed input').value !== ''")
    assert f"seed {tab.page.input_value('#seed input')}" in tab.figures()
    tab.page.click("#write")
    tab.page.wait_for_function("document.querySelector('#book .book').ariaBusy === 'true'")
    tab.reaches("open")
    assert tab.generated() == stories[-1]


JOINS = "**/gradio_api/queue/join*"


def test_a_seed_typed_before_the_pages_first_answer_stays(opened: Callable[..., Tab]) -> None:
    held: list[Route] = []
    tab = opened(query="?prompt=One+day", before=lambda page: page.route(JOINS, lambda route: held.append(route)))
    tab.more()
    tab.page.fill("#seed input", "4711")
    wait_until(lambda: bool(tab.page.title() and held), "the page's first request")
    tab.page.unroute(JOINS)  # which lets those go that were held
    expect(tab.page.locator("#book .note")).to_contain_text("From a link.", timeout=TIMEOUT)
    assert tab.page.input_value("#prompt textarea") == "One day"
    assert tab.page.input_value("#seed input") == "4711"


def test_wrong_input_is_told_where_the_user_is_and_beside_its_field_even_in_a_closed_fold(
    opened: Callable[..., Tab],
) -> None:
    tab = opened()
    tab.more()
    tab.page.fill("#seed input", "-5")
    tab.page.locator("#seed input").blur()
    tab.page.click("#more > button")
    expect(tab.page.locator("#seed input")).to_be_hidden(timeout=TIMEOUT)
    tab.page.click("#write")
    expect(tab.page.locator("#seed input")).to_be_focused(timeout=TIMEOUT)
    message = tab.page.locator("#seed .problem")
    assert message.inner_text().startswith("Seed must be a whole number between 0 and")
    for place in ("#book .status", "#book [role=status]"):
        assert tab.page.text_content(place) == message.inner_text()
    field = tab.page.locator("#seed input")
    assert field.get_attribute("aria-invalid") == "true"
    assert field.get_attribute("aria-describedby") == message.get_attribute("id")
    tab.page.fill("#seed input", "5")
    tab.length(5)
    tab.page.click("#write")
    tab.reaches("open")
    assert message.count() == 0
    assert field.get_attribute("aria-invalid") is None


def test_a_story_is_text_whatever_it_looks_like(opened: Callable[..., Tab]) -> None:
    tab = opened()
    evil = "<img src=x onerror=\"document.title='owned'\"> ${document.title='owned'} {{value}} `<b>*bold*</b>"
    tab.page.fill("#prompt textarea", evil)
    tab.length(5)
    tab.page.click("#write")
    tab.reaches("open")
    assert tab.story().startswith(evil)
    assert tab.page.locator("#book article img, #book article b, #book article em").count() == 0
    assert tab.page.title() == "Write me a story"


def test_a_story_is_saved_as_it_is(opened: Callable[..., Tab]) -> None:
    tab = opened()
    tab.page.fill("#prompt textarea", "Once, “a fox” said:\n\nHello")
    tab.length(20)
    tab.page.click("#write")
    tab.reaches("open")
    with tab.page.expect_download() as download:
        tab.page.click("#save")
    assert download.value.suggested_filename == "once-a-fox-said-hello.txt"
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.startswith("Once, “a fox” said:\n\nHello")
    assert "".join(text.split()) == "".join(tab.story().split())


def test_closing_the_tab_frees_the_slot(served: Served, opened: Callable[..., Tab]) -> None:
    tab = opened()
    tab.length(1000)
    tab.page.click("#write")
    tab.reaches("writing")
    assert active(served) == 1
    tab.page.close()
    wait_until(lambda: active(served) == 0, "the slot of a closed tab")


def test_a_full_queue_is_reported_in_a_friendly_way(served: Served, opened: Callable[..., Tab]) -> None:
    assert isinstance(served.backend, LocalBackend)
    engine = served.backend.engine
    streams = [engine.submit(generation.GenerationRequest(prompt="", max_tokens=4000)) for _ in range(4)]
    try:
        tab = opened()
        tab.page.click("#write")
        tab.reaches("failed")
        assert "try again in about" in tab.page.inner_text("#book .status")
    finally:
        for stream in streams:
            stream.cancel()


def test_the_shipped_model_writes_a_story_to_its_end(opened: Callable[..., Tab]) -> None:
    with serve(LocalBackend.load(Settings(story_slots=2))) as served:
        form = Form(prompt=next(iter(EXAMPLES.values())), seed=7)
        tab = opened(url=served.url, query="?" + encode_link(form, served.backend.model.version))
        expect(tab.page.locator("#prompt textarea")).to_have_value(form.prompt, timeout=TIMEOUT)
        tab.reaches("ended", "open")
        assert len(tab.generated().split()) > 30
        assert "tokens/s" in tab.figures()
        tab.page.context.close()
