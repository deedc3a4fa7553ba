"""Battles, votes and scores of the arena, called as the page calls them, over a real SQLite database."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from demo import arena_handlers
from demo.arena_handlers import FAST, OPEN, UNSEEN, Arena, View, battle, pair, scores, spelled, vote
from demo.handlers import stop
from demo.routing import RoutingBackend, open_variants
from experiments.ab.assignment import without_test
from experiments.ab.events import hashed
from experiments.ab.recorder import Recorder
from experiments.ab.store import connect, exposures, migrate
from experiments.arena.contestants import Contestant, parse_contestants
from experiments.arena.votes import REPEATED, read_votes
from model.errors import InputError
from model.generation import choice_seed
from model.serving.backend import Backend, ModelInfo
from model.settings import Settings
from tests.demo.engines import local_backend
from tests.demo.scripted import ScriptedBackend, busy, state_of
from tests.demo.test_routing import until

ADDRESS = "sqlite:///stories.db"
COLD, HOT = parse_contestants("default?temperature=0.2, other?temperature=1.2")


def routing_of(*, contestants: tuple[Contestant, ...] = (COLD, HOT), **backends: Backend) -> RoutingBackend:
    default = backends.pop("default", ScriptedBackend(" a b c."))
    backends.setdefault("other", ScriptedBackend(" d e f g."))
    recorder = Recorder(ADDRESS, period=0.02, salt="s")
    return RoutingBackend(without_test("t"), {"default": default}, recorder, contestants=contestants, others=backends)


def arena_of(routing: RoutingBackend) -> Arena:
    arena = Arena.of(state_of(routing))
    assert arena is not None
    return arena


@pytest.fixture
async def arena() -> AsyncIterator[Arena]:
    migrate(connect(ADDRESS, writes=True))
    made = arena_of(routing_of())
    async with made.routing.running():
        yield made


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contestants in the order in which they are configured."""
    monkeypatch.setattr(arena_handlers, "pair", lambda contestants: contestants[:2])


async def fight(arena: Arena, prompt: str = "One day", user: str = "lily", **given: Any) -> View:
    """The last view of a battle, all of whose stories can have been read."""
    views = [view async for view in battle(arena, "tab", prompt, user=user, **given)]
    assert views[-1].phase == "reading", views[-1].status
    begun = arena.open[views[-1].battle]
    assert begun.began is not None
    begun.began -= 60
    return views[-1]


@pytest.mark.usefixtures("sides")
async def test_both_write_with_one_seed_and_their_own_settings_and_nobody_is_named(arena: Arena) -> None:
    views = [view async for view in battle(arena, "tab", "One day ", seed=7)]
    assert (views[0].phase, views[-1].phase) == ("waiting", "reading")
    last = views[-1]
    assert (last.prompt, last.first, last.second) == ("One day", " a b c.", " d e f g.")
    assert last.needed == pytest.approx(7 / 15)
    requests = [
        backend.streams[0].request
        for backend in arena.routing.backends.values()
        if isinstance(backend, ScriptedBackend)
    ]
    assert [request.sampling for request in requests] == [COLD.sampling(7), HOT.sampling(7)]
    assert all(word not in repr(views) for word in ("default", "other", "temperature"))


@pytest.mark.usefixtures("sides")
async def test_a_vote_is_stored_with_everything_and_tells_who_wrote(arena: Arena) -> None:
    last = await fight(arena, seed=7)
    result = await vote(arena, last.battle, "second", 21.5, 30)
    assert result["names"] == ["default, temperature 0.2", "other, temperature 1.2"]
    assert (result["counted"], result["why"]) == (True, "")
    assert [row["name"] for row in result["scores"]["contestants"]] == result["names"][::-1]
    assert result["scores"]["battles"] == 1, "a vote that is still to be stored is among them"
    await until(lambda: arena.routing.recorder.tally().written == 1)
    (kept,) = read_votes(ADDRESS)
    assert (kept.key, kept.choice, kept.seed, kept.fault) == (last.battle, "second", 7, "")
    assert (kept.first_digest, kept.second_settings) == ("5eed" * 16, HOT.settings)
    assert (kept.first_words, kept.second_words, kept.first_read, kept.second_read) == (3, 4, 21.5, 30)
    assert kept.second_story == hashlib.sha256(b" d e f g.").hexdigest()
    assert kept.prompt_digest == hashlib.sha256(b"One day").hexdigest()
    assert (kept.user_hash, kept.prompt) == (hashed("lily", "s"), None)
    assert kept.seconds > 60
    assert await scores(arena) == result["scores"]
    with connect(ADDRESS, writes=False).connect() as connection:
        assert connection.execute(exposures.select()).all() == [], "it is no story of an A/B test"


