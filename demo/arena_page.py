"""The layout of the page Arena: two stories from one prompt, a vote, and then who wrote them and what they have won.

Stories, ballot and scores are drawn by `assets/arena.js` from a plain value, under a constant template (see
`demo.page`).
"""

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import gradio as gr
from gradio.events import api

from demo import arena_handlers as handlers
from demo import theme
from demo.arena_handlers import Arena
from demo.handlers import stop
from demo.routing import user_of
from model.errors import InputError, StoryError

PATH = "arena"
TITLE = "Arena · Write me a story"
_STORY = """
    <section aria-labelledby="story-{letter}">
      <h2 id="story-{letter}"><span>{letter}</span><span class="who"></span></h2>
      <article></article>
      <p class="end" aria-hidden="true"></p>
    </section>
"""
_ARENA = f"""
<div class="arena" data-phase="empty">
  <div class="ballot">
    <p class="status">Two stories will appear here, and you say which is better. Who wrote which comes after that.</p>
    <p class="spoken" role="status" aria-live="polite"></p>
    <div class="choices" role="group" aria-label="Which story is better?">
      <button type="button" data-choice="first" disabled><kbd>1</kbd> A</button>
      <button type="button" data-choice="second" disabled><kbd>2</kbd> B</button>
      <button type="button" data-choice="alike" disabled><kbd>3</kbd> Alike</button>
      <button type="button" data-choice="both bad" disabled><kbd>4</kbd> Both bad</button>
    </div>
    <button type="button" class="skip" hidden>Show both at once</button>
  </div>
  <div class="pair">{"".join(_STORY.format(letter=letter) for letter in "AB")}</div>
  <section class="result" aria-label="Scores" tabindex="-1" hidden>
    <p class="said"></p>
    <div class="scroll" tabindex="0" role="region" aria-label="Scores of all votes">
      <table>
        <caption>All votes that count</caption>
        <thead><tr><th scope="col">Contestant</th><th scope="col">Win rate</th><th scope="col">95 % interval</th>
          <th scope="col">At equal length</th><th scope="col">Battles</th><th scope="col">Words</th></tr></thead>
        <tbody></tbody>
      </table>
    </div>
    <ul class="notes"></ul>
  </section>
</div>
"""


def add_arena(page: gr.Blocks, arena: Arena, examples: Mapping[str, str]) -> None:
    """Add the page to `page`, at `/arena`, and its endpoints; `examples` are beginnings by label."""
    with page.route("Arena", f"/{PATH}", show_in_navbar=False):
        _wire(page, arena, examples)
        _add_endpoints(arena)


def _wire(page: gr.Blocks, arena: Arena, examples: Mapping[str, str]) -> None:
    """Lay out the page and connect events to handlers. Each function here only hands over what Gradio gives it."""
    app = arena.app
    with gr.Column(elem_id="arena-form"):
        prompt = gr.Textbox(
            label="How do both begin?",
            placeholder="Type a first sentence, or press an example.",
            lines=2,
            max_lines=6,
            elem_id="prompt",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=True),
        )
        with gr.Row(elem_id="examples"):
            for label, beginning in examples.items():
                chip = gr.Button(label, size="sm", min_width=0, scale=0, elem_classes="chip")
                chip.click(None, None, None, js=f"() => window.story.begin({json.dumps(beginning)})")
        gr.Button("Write both", variant="primary", min_width=0, elem_id="write", interactive=False)
    battle = gr.HTML(
        handlers.View().as_dict() | {"run": 0},
        html_template=_ARENA,
        js_on_load=theme.asset("arena.js"),
        apply_default_css=False,
        elem_id="arena",
    )

    async def on_battle(
        request: gr.Request, shown: dict[str, Any], prompt: str | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        run, newest = shown.get("run"), app.runs.get(_tab(request), 0)
        if not isinstance(run, int) or run < newest:
            return  # the page has given this one up
        app.runs[_tab(request)] = run
        stop(app, _tab(request))
        views = handlers.battle(arena, _tab(request), prompt or "", _client(arena, request), user_of(request))
        async with contextlib.aclosing(views):
            async for view in views:
                yield view.as_dict() | {"run": run}

    async def on_vote(shown: dict[str, Any]) -> dict[str, Any]:
        given = [shown.get(name) for name in ("battle", "choice", "first_read", "second_read")]
        try:
            return shown | {"phase": "voted", "result": await handlers.vote(arena, *given)}
        except InputError as error:
            return shown | {"phase": "failed", "status": f"This vote was not taken: the {error}."}

    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "multiple"}
    at_once = max(1, app.manager.backend.capacity // 2)
    limits: dict[str, Any] = {"concurrency_limit": at_once, "concurrency_id": "battles"}
    battle.submit(on_battle, [battle, prompt], battle, **hidden, **limits)
    battle.like(on_vote, battle, battle, queue=False, **hidden)
    page.load(None, None, None, js=f"() => {{ document.title = {json.dumps(TITLE)}; }}")  # Gradio has set the other's


def _add_endpoints(arena: Arena) -> None:
    """Add the public endpoints, typed, for Gradio's clients in Python and JavaScript."""

    async def arena_battle(
        request: gr.Request, prompt: str, seed: int | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        views = handlers.battle(arena, _tab(request), prompt, _client(arena, request), user_of(request), seed)
        async with contextlib.aclosing(views):
            async for view in views:
                if view.phase == "failed":
                    raise gr.Error(view.status, print_exception=False)
                yield {"first": view.first, "second": view.second, "battle": view.battle, "needed": view.needed}

    async def arena_vote(
        battle: str, choice: str, first_read: float | None = None, second_read: float | None = None
    ) -> dict[str, Any]:
        try:
            return await handlers.vote(arena, battle, choice, first_read, second_read)
        except StoryError as error:
            raise gr.Error(str(error), print_exception=False) from None

    async def arena_scores() -> dict[str, Any]:
        return await handlers.scores(arena)

    arena_battle.__annotations__["return"] = dict  # Gradio describes by it what is yielded
    arena_vote.__annotations__["return"] = arena_scores.__annotations__["return"] = dict
    at_once = max(1, arena.app.manager.backend.capacity // 2)
    api(
        arena_battle,
        api_name="arena_battle",
        api_description="Let two contestants of the arena, who stay hidden, write from `prompt` with one seed. Yields "
        "the growing stories `first` and `second`, and at the end the key of the `battle` and the seconds `needed` to "
        "read both.",
        concurrency_limit=at_once,
        concurrency_id="battles",
    )
    api(
        arena_vote,
        api_name="arena_vote",
        api_description="Vote on a `battle`, once. choice: first, second, alike or both bad. first_read, second_read: "
        "seconds after which the end of each story had been read; a vote without them, or too fast, is kept and not "
        "counted. Returns the contestants' `names`, whether it is `counted`, `why` not, and the `scores`.",
    )
    api(
        arena_scores,
        api_name="arena_scores",
        api_description="The scores of the arena's contestants by all votes that count: win rates with intervals, the "
        "best lower bound first.",
    )


def _tab(request: gr.Request) -> str:
    return request.session_hash or ""


def _client(arena: Arena, request: gr.Request) -> str:
    return arena.app.manager.client_of({} if request.request is None else request.request.scope)
