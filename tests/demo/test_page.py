"""The layout as Gradio will serve it: limits are set, fields agree, nothing could run a story."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pytest

from demo import page
from demo.form import FIELDS, LABELS, read_form
from model.serving.backend import ModelInfo
from model.serving.session import GenerationManager
from tests.demo.scripted import ScriptedBackend, state_of

USUAL = (400, 0.7, 0.95, 0, 0.0, 1.0, "", "any", "any", "any")
"""What stands in the fields between prompt and seed."""


@pytest.fixture(scope="module")
def blocks() -> gr.Blocks:
    return page.build(GenerationManager(ScriptedBackend("A story.")))


def events(blocks: gr.Blocks, name: str) -> list[Any]:
    return [fn for fn in blocks.fns.values() if fn.name == name]


def test_stories_share_one_stated_limit_and_the_queue_is_bounded(blocks: gr.Blocks) -> None:
    (generating,) = events(blocks, "on_story")
    assert generating.concurrency_limit == ScriptedBackend.capacity
    assert blocks._queue.max_size == ScriptedBackend.capacity + page.QUEUE_MARGIN


def test_endpoints_of_the_page_are_public_and_no_event_is(blocks: gr.Blocks) -> None:
    ours = [fn for fn in blocks.fns.values() if fn.fn is not None and fn.page == ""]
    public = [fn.api_name for fn in ours if fn.api_visibility != "private"]
    assert public == ["write", "continue", "alternatives", "futures"]


def test_a_storys_inputs_are_the_view_and_the_forms_fields_in_order(blocks: gr.Blocks) -> None:
    (generating,) = events(blocks, "on_story")
    ids = [label.lower().replace(" ", "-") for label in LABELS.values()]
    assert [component.elem_id for component in generating.inputs] == ["book", *ids]
    assert tuple(LABELS) == FIELDS


def test_no_template_is_ever_filled_with_text(blocks: gr.Blocks) -> None:
    # Gradio runs a filled template as JavaScript: see the module's docstring.
    book = next(block for block in blocks.blocks.values() if getattr(block, "elem_id", None) == "book")
    assert isinstance(book, gr.HTML)
    assert "{" not in book.html_template
    assert "innerHTML" not in (book.js_on_load or "innerHTML")


def test_a_models_name_cannot_bring_markup_along() -> None:
    backend = ScriptedBackend("A story.")
    backend.model = ModelInfo(name="<b>&", version="ab" * 32)
    assert "<b>" not in page._colophon(state_of(backend))
    assert "&lt;b&gt;&amp;" in page._colophon(state_of(backend))


def test_the_page_names_alias_version_and_digest_of_what_serves_now() -> None:
    backend = ScriptedBackend("A story.")
    backend.model = ModelInfo(name="story-writer 3", version="ab" * 32, number=3, alias="champion")
    blocks = page.build(state_of(backend).manager)
    load = [fn for fn in blocks.fns.values() if any(target[1] == "load" for target in fn.targets)]
    shown = [fn for fn in load if [getattr(each, "elem_id", None) for each in fn.outputs] == ["colophon"]]
    backend.model = ModelInfo(name="story-writer 4", version="cd" * 32, number=4, alias="champion")
    assert [fn.fn() for fn in shown if fn.fn] == [
        "<p>Written by story-writer 4, the champion, digest <code>cdcdcdcdcdcd</code>. "
        "Stories are invented and may be odd.</p>"
    ]


def test_no_example_ends_in_a_space_and_each_can_be_written() -> None:
    for beginning in page.EXAMPLES.values():
        assert beginning == beginning.strip()
        read_form(beginning, *USUAL, 1).request()


@pytest.mark.parametrize(
    ("typed", "seed"), [("", None), (" ", None), (None, None), ("7", 7), (" 12 ", 12), (3, 3), ("-5", -5)]
)
def test_a_seed_is_typed_or_left_empty(typed: Any, seed: int | None) -> None:
    assert read_form("Hi", *USUAL, typed).seed == seed


@pytest.mark.parametrize("typed", ["seven", "1.5", "1e3", "-5", "9" * 30])
def test_what_is_no_seed_is_refused_by_name(typed: str) -> None:
    problems = read_form("Hi", *USUAL, typed).problems()
    assert list(problems) == ["Seed"]
    assert problems["Seed"].startswith("Seed must be a whole number")
