"""The Experiments page in a real browser, over a real store that a real process of its own reads."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from demo.experiments_page import PATH
from experiments.dashboard.client import StoreClient
from experiments.dashboard.records import RunRow
from experiments.dashboard.rows import KEYS, run_rows
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import Served, serve
from tests.demo.tabs import IN_A_BROWSER, TIMEOUT, opening, violations
from tests.experiments.dashboard.made import made
from tests.training.tracked import end, evaluation, observer_on, start, step
from training.tracking.store import open_store

pytestmark = IN_A_BROWSER
FIRST_TIMEOUT = 120_000
"""Milliseconds in which MLflow may be loaded, on a machine that does other things as well."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    client = StoreClient(made().uri, ttl=600, first_timeout=FIRST_TIMEOUT / 1000, timeout=60)
    with serve(ScriptedBackend("A story."), experiments=client) as running:
        yield running


@pytest.fixture
def opened(served: Served, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own, and holds it to silence and privacy."""
    with opening(browser) as make:

        def on_page(*, url: str = served.url, **options: object) -> Page:
            tab = make(url=url, path=PATH, **options)
            expect(tab.page.locator("#note .note")).not_to_contain_text("Reading", timeout=FIRST_TIMEOUT)
            return tab.page

        yield on_page


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

    held: list[Route] = []
    page.route("**/run/predict*", lambda route: held.append(route), times=1)
    with page.expect_request("**/run/predict*"):
        page.get_by_role("checkbox", name="Learning rate").check()
    page.get_by_role("checkbox", name="Bits per byte on").uncheck()  # before the first is answered
    held[0].continue_()
    expect(page.locator("#curves figcaption")).to_have_text([LOSS, "Learning rate"], timeout=TIMEOUT)
    chosen = parse_qs(urlsplit(page.url).query)
    assert chosen["measure"] == ["training,rate"]
    again = opened(query="?" + urlsplit(page.url).query)
    expect(again.locator("#curves .legend .name")).to_have_text(["stopped"], timeout=TIMEOUT)
    expect(again.locator("#curves figcaption")).to_have_text([LOSS, "Learning rate"], timeout=TIMEOUT)
    expect(again.get_by_role("checkbox", name=LOSS)).to_be_checked(timeout=TIMEOUT)


LOSS = "Loss in training, nats a token"
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
    lines = page.locator("#curves figure").first.locator("polyline:not(.faint)")
    drawn = lines.evaluate_all("all => all.map(one => getComputedStyle(one).stroke)")
    assert drawn == [dark["learned"][0], dark["stopped"][0]]


def test_a_curve_is_read_by_pointer_and_by_keys(opened: Callable[..., Page]) -> None:
    page = opened(query="?measure=held-out")
    figure = page.locator("#curves figure").first
    expect(figure.locator("polyline:not(.faint)")).to_have_count(2, timeout=TIMEOUT)
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


def test_one_crosshair_lies_over_all_plots_and_a_drag_zooms_all_of_them(opened: Callable[..., Page]) -> None:
    page = opened(viewport={"width": 1280, "height": 900})
    figures = page.locator("#curves figure")
    expect(figures).to_have_count(2, timeout=TIMEOUT)
    expect(figures.first.locator("polyline:not(.faint)")).to_have_count(2, timeout=TIMEOUT)
    plot = figures.first.locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    tips = [text.split(" tokens")[0] for text in figures.locator(".tip b").all_inner_texts()]
    assert len(tips) == 2
    assert len(set(tips)) == 1, "the same place in both"
    whole = figures.locator("polyline:not(.faint)").evaluate_all("all => all.map(one => one.points.numberOfItems)")
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, middle, steps=4)
    page.mouse.up()
    expect(page.get_by_role("button", name="Whole range")).to_be_enabled(timeout=TIMEOUT)
    part = figures.locator("polyline:not(.faint)").evaluate_all("all => all.map(one => one.points.numberOfItems)")
    assert all(fewer <= count for fewer, count in zip(part, whole, strict=True))
    assert sum(part) < sum(whole)
    page.get_by_role("button", name="Whole range").click()
    again = figures.locator("polyline:not(.faint)").evaluate_all("all => all.map(one => one.points.numberOfItems)")
    assert again == whole


def test_curves_are_smoothed_and_drawn_over_other_axes(opened: Callable[..., Page]) -> None:
    page = opened(query="?measure=training")
    full, faint = (page.locator(f"#curves polyline{kind}").first for kind in (":not(.faint)", ".faint"))
    expect(full).to_be_attached(timeout=TIMEOUT)
    raw = full.get_attribute("points")
    assert faint.get_attribute("points") == ""
    page.get_by_label("Smoothing").fill("0.9")
    assert faint.get_attribute("points") == raw
    assert full.get_attribute("points") != raw
    page.get_by_label("Smoothing").fill("0")
    page.locator("#curves .over").select_option("minutes")
    assert full.get_attribute("points") != raw
    page.locator("#curves .over").select_option("tokens")
    assert full.get_attribute("points") == raw
    page.get_by_label("logarithmic up").check()
    assert full.get_attribute("points") != raw


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_shown_curves_are_saved_as_the_stores_numbers_and_as_a_picture(
    opened: Callable[..., Page], scheme: str
) -> None:
    page = opened(query="?measure=training,held-out", color_scheme=scheme, viewport={"width": 900, "height": 900})
    lines = page.locator("#curves polyline:not(.faint)")
    expect(lines).to_have_count(4, timeout=TIMEOUT)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save as .csv").click()
    named = re.fullmatch(r"curves-(?:learned-stopped|stopped-learned)\.csv", saved.value.suggested_filename)
    assert named, saved.value.suggested_filename
    rows = list(csv.DictReader(saved.value.path().read_text("utf-8").splitlines()))
    store = open_store(made().uri, read_only=True)
    runs, _ = run_rows(store)
    assert {row["name"] for row in rows} == {run.name for run in runs} == {"learned", "stopped"}
    for run in runs:
        for measure in ("training", "held-out"):
            logged = store.get_metric_history(run.id, KEYS[measure])
            ours = {int(row["step"]): row for row in rows if (row["run"], row["measure"]) == (run.id[:8], measure)}
            assert {step: float(row["value"]) for step, row in ours.items()} == {
                each.step: pytest.approx(each.value, rel=1e-5) for each in logged
            }
    for row in rows[:20]:
        seen = {each.step: each.value for each in store.get_metric_history(of(runs, row["run"]), "tokens")}
        assert int(row["tokens"]) == seen[int(row["step"])]

    with page.expect_download() as pictured:
        page.get_by_role("button", name="Save as .png").click()
    assert pictured.value.suggested_filename == saved.value.suggested_filename.replace(".csv", ".png")
    with Image.open(pictured.value.path()) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24) or []}
        corner = image.convert("RGB").getpixel((0, 0))
        plots = page.locator("#curves .plot").evaluate_all("all => all.map(one => one.clientWidth)")
        assert image.width == 2 * (max(plots) + 48)
        assert image.height > 2 * 2 * 260
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert rgb(background) == corner
    strokes = lines.evaluate_all("all => all.map(one => getComputedStyle(one).stroke)")
    assert len(set(strokes)) == 2
    assert {rgb(stroke) for stroke in strokes} <= colors, "each run's line is in the picture, in its color"


def of(runs: list[RunRow], short: str) -> str:
    """The whole id of a run."""
    return next(run.id for run in runs if run.id.startswith(short))


def rgb(color: str) -> tuple[int, ...]:
    """The parts of a color as a browser computes it: `rgb(1, 2, 3)`."""
    return tuple(int(part) for part in re.findall(r"\d+", color))


def test_a_running_training_is_followed_and_lines_stay_the_same_nodes(browser: Browser, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    observer = observer_on(uri)
    (tmp_path / "alive").mkdir()
    observer.started(start(tmp_path / "alive"))

    def report(first: int, last: int) -> None:
        for number in range(first, last):
            observer.stepped(step(number, loss=4 - number / 10))
        observer.evaluated(evaluation(last, 2.0 - last / 20))

    report(1, 6)
    client = StoreClient(uri, ttl=0.5, first_timeout=FIRST_TIMEOUT / 1000, timeout=60)
    with serve(ScriptedBackend("A story."), experiments=client) as served, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{served.url}{PATH}?measure=training")
        line = page.locator("#curves figure[data-measure=training] polyline:not(.faint)")
        expect(line).to_have_count(1, timeout=FIRST_TIMEOUT)
        expect(page.locator("#curves .legend .running")).to_have_text("running", timeout=TIMEOUT)
        line.evaluate("line => { window.line = line; }")
        report(6, 12)
        page.wait_for_function("window.line.points.numberOfItems === 11", timeout=FIRST_TIMEOUT)
        assert page.evaluate("window.line.isConnected"), "the line was made anew"
        expect(page.locator("#learn .moment")).to_contain_text("step 12 ", timeout=FIRST_TIMEOUT)
        observer.ended(end())
        expect(page.locator("#curves .legend .running")).to_have_count(0, timeout=FIRST_TIMEOUT)


def test_the_trials_of_a_sweep_are_one_row_that_is_pressed_open_and_shut(browser: Browser, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number, bits in enumerate((1.3, 1.1, 1.2)):
        folder = tmp_path / f"trial-{number}"
        folder.mkdir()
        observer = observer_on(uri, tags={"sweep": "rates", "sweep.trial": str(number)})
        observer.started(start(folder))
        observer.stepped(step(1))
        observer.evaluated(evaluation(1, bits))
        observer.ended(end())
    client = StoreClient(uri, ttl=600, first_timeout=FIRST_TIMEOUT / 1000, timeout=60)
    with serve(ScriptedBackend("A story."), experiments=client) as served, opening(browser) as make:
        page = make(url=served.url, path=PATH, viewport={"width": 1280, "height": 900}).page
        rows = page.locator("#runs .virtual-row")
        expect(rows).to_have_count(1, timeout=FIRST_TIMEOUT)
        assert column(page, 0) == ["▸ rates"]
        assert (column(page, 1), column(page, 3)) == (["3 trials"], ["1.1000"])
        assert points(page) == {"trial-1"}, "the best one is in the picture"
        rows.first.locator("[role=gridcell]").first.click()
        expect(rows).to_have_count(4, timeout=TIMEOUT)
        assert column(page, 0) == ["▾ rates", "trial-1", "trial-2", "trial-0"]
        rows.nth(3).locator("[role=gridcell]").nth(1).click()
        expect(page.locator("#curves .legend .name")).to_have_text(["trial-1", "trial-0"], timeout=TIMEOUT)
        expect(rows).to_have_count(4)
        rows.first.locator("[role=gridcell]").nth(1).click()
        expect(rows).to_have_count(1, timeout=TIMEOUT)


def test_memory_stays_flat_while_the_measure_is_changed(opened: Callable[..., Page]) -> None:
    page = opened()
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")

    def change(times: int) -> dict[str, float]:
        for _ in range(times):
            for checked, count in ((True, 3), (False, 2)):
                page.get_by_role("checkbox", name="Learning rate").set_checked(checked)
                expect(page.locator("#curves figure")).to_have_count(count, timeout=TIMEOUT)
        devtools.send("HeapProfiler.collectGarbage")
        figures = devtools.send("Performance.getMetrics")["metrics"]
        return {each["name"]: each["value"] for each in figures}

    expect(page.locator("#curves figure").first.locator("polyline:not(.faint)")).to_have_count(2, timeout=TIMEOUT)
    before, after = change(3), change(15)
    print({name: (before[name], after[name]) for name in ("Nodes", "JSEventListeners", "JSHeapUsedSize")})
    assert after["JSEventListeners"] <= before["JSEventListeners"] + 2
    assert after["Nodes"] <= before["Nodes"] + 50
    assert after["JSHeapUsedSize"] < before["JSHeapUsedSize"] + 1e6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Callable[..., Page], scheme: str) -> None:
    page = opened(color_scheme=scheme)
    expect(page.locator("#curves figure").first.locator("polyline:not(.faint)")).to_have_count(2, timeout=TIMEOUT)
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


def test_a_beginning_of_the_user_s_is_continued_by_each_age_of_the_run(opened: Callable[..., Page]) -> None:
    page = opened()
    grown, button = page.locator("#grow .grown"), page.get_by_role("button", name="Grow up")
    expect(page.locator("#grow .none")).to_contain_text("This run has kept no ages", timeout=TIMEOUT)
    expect(button).to_be_hidden()  # the run with the best figure is `stopped`
    page.click("#sample-run input")
    page.get_by_role("option").filter(has_text="learned").click()
    expect(button).to_be_visible(timeout=TIMEOUT)
    page.get_by_label("Your own beginning").fill("The fox had a red hat")
    button.focus()
    page.keyboard.press("Enter")
    first = grown.locator("li").first
    expect(first).to_contain_text("before training", timeout=FIRST_TIMEOUT)
    first.evaluate("node => { window.first = node.querySelector('.generated').firstChild; }")
    expect(page.locator("#grow .spoken")).to_have_text("All 7 ages have written.", timeout=FIRST_TIMEOUT)
    assert page.evaluate("window.first.isConnected"), "the first one was drawn anew"
    moments = grown.locator(".moment").all_inner_texts()
    looks = {look.step: look for look in made().trained.evaluations}
    assert [moment.split(" · ")[0] for moment in moments] == [
        "before training",
        *(f"step {number}" for number in (1, 2, 3, 4, 8, 12)),
    ]
    assert moments[1].endswith("bits per byte in training")
    assert moments[-1] == f"step 12 · {looks[12].tokens:,} tokens read · {looks[12].bits_per_byte:.3f} bits per byte"
    assert set(grown.locator(".prompt").all_inner_texts()) == {"The fox had a red hat"}
    assert len(set(grown.locator(".generated").all_inner_texts())) == 7
    assert button.evaluate("button => button === document.activeElement"), "the focus stays"
    assert violations(page) == []

    page.get_by_label("Your own beginning").fill("Tom")
    button.click()
    expect(grown.locator("section").first.locator("li")).to_have_count(7, timeout=FIRST_TIMEOUT)
    assert grown.locator("section").count() == 2
    assert page.evaluate("window.first.isConnected"), "what stood there stays"
    page.get_by_label("Your own beginning").fill(" ")
    button.click()
    expect(page.locator("#grow .status")).to_have_text("Type how the story begins.")


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
    expect(page.locator("#curves polyline:not(.faint)").first).to_be_visible(timeout=TIMEOUT)
    parts = "[...document.querySelectorAll('main > *, #findings > *')]"
    widest = f"Math.max(...{parts}.map(part => part.getBoundingClientRect().right))"
    assert page.evaluate(widest) <= width
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")


def test_a_user_goes_there_and_back(served: Served, browser: Browser) -> None:
    with opening(browser) as make:
        tab = make(url=served.url)
        tab.follow("How it was made", "Experiments · Write me a story")
        expect(tab.page.get_by_role("heading", name="Experiments")).to_be_visible(timeout=TIMEOUT)
        tab.follow("Write", "Write me a story")
        expect(tab.page.locator("#prompt textarea")).to_be_visible(timeout=TIMEOUT)


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
