"""The layout of the page Experiments, which shows what MLflow holds and changes nothing.

Its events bypass Gradio's queue, which is for stories; the store's client bounds them by one query at a time and a
cache. Scripts draw stories and verdicts from plain values, under a constant template (see `demo.page`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gradio as gr

from demo import experiments_handlers as handlers
from demo import theme
from demo.experiments_handlers import Drawn, Page, Store
from experiments.dashboard.client import StoreClient

if TYPE_CHECKING:
    from model.settings import Settings

PATH = "experiments"
TITLE = "Experiments · Write me a story"

_NOTE = """<p class="note" role="status" aria-live="polite"></p>"""
_LEARN = """
<div class="learn">
  <p class="none"></p>
  <div class="controls">
    <button type="button" class="play" aria-label="Play"></button>
    <input type="range" min="0" max="0" step="1" value="0" aria-label="How far the training had come">
    <p class="moment" aria-live="polite"></p>
  </div>
  <article></article>
</div>
"""
_VERSIONS = """<div class="versions"></div>"""


Parts = dict[str, Any]
"""What events come from or change, by name, in the order of the values in `_opened`."""
_CURVES = ("chosen", "measure", "drawn_note", "by_tokens", "by_minutes")


def open_reader(settings: Settings) -> StoreClient | None:
    """Who reads for the page, if the settings want it."""
    wanted = settings.story_experiments
    if wanted == "false" or (wanted == "auto" and settings.stage == "PROD"):
        return None
    return StoreClient(settings.mlflow_tracking_uri)


def add_experiments(page: gr.Blocks, store: Store) -> None:
    """Add the page to `page`, at `/experiments`."""
    with page.route("Experiments", f"/{PATH}", show_in_navbar=False):
        _wire(page, _lay_out(), store)


def _lay_out() -> Parts:
    parts: Parts = {"note": _drawn_by("note", _NOTE, "Reading the store …")}
    with gr.Column(visible=False, elem_id="findings") as parts["body"]:
        sorting = "Press a row to see its curve below, and ⋮ beside a heading to sort or filter by it."
        _heading("Runs", sorting, "runs-head")
        kinds = ["str" if digits is None else "number" for digits in handlers.RUN_COLUMNS.values()]
        headers = list(handlers.RUN_COLUMNS)
        parts["runs"] = _frame("Training runs", "runs", "filter", headers=headers, datatype=kinds)
        by_what = "Runs laid over each other: by what they read, and by the clock."
        _heading("How they learned", by_what, "curves-head")
        with gr.Row(elem_id="choice"):
            parts["chosen"] = gr.Dropdown(
                [], multiselect=True, max_choices=handlers.MOST_CHOSEN, label="Runs in the picture", elem_id="chosen"
            )
            measures = [(label, name) for name, label in handlers.MEASURES.items()]
            parts["measure"] = gr.Radio(measures, value="held-out", label="Measure", elem_id="measure")
        parts["drawn_note"] = _drawn_by("drawn-note", _NOTE, "")
        with gr.Row(elem_id="plots"):
            parts["by_tokens"] = _line("tokens", "Tokens read", "by-tokens")
            parts["by_minutes"] = _line("minutes", "Minutes of training", "by-minutes")
        same = "The same prompts and the same seed, at each evaluation."
        _heading("Watch it learn to write", same, "learn-head")
        parts["sample_run"] = gr.Dropdown([], label="Run", elem_id="sample-run")
        empty: dict[str, Any] = {"run": "", "name": "", "moments": [], "at": None, "note": ""}
        parts["learn"] = _drawn_by("learn", _LEARN, empty, theme.asset("learn.js"))
        _heading("How fast", "Benchmarks of models and servers, newest first.", "fast-head")
        parts["benchmarks"] = _frame("Benchmarks", "benchmarks", "search")
        none_yet = "No benchmark has been logged yet; `story benchmark` makes one."
        parts["no_benchmarks"] = _drawn_by("no-benchmarks", _NOTE, none_yet)
        _heading("Versions and verdicts", "What the gate said of each, check by check.", "versions-head")
        nothing: dict[str, Any] = {"note": "", "versions": []}
        parts["versions"] = _drawn_by("versions", _VERSIONS, nothing, theme.asset("versions.js"))
    return parts


def _wire(page: gr.Blocks, parts: Parts, store: Store) -> None:
    """Connect events to handlers. Each function here only hands over what Gradio gives it."""

    async def on_open(request: gr.Request) -> list[Any]:
        return _opened(await handlers.opened(store, dict(request.query_params)))

    async def on_choice(chosen: list[str] | None, measure: str) -> list[Any]:
        return _undrawn(await handlers.draw(store, chosen or [], measure))

    async def on_row(chosen: list[str] | None, measure: str, event: gr.SelectData) -> list[Any]:
        return _undrawn(await handlers.pick(store, chosen or [], event.row_value or [], measure))

    async def on_plots(chosen: list[str] | None, measure: str) -> list[Any]:
        return _drawn(await handlers.draw(store, chosen or [], measure))[-2:]

    async def on_sample_run(run: str | None) -> dict[str, Any]:
        return await handlers.samples(store, run or "")

    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    note_choice = "(runs, measure) => { window.experiments.address({ runs: runs.join(','), measure }); }"
    curves = [parts[name] for name in _CURVES]
    picture, plots = curves[:2], curves[-2:]
    page.load(on_open, None, list(parts.values()), **quick)
    page.load(None, None, None, js=f"() => {{ document.title = {json.dumps(TITLE)}; }}")  # Gradio has set the other's
    # Gradio 6.31 draws a plot that stands there one change late, so it is taken away and comes back with its curves.
    changes = [field.input(on_choice, picture, curves, **quick) for field in picture]
    changes.append(parts["runs"].select(on_row, picture, curves, **quick))
    for change in changes:
        change.then(on_plots, picture, plots, **quick).then(None, picture, None, js=note_choice)
    parts["sample_run"].input(on_sample_run, parts["sample_run"], parts["learn"], **quick)


def _opened(page: Page) -> list[Any]:
    """A page as values for all `Parts`."""
    if not page.filled:
        return [page.note, gr.update(visible=False), *[gr.skip()] * (len(_CURVES) + 6)]
    return [
        page.note,
        gr.update(visible=True),
        page.runs,
        gr.update(choices=list(page.choices), value=list(page.drawn.chosen)),
        *_drawn(page.drawn)[1:],
        gr.update(choices=list(page.sampled), value=page.samples and page.samples["run"], visible=bool(page.sampled)),
        page.samples,
        gr.update(value=page.benchmarks, visible=page.benchmarks is not None),
        gr.update(visible=page.benchmarks is None),
        page.versions,
    ]


def _drawn(drawn: Drawn) -> list[Any]:
    """Curves as values for the parts in `_CURVES`."""
    visible, title = bool(drawn.chosen) and not drawn.note, handlers.MEASURES[drawn.measure]
    plots = [
        gr.update(value=value, color_map=drawn.colors, y_title=title, visible=visible)
        for value in (drawn.by_tokens, drawn.by_minutes)
    ]
    return [list(drawn.chosen), drawn.measure, drawn.note, *plots]


def _undrawn(drawn: Drawn) -> list[Any]:
    """As `_drawn`, with the plots out of the way."""
    return [*_drawn(drawn)[:3], gr.update(visible=False), gr.update(visible=False)]


def _frame(label: str, elem_id: str, search: Any, **columns: Any) -> gr.Dataframe:
    return gr.Dataframe(
        interactive=False,
        show_search=search,
        show_label=False,
        label=label,
        max_height=420,
        buttons=[],
        elem_id=elem_id,
        **columns,
    )


def _line(x: str, title: str, elem_id: str) -> gr.LinePlot:
    return gr.LinePlot(
        x=x,
        y="value",
        color="run",
        x_title=title,
        color_title=" ",
        height=320,
        tooltip="all",
        label=title,
        show_label=False,
        elem_id=elem_id,
    )


def _heading(title: str, line: str, elem_id: str) -> None:
    """A section's heading: fixed words of our own."""
    _plain(f"<h2>{title}</h2><p>{line}</p>", elem_id, classes="section")


def _drawn_by(elem_id: str, template: str, value: Any, script: str | None = None) -> gr.HTML:
    """Constant markup that a script fills; without one, the value is put as text into the paragraph."""
    say = "const announce = () => window.experiments.say(element.querySelector('p'), props.value);"
    return gr.HTML(
        value,
        html_template=template,
        js_on_load=script or f"{say} announce(); watch('value', announce);",
        apply_default_css=False,
        elem_id=elem_id,
    )


def _plain(html: str, elem_id: str, script: str | None = None, classes: str | None = None) -> None:
    gr.HTML(html, elem_id=elem_id, elem_classes=classes, apply_default_css=False, js_on_load=script)
