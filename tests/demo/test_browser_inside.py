"""The page Inside in a real browser, over the shipped model: a story is read, cut, weighed and looked into."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from demo.inside_page import PATH
from model.generation import SamplingParams
from model.runtimes.sampling import SamplingRows, start_of, uniform
from model.serving.backend import LocalBackend
from model.settings import Settings
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, opening, violations

pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(LocalBackend.load(Settings(story_slots=8))) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own, and holds it to silence and privacy."""
    with opening(browser) as make:

        def on_page(**options: object) -> Page:
            tab = make(url=served.url, path=PATH, **options)
            expect(tab.page.locator("#inside .cut")).to_be_visible(timeout=TIMEOUT)
            expect(tab.page.locator("#inside .memory")).to_be_visible(timeout=TIMEOUT)
            return tab.page

        yield on_page


def own(page: Page, text: str) -> None:
    page.click("#inside summary")
    page.fill("#inside textarea", text)
    page.click("#inside .read")
    expect(page.locator("#inside .note")).to_contain_text("The story", timeout=TIMEOUT)


def move(page: Page, selector: str, value: float) -> None:
    page.locator(selector).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
        str(value),
    )


def test_a_story_is_looked_into_from_end_to_end_with_the_keyboard(opened: Callable[..., Page]) -> None:
    page = opened(viewport={"width": 1280, "height": 900})
    expect(page.locator("#inside .note")).to_contain_text("An example, written just now")
    own(page, "Tom had a red kite. Tim had a blue ball. He ran with his red kite.")
    article = page.locator("#inside article")
    assert " ".join(article.inner_text().split()) == (
        "Tom had a red kite. Tim had a blue ball. He ran with his red kite."
    )
    article.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#inside section.word h2")).to_have_text("“kite”")
    expect(page.locator("#inside section.word p")).to_contain_text("bits of surprise")

    bars = page.locator("#inside .cut .bars li")
    expect(bars).to_have_count(21, timeout=TIMEOUT)
    expect(bars.first).to_contain_text("kite", timeout=TIMEOUT)
    kept = page.locator("#inside .cut .kept")
    move(page, "#inside [name=topP]", 1)
    expect(kept).to_contain_text("4,096 of 4,096 tokens are left")
    page.locator("#inside [name=minP]").focus()
    page.keyboard.press("End")
    expect(kept).to_contain_text("1 of 4,096 tokens are left")
    expect(bars.nth(1)).to_contain_text("cut")

    slider = page.locator("#inside .memory input")
    costs = page.locator("#inside .costs li .share")
    whole = float((costs.last.text_content() or "").removesuffix(" bits"))
    slider.focus()
    page.keyboard.press("Home")
    expect(page.locator("#inside .memory output")).to_contain_text("the last 1 token: “kite” costs")
    assert float((costs.first.text_content() or "").removesuffix(" bits")) > whole
    assert "the last 1 token" in (slider.get_attribute("aria-valuetext") or "")

    page.get_by_role("button", name="Which words spoke for it?").click()
    expect(page.locator("#inside .evidence .found")).to_contain_text("times as likely as", timeout=TIMEOUT)
    expect(page.locator("#inside article .for").first).to_be_visible()
    expect(page.locator("#inside .legend")).to_contain_text("against it (dashed)")
    select = page.get_by_label("Instead of it")
    select.select_option(index=1)
    chosen = select.evaluate("each => each.selectedOptions[0].textContent")
    expect(page.locator("#inside .evidence .found")).to_contain_text(f"“{chosen}”", timeout=TIMEOUT)

    page.get_by_role("button", name="Look into the layers").click()
    heads = page.locator("#inside .heads button")
    expect(heads).to_have_count(24, timeout=120_000)
    expect(heads.first).to_contain_text("half-life")
    heads.last.click()
    expect(heads.last).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#inside .legend")).to_contain_text("of its attention: layer 6, head 4")

    page.get_by_role("button", name="Surprise").click()
    expect(page.locator("#inside .legend")).to_contain_text("bits of surprise or more")
    page.get_by_role("button", name="The model's card").click()
    expect(page.locator("#card")).to_contain_text("A small story model", timeout=TIMEOUT)


