"""The page's look and manners in a real browser, over a backend whose stories the tests choose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Route, expect

from demo.page import EXAMPLES
from tests.demo.scripted import ScriptedBackend, busy
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, Tab, opening, violations

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend("")


@pytest.fixture(scope="module")
def served(backend: ScriptedBackend) -> Iterator[Served]:
    with serve(backend) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Tab]]:
    with opening(browser) as make:
        yield functools.partial(make, url=served.url)


def initials(tab: Tab) -> list[str]:
    """What is set large: the text of each first paragraph that begins with an initial, and what hangs before it."""
    found: list[str] = tab.page.locator("#book .initial").evaluate_all(
        "all => all.map(one => one.firstChild.textContent + '|' + one.textContent)"
    )
    return found


INITIALS = {
    "Once upon a time.": ["|Once upon a time."],
    "A fox sat.": ["|A fox sat."],
    "“Hello,” said he.\nShe left.": ["“|“Hello,” said he."],
    '"Éa!" said he.': ['"|"Éa!" said he.'],
    "Жила лиса.": ["|Жила лиса."],
    "— Hello.": [],
    "# One": [],
    "3 mice": [],
    "I'm here.": [],
    "🦊 sat.": [],
    "كان يا ما كان": [],
}
"""Stories, and what of each begins with a large letter."""


def test_a_first_letter_is_set_large_where_its_script_has_large_initials(
    opened: Callable[..., Tab], backend: ScriptedBackend
) -> None:
    tab = opened()
    for story, set_large in INITIALS.items():
        backend.story = story
        tab.page.click("#write")
        expect(tab.page.locator("#book article")).to_have_text(story.replace("\n", ""), timeout=TIMEOUT)
        tab.page.wait_for_selector("#write:enabled")
        assert initials(tab) == set_large
        assert tab.generated() == story.replace("\n", "")
        if set_large:
            color = "getComputedStyle(document.querySelector('#book .initial'){}).color"
            assert tab.page.evaluate(color.format(", '::first-letter'")) != tab.page.evaluate(color.format(""))


def test_the_page_is_english_in_every_browser_and_text_runs_as_its_script_does(
    opened: Callable[..., Tab], backend: ScriptedBackend
) -> None:
    backend.story = " قال الثعلب"
    tab = opened(locale="ar-EG")
    assert tab.page.evaluate("document.documentElement.lang") == "en"
    tab.page.fill("#prompt textarea", "كان يا ما كان")
    direction = "node => getComputedStyle(node).direction"
    assert tab.page.locator("#prompt textarea").evaluate(direction) == "rtl"
    tab.page.click("#write")
    tab.reaches("ended")
    assert tab.page.locator("#book article p").evaluate(direction) == "rtl"
    assert tab.page.locator("#book .status").evaluate(direction) == "ltr"


def test_an_example_can_be_undone(opened: Callable[..., Tab]) -> None:
    tab = opened()
    field = tab.page.locator("#prompt textarea")
    assert field.get_attribute("placeholder") not in EXAMPLES.values()
    field.press_sequentially("My own")
    tab.page.locator("#examples button").first.click()
    expect(field).to_have_value(next(iter(EXAMPLES.values())), timeout=TIMEOUT)
    tab.page.keyboard.press("Control+z")
    expect(field).to_have_value("My own", timeout=TIMEOUT)


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_the_page_stands_still_while_it_is_loaded_and_says_our_words_first(
    served: Served, browser: Browser, width: int, height: int
) -> None:
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme="light") as context:
        page = context.new_page()
        page.add_init_script(
            """localStorage.setItem('story-paper', 'dark');
            window.shift = 0;
            window.moved = [];
            new PerformanceObserver(list => {
              for (const entry of list.getEntries()) {
                if (entry.hadRecentInput) continue;
                window.shift += entry.value;
                window.moved.push(...entry.sources.map(({ node, previousRect, currentRect }) =>
                  `${node?.id || node?.className}: ${previousRect.y} + ${previousRect.height} to ${currentRect.y}`));
              }
            }).observe({type: 'layout-shift', buffered: true});
            window.papers = new Set();
            window.loaders = 0;
            const look = () => {
              if (document.body && document.querySelector('h1')) {
                window.papers.add(getComputedStyle(document.body).backgroundColor);
                const loader = document.querySelector('.loading');
                if (loader && loader.checkVisibility()) window.loaders += 1;
              }
              requestAnimationFrame(look);
            };
            look();"""
        )
        page.goto(served.url)
        page.wait_for_selector("#more > button[aria-expanded]")
        expect(page.locator(".opening")).to_be_hidden(timeout=TIMEOUT)
        assert page.evaluate("[...window.papers]") == ["rgb(25, 23, 20)"], "a frame of light paper"
        assert page.evaluate("window.loaders") == 0
        assert page.evaluate("window.shift") <= 0.05, page.evaluate("window.moved")


WORDS = " ".join(f"word{number}" for number in range(400))


@pytest.fixture
def slow(backend: ScriptedBackend) -> Iterator[ScriptedBackend]:
    """The backend with a long story, a word each 20 ms."""
    backend.story, backend.pace = WORDS, 0.02
    yield backend
    backend.story, backend.pace, backend.fail = "", 0.0, None


def test_what_the_user_has_survives_a_reload_and_continue_sends_the_text_on_the_page(
    opened: Callable[..., Tab], slow: ScriptedBackend
) -> None:
    tab = opened()
    tab.length(900)
    tab.page.fill("#prompt textarea", "One day")
    tab.page.click("#write")
    expect(tab.page.locator("#book .generated").last).to_contain_text("word9", timeout=TIMEOUT)
    tab.page.goto("about:blank")  # in mid-story
    tab.page.go_back()
    tab.errors.clear()  # Gradio's own, of a stream that was left
    expect(tab.page.locator("#book .status")).to_contain_text("Press Continue to go on", timeout=TIMEOUT)
    expect(tab.page.locator("#prompt textarea")).to_have_value("One day", timeout=TIMEOUT)
    expect(tab.page.locator("#length input[type=number]")).to_have_value("900", timeout=TIMEOUT)
    story = tab.story()
    assert story.startswith("One dayword0 word1")
    slow.story, slow.pace = " and on.", 0.0
    tab.page.click("#continue")
    tab.reaches("ended")
    assert slow.streams[-1].request.prompt == story
    assert tab.story() == story + " and on."
    tab.page.reload()
    expect(tab.page.locator("#book article")).to_have_text(story + " and on.", timeout=TIMEOUT)


def test_a_story_is_kept_while_the_connection_is_cut(opened: Callable[..., Tab], slow: ScriptedBackend) -> None:
    tab = opened()
    tab.page.fill("#prompt textarea", "One day")
    tab.page.click("#write")
    expect(tab.page.locator("#book .generated").last).to_contain_text("word9", timeout=TIMEOUT)
    tab.page.context.set_offline(True)
    status = tab.page.locator("#book .status")
    expect(status).to_contain_text("There is no connection.", timeout=TIMEOUT)
    story = tab.story()
    tab.page.click("#write")
    expect(status).to_contain_text("Please try again", timeout=TIMEOUT)
    tab.page.context.set_offline(False)
    assert tab.story().startswith(story)
    assert {"write", "again", "save"} <= set(tab.enabled())
    tab.errors.clear()  # the browser's own, of requests without a connection


def test_a_refused_story_leaves_the_last_one_where_it_is(opened: Callable[..., Tab], slow: ScriptedBackend) -> None:
    slow.story, slow.pace = " he saw a frog.", 0.0
    tab = opened()
    tab.page.fill("#prompt textarea", "One day")
    tab.page.click("#write")
    tab.reaches("ended")
    slow.fail = busy()
    tab.page.click("#again")
    expect(tab.page.locator("#book .status")).to_contain_text("Please try again in about 3 seconds", timeout=TIMEOUT)
    assert tab.story() == "One day he saw a frog."
    assert tab.phase() == "ended"
    assert tab.enabled() == ["write", "again", "save", "link"]


def test_buttons_answer_at_the_press_and_only_the_last_story_is_written(
    opened: Callable[..., Tab], slow: ScriptedBackend
) -> None:
    tab = opened()
    tab.page.fill("#prompt textarea", "One day")
    before = len(slow.streams)
    pressed = tab.page.evaluate(
        """async () => {
            const seen = [];
            const look = () => seen.push([
              document.querySelector('#book .book').dataset.phase,
              document.getElementById('write').disabled, document.getElementById('stop').disabled]);
            document.getElementById('write').click(); look();
            await new Promise(done => setTimeout(done, 30));
            document.getElementById('stop').click(); look();
            document.getElementById('write').click(); look();
            return seen;
        }"""
    )
    assert pressed == [["waiting", True, False], ["empty", False, True], ["waiting", True, False]]
    expect(tab.page.locator("#book .generated").last).to_contain_text("word20", timeout=TIMEOUT)
    mine = slow.streams[before:]
    assert [stream.cancelled for stream in mine] == [True] * (len(mine) - 1) + [False]
    assert tab.story().startswith("One dayword0 word1 word2")
    tab.page.keyboard.press("Escape")
    assert tab.phase() == "open"
    frozen = len(tab.story())
    expect(tab.page.locator("#book .status")).to_contain_text("Stopped · ", timeout=TIMEOUT)
    assert len(tab.story()) - frozen < 200
    assert mine[-1].cancelled


def test_on_a_phone_a_new_story_is_read_from_its_first_line(opened: Callable[..., Tab], slow: ScriptedBackend) -> None:
    slow.pace = 0.0
    tab = opened(viewport={"width": 390, "height": 700})
    tab.page.fill("#prompt textarea", "One day")
    for button in ("write", "again"):
        tab.page.click(f"#{button}")
        tab.reaches("ended")
        assert tab.page.evaluate("document.documentElement.scrollHeight > 2 * innerHeight")
        top = tab.page.evaluate("document.querySelector('#book article p').getBoundingClientRect().top")
        assert 0 <= top < 500
        tab.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")


def test_axe_finds_nothing_on_the_page_empty_refused_or_with_a_story_on_either_paper(
    opened: Callable[..., Tab], slow: ScriptedBackend
) -> None:
    slow.pace = 0.0
    tab = opened(color_scheme="light")

    def finds_nothing() -> None:
        for _ in ("light", "dark"):
            assert violations(tab.page) == []
            tab.page.click("#paper")

    finds_nothing()
    tab.page.click("#wishes > button")
    tab.more()
    tab.page.fill("#seed input", "-1")
    tab.page.click("#write")
    expect(tab.page.locator(".problem")).to_have_count(1, timeout=TIMEOUT)
    finds_nothing()
    tab.page.fill("#seed input", "1")
    tab.page.click("#write")
    tab.reaches("ended")
    finds_nothing()


HIDDEN = """() => {
  const held = document.activeElement;
  const bar = document.getElementById('actions');
  if (bar.contains(held) || held === document.body) return null;
  const [a, b] = [held, bar].map((node) => node.getBoundingClientRect());
  const below = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  const seen = a.bottom > 0 && a.top < innerHeight;
  return (below > 0 || !seen) ? `${held.id || held.closest('[id]')?.id}: ${a.top} to ${a.bottom}, bar ${b.top}` : null;
}"""
"""The element with the focus, where the action bar or the window's edge hides it."""


