"""The page's layout: what stands where, and which handler answers which event. No logic lives here.

The browser holds what the user has: `assets/book.js` keeps the view of the story and the fields in the tab's storage,
answers the buttons at once, and sends the view along, so that nothing hangs on the server's memory.

The story is drawn by `assets/book.js` from a plain value. Its template is constant on purpose: Gradio runs
the text of a filled-in template as a JavaScript template literal, so a story that held `${…}` would be
executed, and `${value}` would be taken as HTML. The script sets text nodes only.
"""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from html import escape
from typing import Any, NamedTuple, TypeVar

import gradio as gr
from gradio.events import api

from demo import handlers, theme, tree
from demo.arena_handlers import Arena
from demo.arena_page import add_arena
from demo.experiments_page import PATH, add_experiments
from demo.form import ANY, CHOICES, FIELDS, LABELS, LONGEST, VERSION_CHARS, Form, read_form
from demo.handlers import AppState, View
from demo.inside_page import add_inside
from demo.routing import user_of
from demo.status_page import add_endpoint, add_status, open_source
from demo.steering import Caller
from experiments.dashboard.client import StoreClient
from model.serving.backend import model_for
from model.serving.session import GenerationManager

EXAMPLES = {
    "A fox who could not sleep": "Once upon a time, there was a little fox who could not sleep. Every night,",
    "The key in the garden": "One sunny day, Lily found a tiny golden key in the garden.",
    "A robot makes a friend": "Tom had a small robot named Beep. Beep was sad because he had no friends.",
    "The brave little boat": "There was once a little red boat who was afraid of the big sea.",
    "Two friends, one kite": "Sam and Mia both wanted to fly the blue kite.",
}
"""Beginnings by label. None ends in a space: see `handlers.write`."""

HELP = {
    "Length": "In tokens at most: a short word or a part of one.",
    "Temperature": "How daring the words are. 0 always takes the likeliest.",
    "Top-p": "Keeps the likeliest words that together reach this share.",
    "Min-p": "Drops words less likely than this share of the likeliest.",
    "Repetition penalty": "Above 1, words already used become less likely.",
    "Top-k": "Keeps only the k likeliest words. 0 keeps all.",
    "Words": "That shall come in the story: names too. At most eight.",
    "Seed": "Empty: a new story each time. The same seed, prompt and settings give the same story.",
}

QUEUE_MARGIN = 64
"""Events that may wait in Gradio's own queue: loads and new seeds. Stories wait in the engine's queue."""

SCRIPTS = ("pace.js", "book.js", "difference.js", "words.js", "tree.js", "fan.js", "shelf.js")
"""Parts of the story's script, in their order: they see each other's names."""

_KEYS = """
<p class="keys"><kbd>Ctrl</kbd> or <kbd>⌘</kbd> + <kbd>Enter</kbd> writes, <kbd>Esc</kbd> stops</p>
"""

_BOOK = """
<div class="book" data-phase="empty">
  <p class="note"></p>
  <article aria-label="The story" tabindex="-1"></article>
  <p class="blank">Your story will appear here.</p>
  <ul class="wishes" aria-label="Wishes"></ul>
  <p class="status"></p>
  <details class="figures">
    <summary>Details</summary>
    <p></p>
    <label><input type="checkbox"> Show stories as fast as you read</label>
  </details>
  <p class="spoken" role="status" aria-live="polite"></p>
</div>
<details class="shelf">
  <summary>Your stories</summary>
  <p>The last thirty are kept in this browser.</p>
  <ul></ul>
  <button type="button" class="clear" hidden>Delete all</button>
</details>
"""


_PARAMETERS = (
    " Yields the growing `story`, its new `text`, and at the end a `finish_reason`. max_tokens: longest story. "
    "temperature: 0 always takes the likeliest token. top_p, top_k, min_p: which tokens may be chosen. "
    "repetition_penalty: above 1, used tokens become less likely. words, story_length, dialogue, ending: what the "
    "story is to have. seed: the same one gives the same story; none: a new one, which is sent back."
)

Made = TypeVar("Made")
Shown = dict[str, Any]
"""A `View` as the browser has it, with `run`, its number of the request, and `wanted`, the button that was pressed."""


class Parts(NamedTuple):
    """What events come from or change."""

    fields: Sequence[gr.components.Component]
    """In the order of `FIELDS`."""
    examples: list[tuple[gr.Button, str]]
    same_seed: gr.Button
    book: gr.HTML
    """Its value is what is `Shown`."""


def in_a_loop(make: Callable[[], Made]) -> Made:
    """Call `make` while an event loop runs.

    Where none does, Gradio opens a loop for each lock that it makes and never closes it
    (`gradio.utils.safe_get_lock`): two sockets lost each time.
    """

    async def call() -> Made:
        return make()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(call())
    return make()


