"""One backend of several versions: who gets which, what is noted of each story, and what is not told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from demo import handlers
from demo.app import serve
from demo.form import Form
from demo.handlers import Desk
from demo.page import build
from demo.routing.split import Arm, SplitBackend
from experiments.ab.assignment import parse_split, without_test
from experiments.ab.events import hashed
from experiments.ab.recorder import Recorder
from experiments.ab.store import connect, endings, exposures, ratings
from model.errors import BusyError, StoryError
from model.generation import GenerationRequest
from model.serving.backend import Backend, ModelInfo, model_for
from tests.demo.engines import local_backend
from tests.demo.scripted import ScriptedBackend, busy

ADDRESS = "sqlite:///stories.db"


def split(*backends: Backend, keeps_prompts: bool = False) -> SplitBackend:
    """Arms a, b … of equal shares over these backends, or the usual one alone."""
    recorder = Recorder(ADDRESS, period=0.02, keeps_prompts=keeps_prompts, salt="s")
    if len(backends) == 1:
        return SplitBackend(without_test("t"), [Arm("default", backends[0])], recorder)
    names = "abcdefgh"[: len(backends)]
    arms = [Arm(name, backend) for name, backend in zip(names, backends, strict=True)]
    return SplitBackend(parse_split(",".join(f"{name}:1" for name in names), "t"), arms, recorder)


def two(**options: Any) -> tuple[SplitBackend, ScriptedBackend, ScriptedBackend]:
    a, b = ScriptedBackend("An a story.", **options), ScriptedBackend("A b story.", **options)
    a.model, b.model = ModelInfo("a", "aa" * 32), ModelInfo("b", "bb" * 32)
    return split(a, b), a, b


def visitor_of(backend: SplitBackend, arm: str) -> str:
    return next(f"v{n}" for n in range(100) if backend.split.assign(f"v{n}") == arm)


def rows(table: sa.Table) -> list[Any]:
    with connect(ADDRESS, writes=False).connect() as connection:
        return list(connection.execute(sa.select(table).order_by(table.c.id)))


async def told(backend: Backend, request: GenerationRequest) -> str:
    stream = await backend.submit(request)
    return "".join([piece.text async for piece in stream])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_visitor_always_gets_the_same_version_and_another_process_gives_the_same() -> None:
    backend, *_ = two()
    again, *_ = two()
    async with backend.running(), again.running():
        for arm, story in (("a", "An a story."), ("b", "A b story.")):
            visitor = visitor_of(backend, arm)
            request = GenerationRequest(prompt="x", user=visitor)
            assert {await told(backend, request) for _ in range(3)} == {story}
            assert await told(again, request) == story
            assert model_for(backend, visitor).name == arm


async def test_each_story_is_noted_with_how_it_ended() -> None:
    backend, *_ = two()
    async with backend.running():
        await told(backend, GenerationRequest(prompt="x", user=visitor_of(backend, "b"), story_id="s1"))
    (exposure,), (ending,) = rows(exposures), rows(endings)
    assert (exposure.story, exposure.test, exposure.split, exposure.variant) == ("s1", "t", "a:1,b:1", "b")
    assert (exposure.digest, exposure.prompt) == ("bb" * 32, None)
    assert exposure.user_hash == hashed(visitor_of(backend, "b"), "s")
    assert (ending.story, ending.outcome, ending.tokens, ending.served_by) == (
        "s1",
        "finished",
        3,
        "scripted",
    )
    assert ending.ttft == pytest.approx(0.012)
    assert ending.rate == pytest.approx(1000)


@pytest.mark.parametrize("finish", ["length", "error"])
async def test_other_endings_are_told_apart(finish: Any) -> None:
    backend = split(ScriptedBackend("A story.", finish=finish))
    async with backend.running():
        await told(backend, GenerationRequest(prompt="x"))
    assert [row.outcome for row in rows(endings)] == [{"length": "length", "error": "failed"}[finish]]


@pytest.mark.parametrize(("error", "outcome"), [(busy(), "refused"), (StoryError("no ink"), "failed")])
async def test_a_story_that_never_began_is_noted_and_its_error_passed_on(
    error: StoryError, outcome: str
) -> None:
    backend = split(ScriptedBackend("", fail=error))
    async with backend.running():
        with pytest.raises(type(error)):
            await backend.submit(GenerationRequest(prompt="x"))
    assert [row.outcome for row in rows(endings)] == [outcome]
    assert len(rows(exposures)) == 1, "its visitor was dealt all the same"
    assert isinstance(busy(), BusyError)


async def test_a_stop_a_closed_tab_and_a_shutdown_are_noted_once_each() -> None:
    backend = split(local_backend(slots=4, step_seconds=0.005, end_bias=-50))
    desk = Desk.of(backend)
    async with backend.running():
        stopped = handlers.write(desk, "one", Form(max_tokens=1000), visitor="rose")
        async for view in stopped:
            if view.told and desk.streams:
                handlers.stop(desk, "one")
        async with contextlib.aclosing(
            handlers.write(desk, "two", Form(max_tokens=1000), visitor="tim")
        ) as views:
            async for view in views:
                if view.told:
                    break
        await until(lambda: backend.recorder.tally().written == 4)
        stream = await backend.submit(GenerationRequest(prompt="", max_tokens=1000, story_id="aborted"))

        async def read() -> None:
            async for _ in stream:
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.05)
    await reading
    assert [row.outcome for row in rows(endings)] == ["stopped", "stopped", "aborted"]
    assert all(row.tokens > 0 for row in rows(endings))


async def test_a_reader_likes_changes_her_mind_and_takes_it_back() -> None:
    backend = split(ScriptedBackend("A story."))
    desk = Desk.of(backend)
    async with backend.running():
        views = [view async for view in handlers.write(desk, "me", Form(prompt="x"), visitor="rose")]
        assert [handlers.buttons(view).rate for view in views[:1]] == [False]
        assert handlers.buttons(views[-1]).rate
        liked = handlers.rate(desk, views[-1], 1)
        disliked = handlers.rate(desk, liked, -1)
        back = handlers.rate(desk, disliked, -1)
        assert [view.rating for view in (liked, disliked, back)] == [1, -1, 0]
        assert (liked.spoken, back.spoken) == ("Noted: you like it.", "Taken back.")
        assert handlers.rate(desk, views[0], 1) is views[0], "a story that is not told yet has no verdict"
    assert [row.rating for row in rows(ratings)] == [1, -1, 0]
    assert {row.story for row in rows(ratings)} == {rows(exposures)[0].story} == {views[-1].story}


async def test_going_on_with_a_story_is_the_same_story_and_keeps_its_verdict() -> None:
    backend = split(ScriptedBackend("A story.", finish="length"))
    desk = Desk.of(backend)
    async with backend.running():
        first = [view async for view in handlers.write(desk, "me", Form(prompt="x"), visitor="rose")][-1]
        liked = handlers.rate(desk, first, 1)
        later = [view async for view in handlers.resume(desk, "me", Form(), liked, visitor="rose")][-1]
    assert (later.story, later.rating) == (first.story, 1)
    assert len(rows(exposures)) == 1
    assert [row.story for row in rows(endings)] == [first.story] * 2


async def test_a_new_story_has_no_verdict_yet() -> None:
    backend = split(ScriptedBackend("A story."))
    desk = Desk.of(backend)
    async with backend.running():
        for _ in range(2):
            view = [view async for view in handlers.write(desk, "me", Form(prompt="x"), visitor="rose")][-1]
            assert view.rating == 0
            handlers.rate(desk, view, 1)
    assert len({row.story for row in rows(ratings)}) == 2


async def test_prompts_are_kept_only_where_that_is_switched_on() -> None:
    backend = split(ScriptedBackend("A story."), keeps_prompts=True)
    async with backend.running():
        await told(backend, GenerationRequest(prompt="My secret fox"))
    assert rows(exposures)[0].prompt == "My secret fox"


async def test_a_link_carries_the_version_that_really_wrote() -> None:
    backend, *_ = two()
    async with backend.running():
        visitor = visitor_of(backend, "b")
        view = [
            view async for view in handlers.write(Desk.of(backend), "me", Form(prompt="x"), visitor=visitor)
        ][-1]
    assert "model=bbbbbbbbbbbb" in view.link


def test_a_failing_database_harms_no_story(tmp_path: Any) -> None:
    (tmp_path / "stories.db").mkdir()
    with serve(split(ScriptedBackend("A story."))) as served:
        began = time.perf_counter()
        answer = httpx.post(f"{served.url}api/generate", json={"prompt": "x"})
        assert answer.json()["text"] == "A story."
        assert time.perf_counter() - began < 3
        assert "story_events_waiting 2.0" in httpx.get(f"{served.url}metrics").text


def test_programs_take_part_by_the_name_of_their_user_and_are_told_who_wrote() -> None:
    backend, *_ = two()
    with serve(backend) as served, httpx.Client(base_url=served.url) as client:
        for arm in ("a", "b"):
            user = visitor_of(backend, arm)
            simple = client.post("/api/generate", json={"prompt": "x", "user": user}).json()
            assert (simple["text"].split()[1], simple["version"]) == (arm, arm * 64)
            body = {"prompt": "x", "user": user, "n": 2}
            choices = client.post("/v1/completions", json=body).json()
            assert {choice["text"].split()[1] for choice in choices["choices"]} == {arm}
            assert choices["system_fingerprint"] == arm * 12
        names = {client.post("/api/generate", json={"prompt": "x"}).json()["version"] for _ in range(30)}
        assert names == {"a" * 64, "b" * 64}, "without a user each story is somebody new"
        long = client.post("/api/generate", json={"prompt": "x", "user": "u" * 201})
        assert (long.status_code, long.json()["error"]["param"]) == (422, "user")
        health, figures = client.get("/api/health").json(), client.get("/metrics").text
    assert health["status"] == "ok"
    assert health["model"]["name"] == "one of 2 versions that are being compared"
    for private in ("a" * 64, "b" * 64, "a:1", 'arm="'):
        assert private not in str(health) + figures
    assert {row.user_hash for row in rows(exposures)} >= {
        hashed(visitor_of(backend, arm), "s") for arm in "ab"
    }


async def test_it_is_ready_only_while_each_version_is() -> None:
    backend, a, b = two()
    assert backend.health().ready
    b.fail = StoryError("no ink")
    assert not backend.health().ready
    assert backend.health().detail == "a version under test: scripted"
    engines = split(local_backend(slots=2, queue=1), local_backend(slots=3, queue=2))
    stats = engines.health().engine
    assert stats is not None
    assert (stats.slots, stats.queue_limit, engines.capacity) == (5, 3, 8)
    assert a.fail is None


def test_the_page_asks_only_where_verdicts_are_kept_and_names_no_version() -> None:
    def visible(backend: Backend) -> bool:
        blocks = build(backend).blocks.values()
        return bool(next(block for block in blocks if getattr(block, "elem_id", None) == "verdict").visible)

    backend, *_ = two()
    assert visible(backend)
    assert visible(split(ScriptedBackend("A story.")))
    assert not visible(ScriptedBackend("A story."))
