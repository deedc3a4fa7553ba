"""The page Inside as Gradio serves it, and its public endpoints with Gradio's own client."""

from __future__ import annotations

import math
from collections.abc import Iterator

import gradio as gr
import httpx
import pytest
from gradio_client.exceptions import AppError

from demo import page, theme
from demo.inside_page import PATH
from model.serving.backend import LocalBackend
from model.serving.session import GenerationManager
from model.settings import Settings
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import Served, serve
from tests.demo.test_endpoints import connected

pytestmark = pytest.mark.filterwarnings(
    # Gradio 6.31 on pandas 3, at the end of each event: as errors they would break the server's queue.
    "ignore:'future.no_silent_downcasting' is deprecated",
    "ignore:The copy keyword is deprecated",
)
QUESTIONS = {"surprise", "distribution", "memory", "evidence", "layers"}
STORY = "Tom had a red kite. Tim had a blue ball."


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(LocalBackend.load(Settings(story_slots=4))) as made:
        yield made


def test_its_template_is_never_filled_with_text() -> None:
    # Gradio runs a filled template as JavaScript: see `demo.page`.
    blocks = page.build(GenerationManager(ScriptedBackend("A story.")))
    (inside,) = [block for block in blocks.blocks.values() if getattr(block, "elem_id", None) == "inside"]
    assert isinstance(inside, gr.HTML)
    assert "{" not in (inside.html_template or "{")
    assert "innerHTML" not in theme.asset("inside.js")
    ours = [fn for fn in blocks.fns.values() if fn.page == PATH and fn.fn is not None]
    assert {fn.name for fn in ours if fn.api_visibility == "public"} == QUESTIONS


def test_it_lies_beside_the_page_that_writes(served: Served) -> None:
    for place in ("", PATH):
        assert f'<a href="./{PATH}"' in httpx.get(served.url + place, timeout=None).text


def test_programs_ask_as_the_page_does(served: Served) -> None:
    with connected(served.url) as client:
        words = client.predict(STORY, api_name="/surprise")["words"]
        assert "".join(text for text, *_ in words) == STORY
        number = max(at for at, (text, *_) in enumerate(words) if text == " ball")
        rows = client.predict(STORY, number, api_name="/memory")["rows"]
        assert math.isclose(rows[-1]["bits"], words[number][2], abs_tol=1e-6)
        found = client.predict(STORY, word=number, api_name="/distribution")
        assert math.isclose(
            sum(math.exp(each[2]) for each in found["tokens"]) + sum(map(math.exp, found["tail"])), 1, abs_tol=1e-4
        )
        against = client.predict(STORY, number, " kite", api_name="/evidence")
        assert len(against["effects"]) == number
        assert {layer["kind"] for layer in client.predict(STORY, number, api_name="/layers")["layers"]} == {
            "attention",
            "recurrence",
        }
        with pytest.raises(AppError, match=f"word must be the number of a word, 0 to {len(words) - 1}, got 99"):
            client.predict(STORY, 99, api_name="/memory")
