"""The page's layout: what stands where, and which handler answers which event. No logic lives here.

The story is drawn by `assets/book.js` from a plain value. Its template is constant on purpose: Gradio runs
the text of a filled-in template as a JavaScript template literal, so a story that held `${…}` would be
executed, and `${value}` would be taken as HTML. The script sets text nodes only.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from html import escape
from typing import Any, NamedTuple, TypeVar

import gradio as gr
from gradio.events import api

from demo import handlers, theme
from demo.experiments_handlers import Store
from demo.experiments_page import PATH, add_experiments
from demo.form import FIELDS, LONGEST, Form
from demo.handlers import AppState, View, buttons
from demo.links import VERSION_CHARS
from demo.user_cookie import user_of
from model.generation import new_seed
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
    "Seed": "The same seed, prompt and settings give the same story.",
}

BUTTONS = ("write", "stop", "resume", "again", "save", "link", "rate", "rate")
"""What of `Buttons` each button needs, in their order on the page; the last two are the thumbs."""

QUEUE_MARGIN = 64
"""Events that may wait in Gradio's own queue: loads and new seeds. Stories wait in the engine's queue."""

_KEYS = """
<p class="keys"><kbd>Ctrl</kbd> or <kbd>⌘</kbd> + <kbd>Enter</kbd> writes, <kbd>Esc</kbd> stops</p>
"""

_BOOK = """
<div class="book" data-phase="empty">
  <article aria-label="The story" tabindex="-1"></article>
  <p class="blank">Your story will appear here.</p>
  <p class="status"></p>
  <p class="spoken" role="status" aria-live="polite"></p>
