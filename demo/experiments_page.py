"""The layout of the page Experiments, which shows what MLflow holds; only a signed-in operator changes it.

Its events bypass Gradio's queue, which is for stories; the store's client bounds them by one query at a time and a
cache. Only the ages of a run, which write stories, are queued. Scripts draw stories and verdicts from plain values,
under a constant template (see `demo.page`).
"""

import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr
from gradio.events import api

from demo import experiments_handlers as handlers
from demo import growth_handlers, theme
from demo.experiments_handlers import Page, Values
from demo.operator import Operator
from experiments.dashboard.client import StoreClient
from experiments.dashboard.recorded import read_record
from model.errors import InputError
from model.serving.http.health import is_local
from model.serving.session import GenerationManager
from model.settings import Settings

PATH = "experiments"
TITLE = "Experiments · Write me a story"

_NOTE = """<p class="note" role="status" aria-live="polite"></p>"""
_CURVES = """
<div class="curves">
  <p class="note" role="status" aria-live="polite"></p>
  <ul class="legend"></ul>
  <div class="tools" role="group" aria-label="How the curves are drawn">
    <label>Over <select class="over"><option value="tokens">tokens</option><option value="steps">steps</option>
    <option value="minutes">minutes</option></select></label>
    <label>Smoothing <input type="range" class="smooth" min="0" max="0.98" step="0.02" value="0">
    <output class="smoothing">0.00</output></label>
    <label><input type="checkbox" class="log-x"> logarithmic across</label>
    <label><input type="checkbox" class="log-y"> logarithmic up</label>
    <button type="button" class="whole" disabled>Whole range</button>
    <button type="button" class="csv">Save as .csv</button>
    <button type="button" class="png" aria-label="Save as .png">.png</button>
  </div>
  <div class="plots"></div>
  <p class="keys">Drag across a plot to see a part of it. Keys: ← and → read, + and - zoom, 0 shows the whole range.</p>
  <details class="differences"><summary>What differs between these runs</summary>
    <div class="scroll"><table><thead></thead><tbody></tbody></table></div></details>
</div>
"""
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
_GROW = """
<div class="grow">
  <p class="none"></p>
  <div class="form">
    <label for="own-beginning">Your own beginning</label>
    <textarea id="own-beginning" rows="2" maxlength="6000" dir="auto">Once upon a time, there was a dog</textarea>
    <button type="button">Grow up</button>
    <p class="status" aria-hidden="true"></p>
    <p class="spoken" role="status" aria-live="polite"></p>
  </div>
  <div class="grown"></div>
</div>
"""
_VERSIONS = """<div class="versions"></div>"""
_OPERATOR = """
<div class="operator">
  <form class="sign-in">
    <label>Operator's token <input type="password" autocomplete="current-password" minlength="16" required></label>
    <button>Sign in</button>
  </form>
  <p class="signed-in" hidden>
    <button type="button" class="rollback">Roll back …</button>
    <button type="button" class="switch" hidden>Switch deployment …</button>
    <button type="button" class="sign-out">Sign out</button>
  </p>
  <p class="said" role="status" tabindex="-1"></p>
  <dialog aria-labelledby="operator-asks">
    <h3 id="operator-asks"></h3>
    <p></p>
    <form method="dialog"><button value="yes"></button> <button value="no">Cancel</button></form>
  </dialog>
</div>
"""

log = logging.getLogger(__name__)

Parts = dict[str, Any]
"""What events come from or change, by name, in the order of the values in `_opened`."""


def open_reader(settings: Settings) -> StoreClient | None:
    """Who reads for the page, if the settings want it; with the record of the shipped model, where there is one."""
    wanted = settings.story_experiments
    if wanted == "false" or (wanted == "auto" and settings.stage == "PROD"):
        return None
    record = None
    try:
        record = read_record()
    except InputError as error:
        log.warning("the Experiments page goes without its record: %s", error)
    return StoreClient(settings.mlflow_tracking_uri, record=record)


def add_experiments(page: gr.Blocks, store: StoreClient, manager: GenerationManager) -> None:
    """Add the page to `page`, at `/experiments`, and its public endpoint.

    `manager` bounds what the ages write, and says whether there is an operator.
    """
    with page.route("Experiments", f"/{PATH}", show_in_navbar=False):
        _wire(page, _lay_out(store, manager), store)