def build(manager: GenerationManager, experiments: StoreClient | None = None) -> gr.Blocks:
    """The page, wired to `manager`, whose backend must be running before the first event arrives.

    The page Inside is beside it, and with `experiments` that page too.
    """
    return in_a_loop(lambda: _lay_out(AppState(manager), experiments))


def _lay_out(state: AppState, experiments: StoreClient | None) -> gr.Blocks:
    backend = state.manager.backend
    source = open_source(state.manager)
    page = gr.Blocks(title="Write me a story", analytics_enabled=False, fill_width=True)
    with page:
        parts = _layout(state)
        colophon = functools.partial(_colophon, state, linked=experiments is not None)
        shown = _plain(colophon(), "colophon")
        _wire(page, parts, state)
        _add_endpoint(state, "write", handlers.write, "Write a story that begins with `prompt`.")
        _add_endpoint(state, "continue", _continue, "Go on with the story that `prompt` is so far.")
        _add_look(state, "alternatives", "Words that could come next after the text `prompt`, with probabilities.")
        _add_look(state, "futures", "Sixteen continuations of `prompt`, merged by their common beginnings.")
        if source is not None:
            add_endpoint(source)
        page.load(colophon, None, shown, queue=False, show_progress="hidden", api_visibility="private")
    add_inside(page, state)
    if (arena := Arena.of(state)) is not None:
        add_arena(page, arena, EXAMPLES)
    if experiments is not None:
        add_experiments(page, experiments, state.manager)
    if source is not None:
        add_status(page, source)
    page.queue(max_size=backend.capacity + QUEUE_MARGIN, default_concurrency_limit=backend.capacity)
    return page


def _layout(state: AppState) -> Parts:
    """The composer and the story beside it; where stories are recorded, users may rate one."""

    def caller_of(request: gr.Request) -> Caller:
        return Caller(state.manager.client_of(request.scope), user_of(request))

    # By this annotation Gradio knows that it is to hand over the request, which is Starlette's here.
    async def look_at(given: dict[str, Any], request: gr.Request) -> dict[str, Any]:
        return await handlers.look_at(state, given, *caller_of(request))

    async def regrow(given: dict[str, Any], request: gr.Request) -> dict[str, Any]:
        return await tree.regrown(state.manager, given, caller_of(request))

    asks = state.recorder is not None
    usual = Form()
    with gr.Row(elem_id="workspace"):
        with gr.Column(elem_id="composer"):
            prompt = gr.Textbox(
                label="How does it begin?",
                placeholder="Type a first sentence, or press an example.",
                lines=3,
                max_lines=10,
                elem_id="prompt",
                html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=True),
            )
            with gr.Row(elem_id="examples"):
                examples = [
                    (gr.Button(label, size="sm", min_width=0, scale=0, elem_classes="chip"), beginning)
                    for label, beginning in EXAMPLES.items()
                ]
            max_tokens = _slider("Length", 1, LONGEST, 1, usual.max_tokens)
            with gr.Accordion("Wishes", open=False, elem_id="wishes", elem_classes="fold"):
                words = gr.Textbox(
                    label="Words",
                    info=HELP["Words"],
                    placeholder="dragon, cake",
                    max_lines=1,
                    elem_id="words",
                    html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
                )
                with gr.Row(elem_id="wish-choices"):
                    chosen = [_choice(name) for name in CHOICES]
            with gr.Accordion("More", open=False, elem_id="more", elem_classes="fold"), gr.Row(elem_id="settings"):
                temperature = _slider("Temperature", 0, 2, 0.05, usual.temperature)
                top_p = _slider("Top-p", 0, 1, 0.01, usual.top_p)
                min_p = _slider("Min-p", 0, 1, 0.01, usual.min_p)
                penalty = _slider("Repetition penalty", 1, 2, 0.01, usual.repetition_penalty)
                # Without limits of its own: the handler names them.
                top_k = gr.Number(usual.top_k, step=1, precision=0, label="Top-k", info=HELP["Top-k"], elem_id="top-k")
                with gr.Row(elem_id="seed-row"):
                    # A number field of Gradio cannot be empty: it turns into 0 when it is shown.
                    seed = gr.Textbox(
                        label="Seed", info=HELP["Seed"], placeholder="new each time", max_lines=1, elem_id="seed"
                    )
                    same_seed = _small("Same seed", "same-seed")
            # Buttons that `assets/book.js` answers can be pressed once it is there: it enables them.
            with gr.Row(elem_id="actions"):
                gr.Button("Write", variant="primary", min_width=0, elem_id="write", interactive=False)
                for label in ("Stop", "Skip", "Continue", "Again"):
                    gr.Button(label, min_width=0, elem_id=label.lower(), interactive=False)
            _plain(_KEYS, "keys")
        with gr.Column(elem_id="story-panel"):
            book = gr.HTML(
                View().as_dict() | {"run": 0, "wanted": ""},
                html_template=_BOOK,
                js_on_load="".join(map(theme.asset, SCRIPTS)),
                apply_default_css=False,
                elem_id="book",
                server_functions=[look_at, regrow],
            )
            with gr.Row(elem_id="rating", visible=asks):
                _small("👍 I like it", "like", interactive=False)
                _small("👎 Not for me", "dislike", interactive=False)
            with gr.Row(elem_id="keep"):
                _small("Save as .txt", "save", interactive=False)
                for kind in ("md", "json", "png"):
                    _small(f".{kind}", f"save-{kind}", interactive=False)
                _small("Copy link", "link", interactive=False)
    fields = [prompt, max_tokens, temperature, top_p, top_k, min_p, penalty, words, *chosen, seed]
    return Parts(fields, examples, same_seed, book)


