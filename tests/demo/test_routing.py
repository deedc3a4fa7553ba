"""A backend of several variants: which one serves a user, what is recorded of each story, and what is not shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from demo import handlers, inside_handlers
from demo.form import Form
from demo.handlers import View
from demo.page import build
from demo.routing import RoutingBackend, open_variants
from demo.steering import Caller
from demo.tree import regrown
from experiments.ab.assignment import parse_split, without_test
from experiments.ab.events import hashed
from experiments.ab.recorder import Recorder
from experiments.ab.store import connect, endings, exposures, ratings
from model.architecture.folder import PRETRAINED
from model.errors import BusyError, GenerationError, InputError, MissingExtraError, ModelError, StoryError
from model.generation import GenerationRequest
from model.serving.backend import Backend, LocalBackend, ModelInfo, model_for
from model.serving.deployments import open_deployments
from model.serving.remote.modal import ModalBackend
from model.serving.session import GenerationManager
from model.settings import Settings
from tests.demo.engines import local_backend
from tests.demo.scripted import ScriptedBackend, busy, state_of
from tests.demo.served import serve

ADDRESS = "sqlite:///stories.db"


def split(*backends: Backend, keeps_prompts: bool = False) -> RoutingBackend:
    """Variants a, b … of equal weight over these backends, or the default one alone."""
    recorder = Recorder(ADDRESS, period=0.02, keeps_prompts=keeps_prompts, salt="s")
    if len(backends) == 1:
        return RoutingBackend(without_test("t"), {"default": backends[0]}, recorder)
    names = "abcdefgh"[: len(backends)]
    variants = dict(zip(names, backends, strict=True))
    return RoutingBackend(parse_split(",".join(f"{name}:1" for name in names), "t"), variants, recorder)


def two(**options: Any) -> tuple[RoutingBackend, ScriptedBackend, ScriptedBackend]:
    a, b = ScriptedBackend("An a story.", **options), ScriptedBackend("A b story.", **options)
    a.model, b.model = ModelInfo("a", "aa" * 32), ModelInfo("b", "bb" * 32)
    return split(a, b), a, b


def user_of(backend: RoutingBackend, variant: str) -> str:
    return next(f"v{n}" for n in range(100) if backend.split.assign(f"v{n}") == variant)


def rows(table: sa.Table) -> list[Any]:
    with connect(ADDRESS, writes=False).connect() as connection:
        return list(connection.execute(sa.select(table).order_by(table.c.id)))


async def generate(backend: Backend, request: GenerationRequest) -> str:
    async with GenerationManager(backend).session([request]) as session:
        events = [event async for event in session.events(60)]
    return "".join(event.chunk.text for event in events if event is not None and event.chunk is not None)


async def every(views: AsyncGenerator[View, None]) -> list[View]:
    return [view async for view in views]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_user_always_gets_the_same_version_and_another_process_gives_the_same() -> None:
    backend, *_ = two()
    again, *_ = two()
    async with backend.running(), again.running():
        for variant, story in (("a", "An a story."), ("b", "A b story.")):
            user = user_of(backend, variant)
            request = GenerationRequest(prompt="x", user=user)
            assert {await generate(backend, request) for _ in range(3)} == {story}
            assert await generate(again, request) == story
            assert model_for(backend, user).name == variant


async def test_each_story_is_noted_with_how_it_ended() -> None:
    backend, *_ = two()
    async with backend.running():
        await generate(backend, GenerationRequest(prompt="x", user=user_of(backend, "b"), story_id="s1"))
    (exposure,), (ending,) = rows(exposures), rows(endings)
    assert (exposure.story, exposure.test, exposure.split, exposure.variant) == ("s1", "t", "a:1,b:1", "b")
    assert (exposure.digest, exposure.prompt) == ("bb" * 32, None)
    assert exposure.user_hash == hashed(user_of(backend, "b"), "s")
    assert (ending.story, ending.outcome, ending.tokens, ending.served_by) == ("s1", "finished", 3, "scripted")
    assert ending.ttft == pytest.approx(0.012)
    assert ending.rate == pytest.approx(1000)


async def test_a_look_at_a_story_goes_to_the_users_version_and_counts_for_nothing() -> None:
    a, b = local_backend(slots=4, queue=16), local_backend(slots=4, queue=16)
    backend = split(a, b)
    state, user = state_of(backend), user_of(backend, "b")
    tree = {
        "prompt": "One",
        "version": "",
        "links": ["max_tokens=6&seed=3"],
        "branches": [[-1, 0, [], 0, 0, 0]],
        "now": 0,
    }
    async with state.manager.running():
        assert "alternatives" in await handlers.look_at(state, {"prompt": "One"}, "me", user)
        assert "futures" in await handlers.look_at(state, {"prompt": "One", "futures": True}, "me", user)
        assert "word" in await handlers.look_at(state, {"prompt": "One", "roll": True}, "me", user)
        assert "branches" in await regrown(state.manager, tree, Caller("me", user))
        assert "words" in await inside_handlers.answer(state, "surprise", {"prompt": "One day"}, "me", user)
        assert (a.engine.stats().tokens, a.engine.stats().prompt_tokens) == (0, 0)
        assert b.engine.stats().prompt_tokens > 0
        await generate(backend, GenerationRequest(prompt="x", max_tokens=3, user=user, story_id="s1"))
    assert [row.story for row in rows(exposures)] == [row.story for row in rows(endings)] == ["s1"]


@pytest.mark.parametrize("finish", ["length", "error"])
async def test_other_endings_are_distinguished(finish: Any) -> None:
    backend = split(ScriptedBackend("A story.", finish=finish))
    async with backend.running():
        with contextlib.suppress(GenerationError):
            await generate(backend, GenerationRequest(prompt="x"))
    assert [row.outcome for row in rows(endings)] == [{"length": "length", "error": "failed"}[finish]]


@pytest.mark.parametrize(("error", "outcome"), [(busy(), "refused"), (StoryError("no ink"), "failed")])
async def test_a_story_that_never_began_is_noted_and_its_error_passed_on(error: StoryError, outcome: str) -> None:
    backend = split(ScriptedBackend("", fail=error))
    async with backend.running():
        with pytest.raises(type(error)):
            await generate(backend, GenerationRequest(prompt="x"))
    assert [row.outcome for row in rows(endings)] == [outcome]
    assert len(rows(exposures)) == 1, "its user was dealt all the same"
    assert isinstance(busy(), BusyError)


async def test_a_stop_a_closed_tab_and_a_shutdown_are_noted_once_each() -> None:
    backend = split(local_backend(slots=4, step_seconds=0.005, end_bias=-50))
    state = state_of(backend)
    async with state.manager.running():
        stopped = handlers.write(state, "one", Form(max_tokens=1000), user="rose")
        async for view in stopped:
            if view.generated and state.sessions:
                handlers.stop(state, "one")
        async with contextlib.aclosing(handlers.write(state, "two", Form(max_tokens=1000), user="tim")) as views:
            async for view in views:
                if view.generated:
                    break
        await until(lambda: backend.recorder.tally().written == 4)
        aborted = asyncio.create_task(every(handlers.write(state, "three", Form(max_tokens=1000))))
        await until(lambda: "three" in state.sessions and state.sessions["three"].generations[0].timer.tokens > 0)
    assert (await aborted)[-1].status.startswith("This page is being restarted")
    assert [row.outcome for row in rows(endings)] == ["stopped", "stopped", "aborted"]
    assert all(row.tokens > 0 for row in rows(endings))


async def test_a_user_likes_changes_her_mind_and_takes_it_back() -> None:
    backend = split(ScriptedBackend("A story."))
    state = state_of(backend)
    async with backend.running():
        views = [view async for view in handlers.write(state, "me", Form(prompt="x"), user="rose")]
        assert not views[0].ratable
        assert views[-1].ratable
        liked = handlers.rate(state, views[-1], 1)
        disliked = handlers.rate(state, liked, -1)
        back = handlers.rate(state, disliked, -1)
        assert [view.rating for view in (liked, disliked, back)] == [1, -1, 0]
        assert (liked.spoken, back.spoken) == ("Noted: you like it.", "Taken back.")
        assert handlers.rate(state, views[0], 1) is views[0], "a story that has not ended yet has no verdict"
        sent = View.sent({**views[-1].as_dict(), "story": "'; drop table"})
        assert handlers.rate(state, sent, 1) is sent, "a browser may send anything"
    assert [row.rating for row in rows(ratings)] == [1, -1, 0]
    assert {row.story for row in rows(ratings)} == {rows(exposures)[0].story} == {views[-1].story}


async def test_going_on_with_a_story_is_the_same_story_and_keeps_its_verdict() -> None:
    backend = split(ScriptedBackend("A story.", finish="length"))
    state = state_of(backend)
    async with backend.running():
        first = [view async for view in handlers.write(state, "me", Form(prompt="x"), user="rose")][-1]
        liked = handlers.rate(state, first, 1)
        later = [view async for view in handlers.resume(state, "me", Form(), liked, user="rose")][-1]
    assert (later.story, later.rating) == (first.story, 1)
    assert len(rows(exposures)) == 1
    assert [row.story for row in rows(endings)] == [first.story] * 2


async def test_a_new_story_has_no_verdict_yet() -> None:
    backend = split(ScriptedBackend("A story."))
    state = state_of(backend)
    async with backend.running():
        for _ in range(2):
            view = [view async for view in handlers.write(state, "me", Form(prompt="x"), user="rose")][-1]
            assert view.rating == 0
            handlers.rate(state, view, 1)
    assert len({row.story for row in rows(ratings)}) == 2


async def test_prompts_are_kept_only_where_that_is_switched_on() -> None:
    backend = split(ScriptedBackend("A story."), keeps_prompts=True)
    async with backend.running():
        await generate(backend, GenerationRequest(prompt="My secret fox"))
    assert rows(exposures)[0].prompt == "My secret fox"


async def test_a_link_carries_the_version_that_really_wrote() -> None:
    backend, *_ = two()
    async with backend.running():
        user = user_of(backend, "b")
        view = [view async for view in handlers.write(state_of(backend), "me", Form(prompt="x"), user=user)][-1]
    assert "model=bbbbbbbbbbbb" in view.link


def test_a_failing_database_harms_no_story(tmp_path: Any) -> None:
    (tmp_path / "stories.db").mkdir()
    with serve(split(ScriptedBackend("A story."))) as served:
        answer = httpx.post(f"{served.url}api/generate", json={"prompt": "x"}, timeout=None)
        assert answer.json()["text"] == "A story."
        assert "story_events_waiting 2.0" in httpx.get(f"{served.url}metrics", timeout=None).text


def test_programs_take_part_by_the_name_of_their_user_and_get_the_version_that_wrote() -> None:
    backend, *_ = two()
    with serve(backend) as served, httpx.Client(base_url=served.url, timeout=None) as client:
        for variant in ("a", "b"):
            user = user_of(backend, variant)
            simple = client.post("/api/generate", json={"prompt": "x", "user": user}).json()
            assert (simple["text"].split()[1], simple["version"]) == (variant, variant * 64)
            body = {"prompt": "x", "user": user, "n": 2}
            choices = client.post("/v1/completions", json=body).json()
            assert {choice["text"].split()[1] for choice in choices["choices"]} == {variant}
            assert choices["system_fingerprint"] == variant * 12
        names = {client.post("/api/generate", json={"prompt": "x"}).json()["version"] for _ in range(30)}
        assert names == {"a" * 64, "b" * 64}, "without a user each story is somebody new"
        long = client.post("/api/generate", json={"prompt": "x", "user": "u" * 201})
        assert (long.status_code, long.json()["error"]["param"]) == (422, "user")
        health, figures = client.get("/api/health").json(), client.get("/metrics").text
    assert health["status"] == "healthy"
    assert health["model"]["name"] == "one of 2 versions that are being compared"
    for private in ("a" * 64, "b" * 64, "a:1", 'variant="'):
        assert private not in str(health) + figures
    assert {row.user_hash for row in rows(exposures)} >= {hashed(user_of(backend, variant), "s") for variant in "ab"}


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
        blocks = build(GenerationManager(backend)).blocks.values()
        return bool(next(block for block in blocks if getattr(block, "elem_id", None) == "rating").visible)

    backend, *_ = two()
    assert visible(backend)
    assert visible(split(ScriptedBackend("A story.")))
    assert not visible(ScriptedBackend("A story."))


USUAL = ScriptedBackend("A story.")


def made(**settings: object) -> RoutingBackend:
    backend = open_variants(lambda: USUAL, Settings(**settings))  # type: ignore[arg-type]
    assert isinstance(backend, RoutingBackend)
    return backend


def test_without_a_split_the_usual_model_writes_for_everyone_and_is_noted() -> None:
    backend = made()
    assert list(backend.variants.values()) == [USUAL]
    assert (backend.name, backend.model, backend.capacity) == ("scripted", USUAL.model, USUAL.capacity)
    assert not backend.compares
    assert not Path("stories.db").exists(), "nothing is opened before it runs"


def test_with_feedback_off_nothing_is_noted_at_all() -> None:
    assert open_variants(lambda: USUAL, Settings(story_feedback=False)) is USUAL
    with pytest.raises(InputError, match="STORY_SPLIT needs STORY_FEEDBACK"):
        open_variants(lambda: USUAL, Settings(story_feedback=False, story_split="a:1"))


def test_a_folder_is_a_variant_and_a_variant_without_a_share_is_not_loaded() -> None:
    backend = made(story_split=f"default:9,{PRETRAINED}:1,not/there:0", story_slots=1, story_runtime="onnx")
    assert list(backend.variants) == ["default", str(PRETRAINED)]
    variant = backend.variants[str(PRETRAINED)]
    assert isinstance(variant, LocalBackend)
    assert len(variant.model.version) == 64


def test_the_tests_name_deals_anew() -> None:
    one = made(story_split="default:1").split
    other = made(story_split="default:1", story_split_name="spring").split
    assert (one.name, other.name) == ("stories", "spring")
    with pytest.raises(InputError, match="STORY_SPLIT_NAME must have 1 to 100 characters, got 101"):
        made(story_split="default:1", story_split_name="x" * 101)


def test_a_deployment_on_modal_is_a_variant_where_modal_is_set_up() -> None:
    settings: dict[str, object] = {
        "story_split": "blue:1,green:1",
        "modal_endpoint_url": "http://127.0.0.1:1",
        "story_deployments": "deployments.json",
    }
    with pytest.raises(InputError, match="STORY_SPLIT names the variant 'blue', and nothing proven runs there"):
        made(**settings)
    deployments = open_deployments(Settings(story_deployments="deployments.json"))
    deployments.set_deployment("blue", "http://127.0.0.1:2", "aa" * 32)
    deployments.set_deployment("green", "http://127.0.0.1:3", "bb" * 32)
    variants = made(**settings).variants
    assert [variant.model.version for variant in variants.values()] == ["aa" * 32, "bb" * 32]
    assert all(isinstance(variant, ModalBackend) for variant in variants.values())


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"story_split": "champion"}, InputError, "STORY_SPLIT must be variants with weights"),
        ({"story_split": "not/there:1"}, ModelError, "not/there is not a model folder"),
        ({"database_url": "mysql://x"}, InputError, "DATABASE_URL must be sqlite:///FILE or postgresql://"),
    ],
)
def test_what_cannot_be_is_one_line(settings: dict[str, object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        made(**settings)


def test_a_registered_version_without_mlflow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # MLflow is installed where the tests run; only its absence can be made up.
    monkeypatch.setattr("experiments.registry.resolve.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"a registered version in sqlite:///mlflow.db needs the 'train' packages"
    ):
        made(story_split="champion:1")