def _lay_out(store: StoreClient, manager: GenerationManager) -> Parts:
    operator = Operator.of(manager, store)

    async def news(given: dict[str, Any]) -> Values:
        return await handlers.news(store, given)

    # By this annotation Gradio knows that it is to hand over the request, which is Starlette's here.
    async def operate(given: dict[str, Any], request: gr.Request) -> Values:
        assert operator is not None, "only then it is there"
        return await operator.answer(given, manager.client_of(request.scope))

    parts: Parts = {"note": _drawn_by("note", _NOTE, "Reading the store …")}
    with gr.Column(visible=False, elem_id="findings") as parts["body"]:
        sorting = "Press a run to see its curve below, a sweep to see its trials, and ⋮ to sort or filter."
        _heading("Runs", sorting, "runs-head")
        kinds = ["str" if digits is None else "number" for digits in handlers.RUN_COLUMNS.values()]
        headers = list(handlers.RUN_COLUMNS)
        parts["runs"] = _frame("Training runs", "runs", "filter", headers=headers, datatype=kinds)
        by_what = "Runs laid over each other; those that still train go on by themselves."
        _heading("How they learned", by_what, "curves-head")
        with gr.Row(elem_id="choice"):
            parts["chosen"] = gr.Dropdown(
                [], multiselect=True, max_choices=handlers.MOST_CHOSEN, label="Runs in the picture", elem_id="chosen"
            )
            measures = [(label, name) for name, label in handlers.MEASURES.items()]
            usual = list(handlers.FIRST_MEASURES)
            parts["measure"] = gr.CheckboxGroup(measures, value=usual, label="Measures", elem_id="measure")
        uncurved: Values = {name: [] for name in ("chosen", "measures", "runs", "plots", "differences")}
        uncurved |= {"state": "", "note": "", "ui": ""}
        parts["curves"] = _drawn_by("curves", _CURVES, uncurved, theme.asset("curves.js"), [news])
        _heading("Watch it learn to write", "The same prompts and seed, at each evaluation.", "learn-head")
        parts["sample_run"] = gr.Dropdown([], label="Run", elem_id="sample-run")
        empty: Values = {"run": "", "name": "", "moments": [], "at": None, "note": "", "no_ages": ""}
        parts["learn"] = _drawn_by("learn", _LEARN, empty, theme.asset("learn.js"))
        _add_growth(store, manager)
        _heading("How well", "Evaluations on stories that the models have not seen, newest first.", "well-head")
        parts["evaluations"] = _frame("Evaluations", "evaluations", "search")
        unmeasured = "No evaluation has been logged yet; `story evaluate` makes one."
        parts["no_evaluations"] = _drawn_by("no-evaluations", _NOTE, unmeasured)
        _heading("How fast", "Benchmarks of models and servers, newest first.", "fast-head")
        parts["benchmarks"] = _frame("Benchmarks", "benchmarks", "search")
        none = "No benchmark has been logged yet; `story benchmark` makes one."
        parts["no_benchmarks"] = _drawn_by("no-benchmarks", _NOTE, none)
        _heading("Versions and verdicts", "What the gate said of each, check by check.", "versions-head")
        nothing: Values = {"note": "", "versions": []}
        if operator is None:
            parts["versions"] = _drawn_by("versions", _VERSIONS, nothing, theme.asset("versions.js"))
        else:
            script = theme.asset("versions.js") + theme.asset("operator.js")
            parts["versions"] = _drawn_by("versions", _VERSIONS + _OPERATOR, nothing, script, [operate])
    return parts


def _add_growth(store: StoreClient, manager: GenerationManager) -> None:
    """Lay out how a run grew up, with its event and its public endpoint, which stream age by age."""
    grown = _drawn_by("grow", _GROW, {"press": 0}, theme.asset("grow.js"))

    def grow(request: gr.Request, *asked: Any) -> AsyncGenerator[Values, None]:
        client = manager.client_of({} if request.request is None else request.request.scope)
        return growth_handlers.grow_up(store, manager, client, *asked)

    async def on_grow(request: gr.Request, given: Values) -> AsyncGenerator[Values, None]:
        views = grow(request, given.get("prompt"), str(given.get("run", "")))
        async with contextlib.aclosing(views):
            async for view in views:
                yield view | {"press": given.get("press")}

    async def grow_up(
        request: gr.Request, prompt: str, run: str = "", seed: int = growth_handlers.SEED
    ) -> AsyncGenerator[dict[str, Any], None]:
        views = grow(request, prompt, run, seed)
        async with contextlib.aclosing(views):
            async for view in views:
                if view["note"]:
                    raise gr.Error(view["note"], print_exception=False)
                yield {name: view[name] for name in ("run", "count", "ages")}

    grow_up.__annotations__["return"] = dict  # Gradio describes by it what is yielded
    # Each has a network in memory; who comes later waits in the queue.
    at_once: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "ages"}
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "multiple"}
    grown.submit(on_grow, grown, grown, **hidden, **at_once)
    api(
        grow_up,
        api_name="grow_up",
        api_description="Let the ages of a training run (its networks at log-spaced steps) continue `prompt`, the "
        "youngest first, all with one seed. run: an id or a name; empty: the best that has ages. Yields the growing "
        "list of `ages`, each with step, tokens read, bits per byte and `text`; `count` says how many they will be.",
        **at_once,
    )


