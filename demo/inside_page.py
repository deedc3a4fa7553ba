"""The layout of the page Inside: a story word by word, and what each word depends on. No logic lives here.

Everything but the model's card is drawn by `assets/inside.js` from plain values, under a constant template (see
`demo.page`), and asked for by the script: the story is in the browser.
"""

import json
from collections.abc import Callable
from typing import Any, cast

import gradio as gr
from gradio.events import api

from demo import inside_handlers as handlers
from demo import theme
from demo.form import Form
from demo.handlers import AppState
from demo.inside_handlers import Answer
from demo.routing import user_of

PATH = "inside"
TITLE = "Inside · Write me a story"

_USUAL = Form()
_INSIDE = f"""
<div class="inside">
  <div class="text">
    <p class="note" role="status" aria-live="polite">Reading a story …</p>
    <div class="tints" role="group" aria-label="What the tint shows"></div>
    <p class="legend"></p>
    <article tabindex="0" aria-label="The story, word by word: choose one with the arrow keys"></article>
    <details class="another">
      <summary>Look at another story</summary>
      <label for="another-story">Its text</label>
      <textarea id="another-story" rows="4" maxlength="6000" dir="auto"></textarea>
      <button type="button" class="read">Look inside</button>
    </details>
  </div>
  <div class="panels">
    <section class="word" aria-live="polite"><h2></h2><p></p></section>
    <section class="cut" hidden>
      <h2>What could stand here</h2>
      <p class="about">The next token as the model sees it, and what the settings leave of it. Move them.</p>
      <div class="sliders">
        <label>Temperature <output></output>
          <input type="range" name="temperature" min="0" max="2" step="0.05" value="{_USUAL.temperature}"></label>
        <label>Top-p <output></output>
          <input type="range" name="topP" min="0.01" max="1" step="0.01" value="{_USUAL.top_p}"></label>
        <label>Min-p <output></output>
          <input type="range" name="minP" min="0" max="1" step="0.01" value="{_USUAL.min_p}"></label>
      </div>
      <p class="kept" role="status"></p>
      <ol class="bars"></ol>
    </section>
    <section class="memory" hidden>
      <h2>Cut the memory</h2>
      <p class="about">What the model expects when it sees only the last tokens, as if the story began there.</p>
      <label>Tokens that it sees <output></output><input type="range" min="0" max="0" step="1" value="0"></label>
      <ol class="costs"></ol>
      <ol class="bars"></ol>
    </section>
    <section class="evidence" hidden>
      <h2>Why this word, not another?</h2>
      <p class="about">Each word before it is left out in turn: what do the odds lose?</p>
      <div class="row">
        <label hidden>Instead of it <select></select></label>
        <button type="button">Which words spoke for it?</button>
      </div>
      <p class="found" role="status"></p>
    </section>
    <section class="layers" hidden>
      <h2>What the layers read</h2>
      <p class="about">Attention looks back at words; a recurrence holds a memory that fades.</p>
      <button type="button">Look into the layers</button>
      <p class="found" role="status"></p>
      <div class="heads"></div>
    </section>
  </div>
</div>
"""

_PARAMETERS = " story: its text. word: its number, from 0, among the `words` that /surprise returns."
_ENDPOINTS = {
    "distribution": "What could come instead of a word: tokens with log-probabilities, before any sampling filter.",
    "memory": "What a word costs in bits where the model sees only the last 1, 4, 16, 64 or all tokens before it.",
    "layers": "What each attention head and recurrence reads as the model chooses a word; needs PyTorch.",
}


def add_inside(page: gr.Blocks, state: AppState) -> None:
    """Add the page to `page`, at `/inside`, and its public endpoints."""

    # By this annotation Gradio knows that it is to hand over the request, which is Starlette's here.
    async def look_inside(given: dict[str, Any], request: gr.Request) -> Answer:
        client, user = state.manager.client_of(request.scope), user_of(gr.Request(cast(Any, request)))
        return await handlers.answer(state, given.get("question"), given, client, user)

    def on_open(request: gr.Request) -> str:
        return handlers.card(state, user_of(request))

    with page.route("Inside", f"/{PATH}", show_in_navbar=False):
        gr.HTML(
            html_template=_INSIDE,
            js_on_load=theme.asset("inside.js"),
            apply_default_css=False,
            elem_id="inside",
            server_functions=[look_inside],
        )
        with gr.Accordion("The model's card", open=False, elem_id="card"):
            card = gr.Markdown(elem_id="card-text")
        page.load(on_open, None, card, queue=False, show_progress="hidden", api_visibility="private")
        title = f"document.title = {json.dumps(TITLE)}"  # Gradio has set the other page's
        page.load(None, None, None, js=f"() => {{ {title}; }}")
        _add_endpoints(state)


def _add_endpoints(state: AppState) -> None:
    """Add the public endpoints, typed, for Gradio's clients and as tools."""

    async def ask(request: gr.Request, question: str, **given: Any) -> Answer:
        client = state.manager.client_of({} if request.request is None else request.request.scope)
        found = await handlers.answer(state, question, given, client, user_of(request))
        if "error" in found:
            raise gr.Error(found["error"], print_exception=False)
        return found

    async def surprise(request: gr.Request, story: str) -> dict[str, Any]:
        return await ask(request, "surprise", prompt=story)

    def about(name: str) -> Callable[..., Any]:
        async def question(request: gr.Request, story: str, word: int) -> dict[str, Any]:
            return await ask(request, name, prompt=story, word=word)

        return question

    async def evidence(request: gr.Request, story: str, word: int, other: str = "") -> dict[str, Any]:
        return await ask(request, "evidence", prompt=story, word=word, other=other)

    described = {
        "surprise": (
            surprise,
            "How surprising each word of a story is, in bits, and what was to be expected. story: its text.",
        ),
        **{name: (about(name), what + _PARAMETERS) for name, what in _ENDPOINTS.items()},
        "evidence": (
            evidence,
            "Which words before a word spoke for it, and which for another, in bits."
            + _PARAMETERS
            + " other: that one.",
        ),
    }
    for name, (function, what) in described.items():
        function.__name__ = name  # by which Gradio names its tool
        function.__annotations__["return"] = dict
        api(
            function,
            api_name=name,
            api_description=what,
            concurrency_limit=state.manager.backend.capacity,
            concurrency_id="stories",
        )
