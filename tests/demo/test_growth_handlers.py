"""A prompt continued by the ages of a real run in a real store, and everything that may come between."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from demo.growth_handlers import MAX_TOKENS, NO_AGED_RUN, NO_AGES, NO_RUN, RECORDED, SEED, grow_up
from experiments.dashboard.ages import KEPT, cached, keep
from experiments.dashboard.client import StoreClient
from experiments.dashboard.recorded import export_record
from experiments.dashboard.rows import run_rows
from model.engine.load import load_bare_engine
from model.generation import GenerationRequest, SamplingParams
from model.serving.rate_limit import Limiter, quotas_of
from model.serving.session import GenerationManager
from tests.demo.scripted import ScriptedBackend
from tests.experiments.dashboard.direct import DirectClient
from tests.experiments.dashboard.made import made
from training.tracking.store import open_store

PROMPT = "One day a fox"
STEPS = [0, 1, 2, 3, 4, 8, 12]
"""Of the run `learned`: see tests/training/tracking/test_ages.py."""


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def manager() -> GenerationManager:
    return GenerationManager(ScriptedBackend("Nobody asks the model that serves."))


@pytest.fixture
def run() -> str:
    rows, _ = run_rows(open_store(made().uri, read_only=True))
    return next(row.id for row in rows if row.name == "learned")


async def views(store: StoreClient, manager: GenerationManager, *asked: Any) -> list[dict[str, Any]]:
    return [view async for view in grow_up(store, manager, "me", *asked)]


async def note(store: StoreClient, manager: GenerationManager, *asked: Any) -> str:
    """That of the last view, in which alone it stands."""
    *before, last = await views(store, manager, *asked)
    assert last["done"]
    assert not any(view["note"] or view["done"] for view in before)
    return str(last["note"])


async def test_each_age_writes_what_an_engine_over_its_checkpoint_writes(
    manager: GenerationManager, run: str, tmp_path: Path
) -> None:
    found = await views(DirectClient(made().uri), manager, PROMPT + "  ", run[:8])
    assert [len(view["ages"]) for view in found] == [*range(len(STEPS) + 1), len(STEPS)], "age by age"
    assert all(later["ages"][: len(view["ages"])] == view["ages"] for view, later in pairwise(found))
    last = found[-1]
    assert (last["run"], last["prompt"], last["count"], last["note"]) == ("learned", PROMPT, len(STEPS), "")
    assert [age["step"] for age in last["ages"]] == STEPS
    client = open_store(made().uri, read_only=True)
    request = GenerationRequest(
        prompt=PROMPT, max_tokens=MAX_TOKENS, sampling=SamplingParams(seed=SEED, keep_names=False)
    )
    for age in last["ages"]:
        path = client.download_artifacts(run, f"ages/step-{age['step']:06d}", str(tmp_path))
        with load_bare_engine(Path(path)) as engine:
            alone = engine.submit(request).wait(60)
        assert (age["text"], age["ended"]) == (alone.text, alone.finish_reason == "stop")
    assert len({age["text"] for age in last["ages"]}) == len(STEPS), "no two ages write alike"


async def test_another_seed_writes_otherwise_and_the_same_one_the_same(manager: GenerationManager, run: str) -> None:
    store = DirectClient(made().uri)
    one, again, other = [(await views(store, manager, PROMPT, run, seed))[-1]["ages"] for seed in (5, 5, 6)]
    assert one == again
    assert one != other


async def test_runs_are_named_by_id_or_name_and_without_one_it_is_the_best(
    manager: GenerationManager, run: str
) -> None:
    store = DirectClient(made().uri)
    found = [(await views(store, manager, PROMPT, name))[-1]["ages"] for name in ("", "learned", run, run[:8])]
    assert found[0]
    assert all(ages == found[0] for ages in found)


async def test_one_line_says_why_there_are_no_ages(manager: GenerationManager, tmp_path: Path) -> None:
    store = DirectClient(made().uri)
    assert await note(store, manager, PROMPT, "stopped") == NO_AGES
    assert await note(store, manager, PROMPT, "no such run") == NO_RUN
    recorded = DirectClient(f"sqlite:///{tmp_path}/none.db", record=export_record(made().uri, ["learned"]))
    assert await note(recorded, manager, PROMPT, "learned") == RECORDED
    assert await note(recorded, manager, PROMPT) == NO_AGED_RUN
    assert "`story train` fills it" in await note(DirectClient(f"sqlite:///{tmp_path}/none.db"), manager, PROMPT)


@pytest.mark.parametrize(
    ("prompt", "seed", "said"),
    [
        ("", 1, "Prompt must be the beginning of a story, got nothing."),
        (" \n", 1, "Prompt must be the beginning of a story, got nothing."),
        (None, 1, "Prompt must be the beginning of a story, got nothing."),
        ("a" * 20_001, 1, "Prompt must have at most 20000 characters"),
        (PROMPT, -1, "Seed must be a whole number between 0 and"),
    ],
)
async def test_a_bad_input_is_refused_by_name(manager: GenerationManager, prompt: Any, seed: int, said: str) -> None:
    assert said in await note(DirectClient(made().uri), manager, prompt, "", seed)


async def test_the_rate_limits_count_it_as_one_story_and_by_its_tokens(run: str) -> None:
    limiter = Limiter([*quotas_of("2/minute", "client", "stories"), *quotas_of("2000/minute", "client", "tokens")])
    manager = GenerationManager(ScriptedBackend(""), limiter=limiter)
    store = DirectClient(made().uri)
    for _ in range(2):
        assert await note(store, manager, PROMPT, run) == ""
    refused = await note(store, manager, PROMPT, run)
    assert refused.startswith("You have had as many stories as there may be for now. Please try again in ")
    few = Limiter(quotas_of(f"{MAX_TOKENS * len(STEPS) - 1}/minute", "client", "tokens"))
    said = await note(store, GenerationManager(ScriptedBackend(""), limiter=few), PROMPT, run)
    assert "asks for more than the limit here allows at all" in said


async def test_who_leaves_half_way_is_charged_for_what_was_written(run: str) -> None:
    limiter = Limiter(quotas_of(f"{MAX_TOKENS * len(STEPS)}/minute", "client", "tokens"))
    manager = GenerationManager(ScriptedBackend(""), limiter=limiter)
    async with contextlib.aclosing(grow_up(DirectClient(made().uri), manager, "me", PROMPT, run)) as left:
        async for view in left:
            if len(view["ages"]) == 2:
                break
    room = GenerationRequest(prompt="", max_tokens=MAX_TOKENS * (len(STEPS) - 2))
    (await limiter.admit("me", [room])).release()  # the other five were given back


async def test_a_stop_of_the_application_comes_between_two_ages(manager: GenerationManager, run: str) -> None:
    found = []
    async for view in grow_up(DirectClient(made().uri), manager, "me", PROMPT, run):
        found.append(view)
        manager.draining = len(view["ages"]) == 2
    assert len(found[-1]["ages"]) == 2
    assert "restarted" in found[-1]["note"]
    manager.draining = True
    assert "restarted" in await note(DirectClient(made().uri), manager, PROMPT, run)


async def test_what_is_cached_is_written_and_the_rest_is_one_line_when_the_store_is_gone(
    manager: GenerationManager, run: str, tmp_path: Path
) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copy(made().uri.removeprefix("sqlite:///"), database)
    store = DirectClient(f"sqlite:///{database}")
    found = []
    async for view in grow_up(store, manager, "me", PROMPT, run):
        found.append(view)
        if len(view["ages"]) == 3:
            database.unlink(missing_ok=True)
    assert [age["step"] for age in found[-1]["ages"]] == STEPS[:3]
    assert "There is no experiment yet" in found[-1]["note"]
    assert cached(run, STEPS[2]) is not None
    assert cached(run, STEPS[3]) is None


async def test_a_damaged_age_is_one_line_and_is_fetched_anew(manager: GenerationManager, run: str) -> None:
    store = DirectClient(made().uri)
    whole = (await views(store, manager, PROMPT, run))[-1]["ages"]
    place = cached(run, STEPS[1])
    assert place is not None
    (place / "model.safetensors").write_bytes(b"half a file")
    found = (await views(store, manager, PROMPT, run))[-1]
    assert found["note"] == f"The age at step {STEPS[1]} cannot write; the server's log says why."
    assert found["ages"] == whole[:1]
    assert (await views(store, manager, PROMPT, run))[-1]["ages"] == whole


async def test_the_event_loop_goes_on_while_ages_write(manager: GenerationManager, run: str) -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    ticking = asyncio.create_task(turn())
    during = []
    async for _ in grow_up(DirectClient(made().uri), manager, "me", PROMPT, run):
        during.append(turns)
    ticking.cancel()
    assert all(later > before for before, later in pairwise(during[:-1]))


def test_the_cache_keeps_the_ages_that_were_used_last(tmp_path: Path) -> None:
    def download(place: Path) -> str:
        (place / "age").mkdir()
        return str(place / "age")

    run = "0" * 32
    for number in range(KEPT + 1):
        keep(run, number, download)
        assert cached(run, 0) is not None, "it is looked at each time"
    assert cached(run, 1) is None
    assert sum(cached(run, number) is not None for number in range(KEPT + 1)) == KEPT