@pytest.mark.parametrize(
    ("began", "reads", "fault"),
    [(60, (1, None), UNSEEN), (60, (None, None), UNSEEN), (0, (1, 1), FAST), (60, (1, 1), "")],
)
@pytest.mark.usefixtures("sides")
async def test_a_vote_before_both_could_be_read_is_kept_and_not_counted(
    arena: Arena, began: float, reads: tuple[Any, Any], fault: str
) -> None:
    last = await fight(arena)
    made = arena.open[last.battle]
    assert made.began is not None
    made.began += 60 - began
    result = await vote(arena, last.battle, "first", *reads)
    assert (result["counted"], result["why"]) == (not fault, fault)
    assert result["scores"]["battles"] == int(not fault)
    await until(lambda: arena.routing.recorder.tally().written == 1)
    assert [kept.fault for kept in read_votes(ADDRESS)] == [fault]


@pytest.mark.usefixtures("sides")
async def test_a_second_vote_of_a_user_on_a_prompt_and_pair_does_not_count(arena: Arena) -> None:
    results: list[dict[str, Any]] = []
    for prompt, user in (("One day", "lily"), ("One day", "lily"), ("One day", "rose"), ("Another", "lily")):
        last = await fight(arena, prompt, user)
        results.append(await vote(arena, last.battle, "alike", 9, 9))
        await until(lambda: arena.routing.recorder.tally().written == len(results))
    assert [result["why"] for result in results] == ["", REPEATED, "", ""]
    assert results[-1]["scores"]["battles"] == 3


@pytest.mark.usefixtures("sides")
async def test_a_battle_has_one_vote_and_only_a_choice_that_there_is(arena: Arena) -> None:
    last = await fight(arena)
    for choice in ("third", None, ["first"]):
        with pytest.raises(InputError, match="choice must be one of first, second, alike, both bad"):
            await vote(arena, last.battle, choice, 9, 9)
    for read in (-1, float("nan"), "9", True):
        with pytest.raises(InputError, match="second_read must be a number of seconds"):
            await vote(arena, last.battle, "first", 9, read)
    await vote(arena, last.battle, "first", 9, 9)
    unknown: list[object] = [last.battle, "unknown", None, []]
    for key in unknown:
        with pytest.raises(InputError, match="battle is not open"):
            await vote(arena, key, "first", 9, 9)


async def test_against_itself_the_stories_differ_and_nobody_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_handlers, "pair", lambda contestants: (contestants[0], contestants[0]))
    backend = ScriptedBackend(" a b c.")
    arena = arena_of(routing_of(default=backend))
    async with arena.routing.running():
        last = await fight(arena, seed=7)
        result = await vote(arena, last.battle, "first", 9, 9)
    assert [stream.request.sampling.seed for stream in backend.streams] == [7, choice_seed(7, 1)]
    assert result["names"][0] == result["names"][1]
    assert (result["scores"]["battles"], result["scores"]["contestants"][0]["battles"]) == (0, 0)
    assert any("with itself, the left story won 100.0 %" in note for note in result["scores"]["notes"])


def test_sides_are_drawn_and_one_battle_of_ten_is_against_itself() -> None:
    drawn = [pair((COLD, HOT)) for _ in range(2_000)]
    itself = sum(first == second for first, second in drawn)
    assert 130 < itself < 270  # 200 expected: beyond five standard deviations
    left = sum(first == COLD for first, second in drawn if first != second)
    assert abs(left - (2_000 - itself) / 2) < 110