def _wire(page: gr.Blocks, parts: Parts, state: AppState) -> None:
    """Connect events to handlers. Each function here only hands over what Gradio gives it."""

    # Gradio finds `request` by its place, so it stands before the fields' values.
    async def on_story(
        request: gr.Request, shown: dict[str, Any], *values: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        run, newest = shown.get("run"), state.runs.get(_tab(request), 0)
        if not isinstance(run, int) or run < newest:
            return  # the page has given this one up
        state.runs[_tab(request)] = run
        what = (state, _tab(request), read_form(*values))
        handlers.stop(*what[:2])  # a new story takes the place of one that the tab may have running
        if shown.get("wanted") == "open":
            views = handlers.open_link(*what[:2], View.sent(shown), *_who(state, request))
        elif shown.get("wanted") in ("continue", "fork"):
            go_on = handlers.fork if shown["wanted"] == "fork" else handlers.resume
            views = go_on(*what, View.sent(shown), *_who(state, request))
        else:
            views = handlers.write(*what, *_who(state, request))
        async with contextlib.aclosing(views):
            async for view in views:
                yield view.as_dict() | {"run": run}

    async def on_stop(request: gr.Request, shown: dict[str, Any]) -> None:
        stopped = shown.get("stopped")
        # This request may have been overtaken by that for the next story.
        if isinstance(stopped, int) and state.runs.get(_tab(request), 0) <= stopped:
            handlers.stop(state, _tab(request))

    async def on_leaving(request: gr.Request) -> None:
        handlers.stop(state, _tab(request))
        state.runs.pop(_tab(request), None)

    def on_rate(shown: Shown) -> Shown:
        rating = 1 if shown.get("wanted") == "like" else -1
        return handlers.rate(state, View.sent(shown), rating).as_dict() | {"run": shown.get("run")}

    def on_load(request: gr.Request, opening: dict[str, Any]) -> list[Any]:
        model = model_for(state.manager.backend, user_of(request))
        kept, first = bool(opening.get("kept")), bool(opening.get("first"))
        values, view = handlers.opened({} if kept else dict(request.query_params), model.version)
        if first and not kept and not values and not view.status and handlers.has_example(state):
            view = handlers.example(model.version)
        # What no link names stays as it is: the user may have begun to type before this answer arrives.
        fields = [values[name] if name in values else gr.skip() for name in FIELDS]
        wanted = "open" if view.link else ""
        shown = view.as_dict() | {"run": 0, "wanted": wanted} if view.link or view.status else gr.skip()
        return [*fields, shown]

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    quick: dict[str, Any] = {**hidden, "queue": False}
    parts.book.submit(
        on_story,
        [parts.book, *parts.fields],
        parts.book,
        **hidden,
        trigger_mode="multiple",  # a new story may be asked for before the last has ended
        concurrency_limit=state.manager.backend.capacity,
        concurrency_id="stories",
    )
    parts.book.stop(on_stop, parts.book, None, **quick, trigger_mode="multiple")
    if state.recorder is not None:
        parts.book.like(on_rate, parts.book, parts.book, **quick, trigger_mode="always_last")
    for chip, beginning in parts.examples:
        chip.click(None, None, None, js=f"() => window.story.begin({json.dumps(beginning)})")
    parts.same_seed.click(None, parts.book, parts.fields[-1], js="(view) => (view.seed < 0 ? '' : String(view.seed))")
    page.load(None, None, parts.fields, js=f"() => window.story.fields({len(FIELDS)})")
    page.load(on_load, parts.book, [*parts.fields, parts.book], js="() => [window.story.opening()]", **hidden)
    changes = [field.change for field in parts.fields]  # type: ignore[attr-defined]
    gr.on(changes, None, parts.fields, None, js="(...values) => { window.story.keep('fields', values); }")
    page.unload(on_leaving)


def _add_endpoint(state: AppState, name: str, start: Callable[..., AsyncGenerator[View, None]], what: str) -> None:
    """Add a public endpoint, typed, streaming and cancellable, for Gradio's clients in Python and JavaScript."""
    usual = Form()

    async def story(
        request: gr.Request,
        prompt: str,
        max_tokens: int = usual.max_tokens,
        temperature: float = usual.temperature,
        top_p: float = usual.top_p,
        top_k: int = usual.top_k,
        min_p: float = usual.min_p,
        repetition_penalty: float = usual.repetition_penalty,
        seed: int | None = None,
        words: str = "",
        story_length: str = ANY,
        dialogue: str = ANY,
        ending: str = ANY,
    ) -> AsyncGenerator[dict[str, Any], None]:
        wishes = (words, story_length, dialogue, ending)
        form = read_form(prompt, max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, *wishes, seed)
        async with contextlib.aclosing(start(state, _tab(request), form, *_who(state, request))) as views:
            async for view in views:
                if view.phase == "failed":
                    raise gr.Error(view.status, print_exception=False)
                status = " · ".join(filter(None, (view.status, view.figures)))
                about = {"finish_reason": view.finish_reason, "status": status, "seed": view.seed}
                yield {"story": view.text, "text": view.generated, **about}

    story.__name__ = name  # by which Gradio names its tool
    story.__annotations__["return"] = dict  # Gradio describes by it what is yielded
    api(
        story,
        api_name=name,
        api_description=what + _PARAMETERS,
        concurrency_limit=state.manager.backend.capacity,
        concurrency_id="stories",
    )


def _add_look(state: AppState, name: str, what: str) -> None:
    """Add a public endpoint that says what could come after a text."""

    async def look(request: gr.Request, prompt: str, seed: int = 0) -> dict[str, Any]:
        given = {"prompt": prompt, "seed": seed, "futures": name == "futures"}
        answer = await handlers.look_at(state, given, *_who(state, request))
        if "error" in answer:
            raise gr.Error(answer["error"], print_exception=False)
        return answer

    look.__name__ = name
    look.__annotations__["return"] = dict
    api(look, api_name=name, api_description=what, concurrency_limit=state.manager.backend.capacity)


def _continue(state: AppState, tab: str, form: Form, client: str, user: str) -> AsyncGenerator[View, None]:
    return handlers.resume(state, tab, form, View(prompt=form.prompt), client, user)


def _tab(request: gr.Request) -> str:
    return request.session_hash or ""


def _who(state: AppState, request: gr.Request) -> tuple[str, str]:
    """The client, as the rate limiter counts it, and the user."""
    return state.manager.client_of({} if request.request is None else request.request.scope), user_of(request)


def _slider(label: str, low: float, high: float, step: float, value: float) -> gr.Slider:
    """A slider whose element id is its label in small letters with hyphens."""
    return gr.Slider(
        low,
        high,
        value=value,
        step=step,
        precision=0 if step == 1 else None,
        label=label,
        info=HELP[label],
        elem_id=label.lower().replace(" ", "-"),
        buttons=[],
    )


def _choice(name: str) -> gr.Radio:
    """A wish by the name of its field."""
    label = LABELS[name]
    return gr.Radio(CHOICES[name], value=ANY, label=label, elem_id=label.lower().replace(" ", "-"))


def _small(label: str, elem_id: str, *, interactive: bool = True) -> gr.Button:
    return gr.Button(label, size="sm", min_width=0, scale=0, elem_id=elem_id, interactive=interactive)


def _plain(html: str, elem_id: str) -> gr.HTML:
    """Markup of our own."""
    return gr.HTML(html, elem_id=elem_id, apply_default_css=False, js_on_load=None)


def _colophon(state: AppState, *, linked: bool = False) -> str:
    """Who wrote it. A model's name can be a folder's, so it is escaped.

    While versions are compared the page does not say which one serves: that would bias the rating.
    """
    link = f' <a href="./{PATH}">How it was made</a>' if linked else ""
    model = state.manager.backend.model
    if state.recorder is not None and state.recorder.compares:
        return f"<p>Written by {escape(model.name)}. Stories are invented and may be odd.{link}</p>"
    name = escape(f"{model.name}, the {model.alias}" if model.alias else model.name)
    digest = f"digest <code>{escape(model.version[:VERSION_CHARS])}</code>"
    return f"<p>Written by {name}, {digest}. Stories are invented and may be odd.{link}</p>"