def test_the_story_of_the_page_write_is_there_with_the_word_that_was_chosen(served: Served, browser: Browser) -> None:
    with opening(browser) as make:
        tab = make(url=served.url, query="?prompt=Tom+had+a+dog.&max_tokens=30&seed=5")
        tab.page.click("#write")
        tab.reaches("ended", "open")
        story = tab.story()
        tab.follow("Inside", "Inside · Write me a story")
        expect(tab.page.locator("#inside .note")).to_contain_text("The story", timeout=TIMEOUT)
        assert "".join((tab.page.locator("#inside article").inner_text()).split()) == "".join(story.split())
        kept = "JSON.parse(sessionStorage.getItem(sessionStorage.getItem('last story')))"
        number, word = tab.page.evaluate(
            f"(() => {{ const place = sessionStorage.getItem('last story'); const kept = {kept};"
            " kept.view.chosen = 3; sessionStorage.setItem(place, JSON.stringify(kept));"
            " return [3, kept.view.words[3][0].trim()]; })()"
        )
        tab.page.reload()
        expect(tab.page.locator("#inside section.word h2")).to_have_text(f"“{word}”", timeout=TIMEOUT)
        assert number == 3


def some_settings(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "temperature": float(rng.choice([0, 0.3, 0.7, 0.85, 1, 1.5, 2])),
        "top_p": float(rng.choice([1, 0.95, 0.5, 0.01])),
        "min_p": float(rng.choice([0, 0, 0.02, 0.3, 1])),
    }


def test_the_browser_cuts_a_distribution_as_the_sampler_does(opened: Callable[..., Page]) -> None:
    """Of 100 distributions with settings of every kind, 16 draws each: those of the sampler, token by token.

    Its random number says at which place of the cut distribution a draw lies; at a border within rounding, either
    neighbour may come.
    """
    page, rng = opened(), np.random.default_rng(0)
    cases: list[tuple[np.ndarray, dict[str, Any]]] = []
    for _ in range(100):
        logits = np.sort(rng.standard_normal(600) * rng.choice([0.5, 2, 5]))[::-1].astype(np.float32)
        cases.append((logits, some_settings(rng)))
    asked = [
        [
            (logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())).tolist(),
            {"temperature": each["temperature"], "topP": each["top_p"], "minP": each["min_p"]},
        ]
        for logits, each in cases
    ]
    found = page.evaluate("cases => cases.map(([logprobs, settings]) => window.inside.cut(logprobs, settings))", asked)
    checked = 0
    for seed, ((logits, each), shares) in enumerate(zip(cases, found, strict=True)):
        assert math.isclose(sum(shares), 1, abs_tol=1e-9)
        rows, places = SamplingRows(16, 600), np.arange(16)
        for row in range(16):
            rows.set(row, SamplingParams(seed=seed, keep_names=False, **each))
        drawn = rows.sample(np.repeat(logits[None], 16, axis=0), places)[0]
        points = uniform(np.full(16, start_of(seed)), places)
        edges = np.cumsum(shares)
        for token, point in zip(drawn.tolist(), points.tolist(), strict=True):
            near = {int(np.searchsorted(edges, point + slip, side="right")) for slip in (-1e-5, 0, 1e-5)}
            if each["temperature"] == 0:
                near = {0}
            assert token in near, json.dumps({"settings": each, "token": token, "near": sorted(near)})
            checked += len(near) == 1
    assert checked > 1_500


def test_axe_finds_nothing(opened: Callable[..., Page]) -> None:
    page = opened(color_scheme="light")
    page.get_by_role("button", name="Which words spoke for it?").click()
    expect(page.locator("#inside .evidence .found")).to_contain_text("times as likely as", timeout=TIMEOUT)
    page.click("#inside summary")
    page.get_by_role("button", name="The model's card").click()
    expect(page.locator("#card")).to_contain_text("A small story model", timeout=TIMEOUT)
    assert violations(page) == []
    page.click("#paper")
    assert page.evaluate("document.body.classList.contains('dark')")
    assert violations(page) == []


def test_nothing_sticks_out(opened: Callable[..., Page]) -> None:
    page = opened(viewport={"width": 320, "height": 800}, color_scheme="dark")
    parts = "[...document.querySelectorAll('main > *, .inside > *, .inside section, .inside section > *')]"
    widest = f"Math.max(...{parts}.map(part => part.getBoundingClientRect().right))"
    for width in (320, 820):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate(widest) <= width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