@pytest.mark.usefixtures("sides")
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "A prompt is needed: type one or press one."),
        ("x" * 20_001, "Prompt must have at most 20000 characters"),
        ("One day", "All places are taken and the queue is full. Please try again in about 3 seconds."),
    ],
)
async def test_what_cannot_be_written_is_said_in_words(prompt: str, said: str) -> None:
    arena = arena_of(routing_of(other=ScriptedBackend("", fail=busy())))
    async with arena.routing.running():
        views = [view async for view in battle(arena, "tab", prompt)]
    assert views[-1].phase == "failed"
    assert said in views[-1].status
    assert (arena.open, arena.app.sessions, arena.app.manager.open) == ({}, {}, 0)


async def test_a_tab_that_is_left_ends_both_streams_and_leaves_no_battle() -> None:
    backend = local_backend(slots=2, step_seconds=0.01, end_bias=-50)
    arena = arena_of(routing_of(contestants=(COLD, Contestant(model="default")), default=backend))
    async with arena.routing.running():
        views = battle(arena, "tab", "One day")
        async for view in views:
            if view.first and view.second:
                stop(arena.app, "tab")
        assert not arena.open
        async with contextlib.aclosing(battle(arena, "tab", "One day")) as views:
            async for view in views:
                if view.first:
                    break
        await until(lambda: backend.engine.stats().active == 0)


@pytest.mark.usefixtures("sides")
async def test_only_so_many_battles_wait_for_their_vote(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OPEN >= 100
    monkeypatch.setattr(arena_handlers, "OPEN", 2)
    keys = [(await fight(arena)).battle for _ in range(3)]
    assert list(arena.open) == keys[1:]


@pytest.mark.usefixtures("sides")
async def test_where_the_database_cannot_be_read_names_are_told_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_text("this is no database" * 100)
    arena = arena_of(routing_of())
    async with arena.routing.running():
        last = await fight(arena)
        arena.routing.recorder.url = f"sqlite:///{tmp_path}/bad.db"
        result = await vote(arena, last.battle, "first", 9, 9)
    assert result["names"] == ["default, temperature 0.2", "other, temperature 1.2"]
    assert result["scores"]["notes"] == ["The scores cannot be read for now."]


def test_a_name_is_written_as_people_read_it() -> None:
    assert spelled("champion?temperature=0.5&words=cat+dog") == "champion, temperature 0.5, words cat dog"
    assert spelled("champion?temperature=1 (5eed5eed, temperature=1)") == (
        "champion, temperature 1 (5eed5eed, temperature=1)"
    )


def test_without_contestants_or_a_record_there_is_no_arena() -> None:
    assert Arena.of(state_of(ScriptedBackend("A story."))) is None
    assert Arena.of(state_of(routing_of(contestants=()))) is None


def test_contestants_are_loaded_once_and_share_the_backends_of_variants() -> None:
    made: list[ScriptedBackend] = []

    def default() -> Backend:
        made.append(ScriptedBackend("A story."))
        return made[-1]

    routing = open_variants(default, Settings())
    assert isinstance(routing, RoutingBackend)
    assert (len(made), set(routing.backends)) == (1, {"default"})
    assert [str(each) for each in routing.contestants] == ["default?temperature=0.85", "default?temperature=0.5"]
    off = open_variants(default, Settings(story_arena="off"))
    assert isinstance(off, RoutingBackend)
    assert off.contestants == ()
    with pytest.raises(InputError, match="STORY_ARENA names the variant 'nobody'"):
        open_variants(default, Settings(story_arena="default, nobody"))
    with pytest.raises(InputError, match="STORY_ARENA needs STORY_FEEDBACK"):
        open_variants(default, Settings(story_arena="default, pretrained", story_feedback=False))


async def test_a_contestant_of_another_model_is_no_variant_of_the_test() -> None:
    other = ScriptedBackend("")
    other.model = ModelInfo("b", "bb" * 32)
    routing = routing_of(other=other)
    assert (routing.compares, routing.name, routing.capacity) == (False, "scripted", ScriptedBackend.capacity)