</div>
"""


_PARAMETERS = (
    " Yields the growing `story`, its new `text`, and at the end a `finish_reason`. max_tokens: longest story. "
    "temperature: 0 always takes the likeliest token. top_p, top_k, min_p: which tokens may be chosen. "
    "repetition_penalty: above 1, used tokens become less likely. seed: the same one gives the same story; none: a new "
    "one, which is sent back."
)

Made = TypeVar("Made")


class Parts(NamedTuple):
    """What events come from or change."""

    fields: Sequence[gr.components.Component]
    """In the order of `FIELDS`."""
    examples: list[tuple[gr.Button, str]]
    new_seed_button: gr.Button
    buttons: list[gr.Button]
    """In the order of `BUTTONS`."""
    book: gr.HTML
    view: gr.State
    """The `View` on the page, kept on the server for Continue."""


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


def build(manager: GenerationManager, experiments: Store | None = None) -> gr.Blocks:
    """The page, wired to `manager`, whose backend must be running before the first event arrives.

    With `experiments`, there is a second page beside it, and a link to that.
    """
    return in_a_loop(lambda: _lay_out(AppState(manager), experiments))


def _lay_out(state: AppState, experiments: Store | None) -> gr.Blocks:
    backend = state.manager.backend
    page = gr.Blocks(title="Write me a story", analytics_enabled=False, fill_width=True)
    with page:
        parts = _layout(asks=state.recorder is not None)
        colophon = functools.partial(_colophon, state, linked=experiments is not None)
        shown = _plain(colophon(), "colophon")
        _wire(page, parts, state)
        _add_endpoint(state, "write", handlers.write, "Write a story that begins with `prompt`.")
        _add_endpoint(state, "continue", _continue, "Go on with the story that `prompt` is so far.")
        page.load(colophon, None, shown, queue=False, show_progress="hidden", api_visibility="private")
    if experiments is not None:
        add_experiments(page, experiments)
    page.queue(max_size=backend.capacity + QUEUE_MARGIN, default_concurrency_limit=backend.capacity)
    return page


def _layout(*, asks: bool) -> Parts:
    """The composer and the story beside it; `asks`: whether users may rate a story."""
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
            with gr.Accordion("More", open=False, elem_id="more"), gr.Row(elem_id="settings"):
                temperature = _slider("Temperature", 0, 2, 0.05, usual.temperature)
                top_p = _slider("Top-p", 0, 1, 0.01, usual.top_p)
                min_p = _slider("Min-p", 0, 1, 0.01, usual.min_p)
                penalty = _slider("Repetition penalty", 1, 2, 0.01, usual.repetition_penalty)
                top_k = _number("Top-k", usual.top_k)
                with gr.Row(elem_id="seed-row"):
                    seed = _number("Seed", new_seed())
                    new_seed_button = _small("New seed", "new-seed", interactive=True)
            with gr.Row(elem_id="actions"):
                actions = [
                    gr.Button("Write", variant="primary", min_width=0, elem_id="write"),
                    gr.Button("Stop", interactive=False, min_width=0, elem_id="stop"),
                    gr.Button("Continue", interactive=False, min_width=0, elem_id="continue"),
                    gr.Button("Again", interactive=False, min_width=0, elem_id="again"),
                ]
            _plain(_KEYS, "keys")
        with gr.Column(elem_id="story-panel"):
            book = gr.HTML(
                View().as_dict(),
                html_template=_BOOK,
                js_on_load=theme.asset("book.js"),
                apply_default_css=False,
                elem_id="book",
            )
            with gr.Row(elem_id="rating", visible=asks):
                like = _small("👍 I like it", "like", interactive=False)
                dislike = _small("👎 Not for me", "dislike", interactive=False)
            with gr.Row(elem_id="keep"):
                save = _small("Save as .txt", "save", interactive=False)
                link = _small("Copy link", "link", interactive=False)
    fields = [prompt, max_tokens, temperature, top_p, top_k, min_p, penalty, seed]
    buttons = [*actions, save, link, like, dislike]
    return Parts(fields, examples, new_seed_button, buttons, book, gr.State(View()))


def _wire(page: gr.Blocks, parts: Parts, state: AppState) -> None:
    """Connect events to handlers. Each function here only hands over what Gradio gives it."""

    # Gradio finds `request` by its place, so it stands before the fields' values.
    async def on_write(request: gr.Request, *values: Any) -> AsyncGenerator[list[Any], None]:
        who = _who(state, request)
        async with contextlib.aclosing(handlers.write(state, _session(request), _form(*values), *who)) as views:
            async for update in _updates(views):
                yield update

    async def on_resume(request: gr.Request, view: View, *numbers: Any) -> AsyncGenerator[list[Any], None]:
        form, who = _form("", *numbers), _who(state, request)
        async with contextlib.aclosing(handlers.resume(state, _session(request), form, view, *who)) as views:
            async for update in _updates(views):
                yield update

    async def on_stop(request: gr.Request) -> None:
        handlers.stop(state, _session(request))

    def on_like(view: View) -> list[Any]:
        return _shown(handlers.rate(state, view, 1))

    def on_dislike(view: View) -> list[Any]:
        return _shown(handlers.rate(state, view, -1))

    def on_load(request: gr.Request) -> list[Any]:
        version = model_for(state.manager.backend, user_of(request)).version
        values, view = handlers.opened(dict(request.query_params), version)
        # What no link names stays as it is: the user may have begun to type before this answer arrives.
        fields = [values[name] if name in values else gr.skip() for name in FIELDS]
        return [*fields, view.as_dict() if view.status else gr.skip()]

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    quick: dict[str, Any] = {**hidden, "queue": False}
    story: dict[str, Any] = {
        **hidden,
        "outputs": [parts.book, parts.view, *parts.buttons],
        "concurrency_limit": state.manager.backend.capacity,
        "concurrency_id": "stories",
    }
    seed: Any = parts.fields[-1]
    write, stop, resume, again, save, link, like, dislike = parts.buttons

    write.click(on_write, parts.fields, validator=_check, **story)
    resume.click(on_resume, [parts.view, *parts.fields[1:]], validator=_check_resume, **story)
    again.click(new_seed, None, seed, **quick).then(on_write, parts.fields, validator=_check, **story)
    stop.click(on_stop, None, None, **quick)
    parts.new_seed_button.click(new_seed, None, seed, **quick)
    if state.recorder is not None:
        like.click(on_like, parts.view, [parts.book, parts.view], **quick)
        dislike.click(on_dislike, parts.view, [parts.book, parts.view], **quick)
    for chip, beginning in parts.examples:
        chip.click(None, None, None, js=f"() => window.story.begin({json.dumps(beginning)})")
    save.click(None, parts.book, None, js="(view) => window.story.save(view)")
    link.click(None, parts.book, None, js="(view) => window.story.link(view)")
    # Drawn in the browser and at once: an answer of the server could come when the user has typed a seed.
    draw = f"(seed) => seed === {seed.value} ? Math.floor(Math.random() * 2 ** 32) : seed"
    page.load(None, seed, seed, js=draw, **hidden)
    page.load(on_load, None, [*parts.fields, parts.book], **hidden)
    page.unload(on_stop)


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
    ) -> AsyncGenerator[dict[str, Any], None]:
        seed = new_seed() if seed is None else seed
        form = _form(prompt, max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed)
        async with contextlib.aclosing(start(state, _session(request), form, *_who(state, request))) as views:
            async for view in views:
                if view.phase == "failed":
                    raise gr.Error(view.status, print_exception=False)
                about = {"finish_reason": view.finish_reason, "status": view.status, "seed": seed}
                yield {"story": view.text, "text": view.generated, **about}

    story.__annotations__["return"] = dict  # Gradio describes by it what is yielded
    api(
        story,
        api_name=name,
        api_description=what + _PARAMETERS,
        concurrency_limit=state.manager.backend.capacity,
        concurrency_id="stories",
    )


def _continue(state: AppState, tab: str, form: Form, client: str, user: str) -> AsyncGenerator[View, None]:
    return handlers.resume(state, tab, form, View(prompt=form.prompt), client, user)


def _form(*values: Any) -> Form:
    """The form from the fields' values, in the order of `FIELDS`; an untouched text field counts as empty."""
    prompt, *numbers = values
    return Form(prompt=prompt or "", **dict(zip(FIELDS[1:], numbers, strict=True)))


