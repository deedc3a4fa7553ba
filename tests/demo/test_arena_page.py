"""The page Arena as Gradio serves it, and its endpoints with Gradio's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from gradio_client.exceptions import AppError

from demo import arena_handlers, page, theme
from demo.arena_handlers import UNSEEN
from demo.arena_page import PATH
from experiments.arena.contestants import Contestant
from model.serving.session import GenerationManager
from tests.demo.engines import local_backend
from tests.demo.served import Served, serve
from tests.demo.test_arena_handlers import routing_of
from tests.demo.test_endpoints import connected

pytestmark = pytest.mark.filterwarnings(
    # Gradio 6.31 on pandas 3, at the end of each event: as errors they would break the server's queue.
    "ignore:'future.no_silent_downcasting' is deprecated",
    "ignore:The copy keyword is deprecated",
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    contestants = (Contestant(model="default"), Contestant(model="default", temperature=0.5))
    backend = local_backend(slots=4, step_seconds=0.002)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(arena_handlers, "pair", lambda contestants: contestants[:2])
        with serve(routing_of(contestants=contestants, default=backend)) as running:
            yield running


def test_a_program_fights_votes_and_reads_the_scores(served: Served) -> None:
    with connected(served.url) as client:
        named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
        assert set(named) >= {"/write", "/arena_battle", "/arena_vote", "/arena_scores"}
        parts = list(client.submit("One day", seed=5, api_name="/arena_battle"))
        last = parts[-1]
        assert all(last["first"].startswith(part["first"]) for part in parts)
        assert last["battle"]
        assert last["first"] != last["second"]
        result = client.predict(last["battle"], "first", api_name="/arena_vote")
        assert (result["names"], result["counted"], result["why"]) == (
            ["default", "default, temperature 0.5"],
            False,
            UNSEEN,
        )
        assert client.predict(api_name="/arena_scores")["notes"] == ["No vote counts yet."]
        with pytest.raises(AppError, match="battle is not open"):
            client.predict(last["battle"], "first", api_name="/arena_vote")
        with pytest.raises(AppError, match="A prompt is needed"):
            client.predict("", api_name="/arena_battle")


def test_no_template_is_ever_filled_with_text_and_the_pages_own_events_are_private(tmp_path: Path) -> None:
    # Gradio runs a filled template as JavaScript: see `demo.page`.
    blocks = page.build(GenerationManager(routing_of()))
    (part,) = [block for block in blocks.blocks.values() if getattr(block, "elem_id", None) == "arena"]
    assert isinstance(part, gr.HTML)
    assert "{" not in (part.html_template or "{")
    assert "innerHTML" not in theme.asset("arena.js")
    ours = [fn for fn in blocks.fns.values() if fn.page == PATH and fn.fn is not None]
    public = {fn.name for fn in ours if fn.api_visibility == "public"}
    assert public == {"arena_battle", "arena_vote", "arena_scores"}
    assert {fn.name for fn in ours} - public == {"on_battle", "on_vote"}
