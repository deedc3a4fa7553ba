"""Trees of links: what is written again is what was there, and whatever a stranger's link holds does no harm."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo import handlers
from demo.form import Form
from demo.handlers import AppState, View
from demo.steering import Caller
from demo.tree import MOST, read_tree, regrow, regrown
from model.errors import InputError, LimitError
from model.serving.backend import LocalBackend
from model.serving.rate_limit import Limiter, quotas_of
from model.serving.session import GenerationManager
from model.settings import Settings
from tests.demo.engines import local_backend, tokenizer
from tests.demo.test_handlers import every
from tests.model.runtimes.shared import needs_native

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=12,
)


def ids_of(words: list[list[Any]]) -> list[list[int]]:
    return [ids for _, ids, _ in words]


def tree(root: View, *rows: list[Any], links: list[str], now: int = 0) -> dict[str, Any]:
    return {"prompt": root.prompt, "version": "", "links": links, "branches": list(rows), "now": now}


@needs_native
async def test_a_tree_comes_again_with_the_same_words_from_prompt_seeds_and_where_it_parts() -> None:
    backend = LocalBackend.load(Settings(story_slots=4, story_runtime="native"))
    state = AppState(GenerationManager(backend))
    async with backend.running():
        form = Form(prompt="One sunny day, Mia", seed=3, max_tokens=120)
        root = (await every(handlers.write(state, "me", form)))[-1]
        at = len(root.words) // 3
        chosen = [[text, list(backend.engine.tokenizer.encode(text)), 0.0] for text in (" fox", " 🦊", ".", '"')]
        cut = replace(root, words=[*root.words[:at], *chosen])
        child = (await every(handlers.fork(state, "me", replace(form, temperature=1.1), cut)))[-1]
        assert child.link != root.link
        stopped = child.words[: len(child.words) - 5]
        given = tree(
            root,
            [-1, 0, [], 0, 1, int(root.phase == "ended")],
            [0, at, ids_of(chosen), 1, 0, int(child.phase == "ended")],
            [1, at + 2, ids_of(stopped[at + 2 :]), -1, 0, 0],
            links=[root.link, child.link],
            now=2,
        )
        grown = await regrow(state.manager, given, backend.model.version, Caller("another"))
    views = [each["view"] for each in grown["branches"]]
    assert grown["now"] == 2
    assert [view["generated"] for view in views[:2]] == [root.generated, child.generated]
    assert views[0]["words"] == root.words
    assert [word[:2] for word in views[1]["words"]] == [word[:2] for word in child.words]
    assert views[1]["words"][at + 4 :] == child.words[at + 4 :]
    assert [word[:2] for word in views[2]["words"]] == [word[:2] for word in stopped]
    scored = [bits for _, _, bits in views[2]["words"][at + 4 :]]
    assert scored == pytest.approx([bits for _, _, bits in stopped[at + 4 :]], abs=0.05)
    assert [each["whole"] for each in grown["branches"]] == [True, True, False]
    assert [each["hand"] for each in grown["branches"]][:2] == [0, 4]
    assert [each["star"] for each in grown["branches"]] == [True, False, False]


async def test_a_tree_counts_as_one_story_and_a_client_at_the_limit_gets_the_reason() -> None:
    backend = local_backend(slots=4, queue=8, end_bias=-50)
    manager = GenerationManager(backend, limiter=Limiter(quotas_of("1/minute", "client", "stories")))
    link = "max_tokens=6&seed=3"
    rows = [[-1, 0, [], 0, 0, 0], [0, 1, [list(tokenizer().encode(" day"))], 0, 0, 0]]
    given = {"prompt": "One", "version": "", "links": [link], "branches": rows, "now": 1}
    async with backend.running():
        grown = await regrow(manager, given, backend.model.version, Caller("me"))
        with pytest.raises(LimitError):
            await regrow(manager, given, backend.model.version, Caller("me"))
        refused = await regrown(manager, given, Caller("me"))
    first, second = [each["view"] for each in grown["branches"]]
    assert second["words"][0] == first["words"][0]
    assert second["words"][1][0] == " day"
    assert (second["phase"], second["seed"], second["status"]) == ("open", 3, "Stopped at the length you set")
    assert refused["error"].startswith("The story of this link cannot be opened: ")


@given(given=st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "links", "branches", "now", "version"), JSON)))
def test_whatever_a_link_holds_it_is_a_tree_or_refused(given: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        _, links, branches, now = read_tree(given)
        assert 0 <= now < len(branches) <= MOST
        assert all(branch.parent < number for number, branch in enumerate(branches))
        assert all(branch.link < len(links) for branch in branches)


@pytest.mark.parametrize("tokens", [[10**9], [-1], [0.5], ["a"], [True], []])
async def test_tokens_that_are_none_are_refused_in_words(tokens: list[Any]) -> None:
    backend = local_backend()
    given = {"prompt": "One", "links": [], "branches": [[-1, 0, [tokens], -1, 0, 0]], "now": 0}
    async with backend.running():
        assert "cannot be opened" in (await regrown(GenerationManager(backend), given, Caller("me")))["error"]