def _check(*values: Any) -> list[dict[str, Any]]:
    """One verdict a field, which Gradio shows beside it."""
    return [gr.validate(problem is None, problem or "") for problem in handlers.problems(_form(*values))]


def _check_resume(_view: View, *numbers: Any) -> list[dict[str, Any]]:
    """As `_check`, for the numbers; the story on the page stands where the prompt does."""
    return _check("", *numbers)


def _session(request: gr.Request) -> str:
    return request.session_hash or ""


def _who(state: AppState, request: gr.Request) -> tuple[str, str]:
    """The client, as the rate limiter counts it, and the user."""
    return state.manager.client_of({} if request.request is None else request.request.scope), user_of(request)


def _shown(view: View) -> list[Any]:
    return [view.as_dict(), view]


async def _updates(views: AsyncGenerator[View, None]) -> AsyncGenerator[list[Any], None]:
    """Each view as values for the story's outputs; buttons are sent only when one changes."""
    before = None
    async for view in views:
        now = buttons(view)
        if now == before:
            presses: list[Any] = [gr.skip()] * len(BUTTONS)
        else:
            presses = [gr.update(interactive=getattr(now, name)) for name in BUTTONS]
        before = now
        yield [*_shown(view), *presses]


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


def _number(label: str, value: int) -> gr.Number:
    """A field for a whole number, without limits of its own: the validator names them beside the field."""
    return gr.Number(value=value, step=1, precision=0, label=label, info=HELP[label], elem_id=label.lower())


def _small(label: str, elem_id: str, *, interactive: bool) -> gr.Button:
    return gr.Button(label, size="sm", interactive=interactive, min_width=0, scale=0, elem_id=elem_id)


def _plain(html: str, elem_id: str, script: str | None = None) -> gr.HTML:
    """Markup of our own."""
    return gr.HTML(html, elem_id=elem_id, apply_default_css=False, js_on_load=script)


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