@pytest.mark.parametrize(
    ("width", "height"), [(1280, 700), (390, 600), (320, 256)], ids=["wide", "phone", "zoomed to 400 %"]
)
def test_the_focus_is_never_below_the_action_bar(
    opened: Callable[..., Tab], slow: ScriptedBackend, width: int, height: int
) -> None:
    slow.pace = 0.0
    tab = opened(viewport={"width": width, "height": height}, reduced_motion="reduce")
    tab.page.click("#write")
    tab.reaches("ended")
    tab.more()
    assert tab.overflow() <= 0
    tab.page.evaluate("scrollTo(0, 0); document.querySelector('#paper').focus()")
    for key in ("Tab", "Shift+Tab"):
        for _ in range(26):
            tab.page.keyboard.press(key)
            assert tab.page.evaluate(HIDDEN) is None


def test_sliders_are_visible_in_forced_colors(opened: Callable[..., Tab]) -> None:
    tab = opened(forced_colors="active")
    slider = tab.page.locator("#length input[type=range]")
    assert slider.evaluate("node => getComputedStyle(node).appearance") == "auto"
    assert slider.evaluate("node => getComputedStyle(node).backgroundImage") == "none"


def test_a_server_that_takes_long_to_begin_is_waited_for(opened: Callable[..., Tab], slow: ScriptedBackend) -> None:
    slow.story, slow.pace = " he saw a frog.", 0.0
    tab = opened()
    held: list[Route] = []
    tab.page.route("**/queue/join*", lambda route: held.append(route), times=1)
    tab.page.fill("#prompt textarea", "One day")
    with tab.page.expect_request("**/queue/join*"):
        tab.page.click("#write")
    began = tab.page.evaluate("performance.now()")
    tab.page.wait_for_function(f"performance.now() > {began + 7_000}")
    assert tab.phase() == "waiting"
    held[0].continue_()
    tab.reaches("ended")
    assert tab.story() == "One day he saw a frog."