def _wire(page: gr.Blocks, parts: Parts, store: StoreClient) -> None:
    """Connect events to handlers. Each function here only hands over what Gradio gives it."""

    async def on_open(request: gr.Request) -> list[Any]:
        local = request.request is not None and is_local(request.request)
        ui = handlers.ui_address(store.uri, local=local)
        return _opened(await handlers.opened(store, dict(request.query_params)), ui)

    async def on_news(chosen: list[str] | None, measures: list[str], run: str | None, unfolded: list[str]) -> list[Any]:
        asked = {"runs": ",".join(chosen or []), "measure": ",".join(measures), "story": run or ""}
        found = await handlers.opened(store, asked, unfolded)
        values = dict(zip(parts, _opened(found), strict=True))
        kept = {"chosen": gr.update(choices=list(found.choices)), "measure": gr.skip(), "curves": gr.skip()}
        return list((values | kept).values()) if found.curves else [found.note, *[gr.skip()] * (len(parts) - 1)]

    async def on_choice(chosen: list[str] | None, measures: list[str]) -> Values:
        return await handlers.draw(store, chosen or [], measures)

    async def on_row(
        chosen: list[str] | None, measures: list[str], unfolded: list[str], event: gr.SelectData
    ) -> tuple[Any, Any, Any, list[str]]:
        row = event.row_value or []
        if (folded := await handlers.fold(store, row, unfolded)) is not None:
            return gr.skip(), gr.skip(), *folded
        drawn = await handlers.pick(store, chosen or [], row, measures)
        return drawn["chosen"], drawn, gr.skip(), unfolded

    async def on_sample_run(run: str | None) -> Values:
        return await handlers.samples(store, run or "")

    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    # By default Gradio drops what is pressed while an answer is on its way.
    latest: dict[str, Any] = {**quick, "trigger_mode": "always_last"}
    choice = [parts["chosen"], parts["measure"]]
    unfolded = gr.State([])  # sweeps of the table of runs
    page.load(on_open, None, list(parts.values()), **quick)
    title = f"document.title = {json.dumps(TITLE)}"  # Gradio has set the other page's
    page.load(None, None, None, js=f"() => {{ {title}; window.experiments.label(); }}")
    for field in choice:
        field.input(on_choice, choice, parts["curves"], **latest)
    # The curves have seen something new; the operator has moved the champion.
    changes = [parts["curves"].submit, parts["versions"].submit]
    gr.on(changes, on_news, [*choice, parts["sample_run"], unfolded], list(parts.values()), **latest)
    pressed = [parts["chosen"], parts["curves"], parts["runs"], unfolded]
    parts["runs"].select(on_row, [*choice, unfolded], pressed, **latest)
    parts["sample_run"].input(on_sample_run, parts["sample_run"], parts["learn"], **latest)


def _opened(page: Page, ui: str = "") -> list[Any]:
    """A page as values for all `Parts`; `ui`: where the MLflow UI is, for those who may know."""
    if page.curves is None or page.samples is None:
        return [page.note, gr.update(visible=False), *[gr.skip()] * 11]
    return [
        page.note,
        gr.update(visible=True),
        page.runs,
        gr.update(choices=list(page.choices), value=page.curves["chosen"]),
        page.curves["measures"],
        page.curves | {"ui": ui},
        gr.update(choices=list(page.sampled), value=page.samples["run"] or None, visible=bool(page.sampled)),
        page.samples,
        gr.update(value=page.evaluations, visible=page.evaluations is not None),
        gr.update(visible=page.evaluations is None),
        gr.update(value=page.benchmarks, visible=page.benchmarks is not None),
        gr.update(visible=page.benchmarks is None),
        page.versions,
    ]


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


def _heading(title: str, line: str, elem_id: str) -> None:
    """A section's heading: fixed words of our own."""
    html = f"<h2>{title}</h2><p>{line}</p>"
    gr.HTML(html, elem_id=elem_id, elem_classes="section", apply_default_css=False, js_on_load=None)


def _drawn_by(
    elem_id: str, template: str, value: Any, script: str | None = None, functions: list[Any] | None = None
) -> gr.HTML:
    """Constant markup that a script fills; without one, the value is put as text into the paragraph."""
    say = "const announce = () => window.experiments.say(element.querySelector('p'), props.value);"
    return gr.HTML(
        value,
        html_template=template,
        js_on_load=script or f"{say} announce(); watch('value', announce);",
        apply_default_css=False,
        elem_id=elem_id,
        server_functions=functions,
    )
