"""The layout of the page Status, which renews itself every few seconds and changes nothing.

Its script asks a server function, past Gradio's queue, which is for stories, and only while the page is seen.
"""

import json
from typing import Any

import gradio as gr
from gradio.events import api

from demo import theme
from demo.status import StatusSource
from experiments.common.thresholds import load_thresholds
from model.serving.metrics import Meter
from model.serving.session import GenerationManager

PATH = "status"
TITLE = "Status · Write me a story"

_TEMPLATE = """
<div class="status" aria-busy="true">
  <p class="state"><b></b> <span></span></p>
  <dl class="who"></dl>
  <section><h2>Load</h2><dl class="load"></dl></section>
  <section>
    <h2>Latency and thresholds</h2>
    <p class="window"></p>
    <table><thead><tr><th scope="col">figure</th><th scope="col">now</th><th scope="col">threshold</th>
    <th scope="col">verdict</th></tr></thead><tbody class="figures"></tbody></table>
  </section>
  <section><h2>Last failures</h2><p class="fine"></p><ul class="failures"></ul></section>
</div>
"""


def open_source(manager: GenerationManager) -> StatusSource | None:
    """Who answers for the page: over the metrics that follow the sessions of `manager`, if any do."""
    meter = next((each for each in manager.observers if isinstance(each, Meter)), None)
    if meter is None:
        return None
    return StatusSource(manager, meter, list(load_thresholds()))


def add_status(page: gr.Blocks, source: StatusSource) -> None:
    """Add the page to `page`, at `/status`."""

    async def status(_given: object) -> dict[str, Any]:  # Gradio always hands something over
        return source.status()

    with page.route("Status", f"/{PATH}", show_in_navbar=False):
        gr.HTML(
            "",
            html_template=_TEMPLATE,
            js_on_load=theme.asset("status.js"),
            apply_default_css=False,
            elem_id="status",
            server_functions=[status],
        )
        title = f"document.title = {json.dumps(TITLE)}"  # Gradio has set the other page's
        page.load(None, None, None, js=f"() => {{ {title}; }}")


def add_endpoint(source: StatusSource) -> None:
    """Add `/status` for programs, on the page that is being laid out."""

    async def status() -> dict:  # type: ignore[type-arg]  # Gradio describes by it what is returned
        return source.status()

    what = "How the service is doing now: who generates, its load, latency against the documented thresholds, failures."
    api(status, api_name="status", api_description=what, queue=False)
