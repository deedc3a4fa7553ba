"""Two deployments as real processes: a version's way onto one, and 20 running streams through a switch and back."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from deploy.release import release
from deploy.release.platforms import LoopbackPlatform
from model.architecture.folder import DIGESTED, PRETRAINED, ModelFolder, compute_digest
from model.errors import DeployError, InputError, ModelError
from model.serving.deployments import DEPLOYMENTS, DeploymentError, DeploymentStore, open_deployments, state_folder
from model.serving.remote.readiness import switch
from model.settings import load_settings
from tests.deploy.conftest import Run

STREAMS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder that two deployments live in for all tests of this file; starting them takes seconds."""
    folder = tmp_path_factory.mktemp("state")
    yield folder
    platform = LoopbackPlatform(folder / "write-me-a-story" / "loopback", drain=1)
    for deployment in DEPLOYMENTS:
        if (pid := platform.pid(deployment)) is not None:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    settings = {"XDG_STATE_HOME": str(place), "STORY_SLOTS": str(STREAMS), "STORY_DRAIN": "20"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def platform(environment: dict[str, str]) -> LoopbackPlatform:
    return LoopbackPlatform(state_folder() / "loopback", drain=20)


@pytest.fixture(scope="module")
def other_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights under another digest."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(PRETRAINED, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "note": "another version"}), "utf-8")
    (folder / "digest").write_text(compute_digest(folder) + "\n", "ascii")
    assert "config.json" in DIGESTED
    return folder


Deployed = tuple[Path, str, str]


@pytest.fixture(scope="module")
def deployed(place: Path, run: Run, other_version: Path) -> Deployed:
    """The record behind two deploys, and what each printed: the shipped version on blue, another one on green."""
    environment = {"XDG_STATE_HOME": str(place), "STORY_SLOTS": str(STREAMS), "STORY_DRAIN": "20"}
    command = ("story.py", "deploy", "deploy", "--platform", "loopback")
    blue = run(*command, "--json", **environment)
    assert blue.returncode == 0, blue.stderr
    green = run(*command, "--model", str(other_version), **environment)
    assert green.returncode == 0, green.stderr
    return place / "write-me-a-story" / "deployments.json", blue.stdout, green.stdout


@pytest.fixture
def store(deployed: Deployed, environment: dict[str, str]) -> Iterator[DeploymentStore]:
    """Blue is active, green passed its check; the record is put back whatever a test makes of it."""
    record, *_ = deployed
    before = record.read_bytes()
    yield open_deployments(load_settings())
    record.write_bytes(before)


def test_a_version_gets_onto_the_first_deployment_and_receives_stories(
    deployed: Deployed, store: DeploymentStore
) -> None:
    report = json.loads(deployed[1])
    shipped = ModelFolder.open(PRETRAINED).digest
    assert (report["deployment"], report["version"], report["uploaded"]) == ("blue", shipped, True)
    assert (report["smoke"]["verdict"], report["smoke"]["success_rate"]) == ("passed", 1.0)
    assert store.endpoint(None) == report["url"]
    health = httpx.get(f"{report['url']}/api/health", timeout=None).json()
    assert (health["backend"], health["model"]["version"]) == ("blue", shipped)


def test_the_next_version_waits_on_the_idle_deployment(
    deployed: Deployed, store: DeploymentStore, other_version: Path
) -> None:
    assert "green is ready at http://127.0.0.1:" in deployed[2]
    assert "`story deploy switch` sends new stories there" in deployed[2]
    record = store.load()
    assert record is not None
    assert record.active == "blue"
    assert record.versions["green"] == ModelFolder.open(other_version).digest != record.versions["blue"]


@dataclass(frozen=True)
class Stream:
    """One story that a client received."""

    deployment: str
    asked: float
    """Before the client looked where to send it."""
    began: float
    """After that."""
    ended: float
    finish: str | None
    whole: bool


async def _request_stories(store: DeploymentStore, stop: asyncio.Event, streams: list[Stream], seed: int) -> None:
    """Act as one client: request story after story, each from where new requests go at that moment."""
    async with httpx.AsyncClient(timeout=60) as client:
        while not stop.is_set():
            asked, url, began = time.time(), store.endpoint(None), time.time()
            seed += STREAMS
            body = {"prompt": "Once upon a time", "max_tokens": 300, "stream": True, "seed": seed}
            finish, done = None, False
            async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200, (await answer.aread()).decode()
                deployment = answer.headers["x-story-backend"]
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        assert "error" not in event, event
                        finish = next((c["finish_reason"] for c in event["choices"] if c["finish_reason"]), finish)
            streams.append(Stream(deployment, asked, began, time.time(), finish, done))


async def _story(*arguments: str, repository: Path) -> dict[str, object]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "story.py", "deploy", *arguments, "--json", cwd=repository, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    answer: dict[str, object] = json.loads(out)
    return answer


async def test_twenty_streams_live_through_a_switch_and_a_rollback(store: DeploymentStore, repository: Path) -> None:
    streams: list[Stream] = []
    stop = asyncio.Event()
    clients = [asyncio.create_task(_request_stories(store, stop, streams, number)) for number in range(STREAMS)]

    async def stories(deployment: str, since: float) -> None:
        """Wait until as many new stories have come from there as there are clients."""
        async with asyncio.timeout(60):
            while sum(each.deployment == deployment and each.asked > since for each in streams) < STREAMS:
                await asyncio.sleep(0.02)

    await stories("blue", 0.0)
    switched = await _story("switch", repository=repository)
    after_switch = time.time()
    await stories("green", after_switch)
    back = await _story("rollback", repository=repository)
    after_rollback = time.time()
    await stories("blue", after_rollback)
    stop.set()
    await asyncio.gather(*clients)  # raises a client's error

    assert (switched["active"], back["active"], back["previous"]) == ("green", "blue", "green")
    assert all(story.whole and story.finish in ("stop", "length") for story in streams), "no stream breaks"
    moved, moved_back = float(str(switched["changed"])), float(str(back["changed"]))
    for since, moment, deployment in ((0.0, moved, "blue"), (after_switch, moved_back, "green")):
        running = [story for story in streams if since < story.asked and story.began < moment < story.ended]
        assert len(running) >= STREAMS // 4, "many were in mid-story when traffic moved"
        assert {story.deployment for story in running} == {deployment}, "a running story ends where it began"
    between = [story for story in streams if after_switch < story.asked and story.began < moved_back]
    assert {story.deployment for story in between} == {"green"}, "new stories go to the other deployment"
    after = [story for story in streams if story.asked > after_rollback]
    assert {story.deployment for story in after} == {"blue"}, "and back after the rollback"


def test_status_shows_both_deployments(run: Run, store: DeploymentStore) -> None:
    done = run("story.py", "deploy", "status", "--json")
    status = json.loads(done.stdout)
    assert (done.returncode, status["active"], status["store"]) == (0, "blue", store.where)
    assert {name: entry["health"] for name, entry in status["deployments"].items()} == {
        "blue": "healthy",
        "green": "healthy",
    }
    assert status["deployments"]["blue"]["capacity"] == STREAMS + 64


def test_the_active_deployment_is_not_replaced_under_its_clients(
    platform: LoopbackPlatform, store: DeploymentStore
) -> None:
    folder = ModelFolder.open(PRETRAINED)
    with pytest.raises(InputError, match="deployment must be green, the idle one: blue is active"):
        release.release(folder, platform, store, load_settings(), deployment="blue", timeout=1, progress=print)
    with pytest.raises(InputError, match="blue is active"):
        release.stop(platform, store, "blue", force=False)
    assert store.endpoint(None) is not None


def test_a_deployment_that_does_not_wake_is_not_switched_to(platform: LoopbackPlatform, store: DeploymentStore) -> None:
    store.set_deployment("green", "http://127.0.0.1:1", "x")
    with pytest.raises(DeployError, match="was not ready"):
        switch(store, load_settings(), None, timeout=0.2)
    record = store.load()
    assert record is not None
    assert record.active == "blue"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackPlatform]:
    """The shipped version on blue, in a state folder of the test's own: what the test ends, no other test needs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    platform, settings = LoopbackPlatform(state_folder() / "loopback", drain=1), load_settings()
    folder, store = ModelFolder.open(PRETRAINED), open_deployments(settings)
    release.release(folder, platform, store, settings, deployment=None, timeout=60, progress=print)
    yield platform
    for deployment in DEPLOYMENTS:
        platform.stop(deployment)


def test_a_version_that_fails_its_check_cannot_be_switched_to(
    alone: LoopbackPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged too slow here: a real check, with a bound that no story keeps."""
    monkeypatch.setattr(release, "LONGEST_GENERATION", 0.0)
    settings = load_settings()
    store = open_deployments(settings)
    with pytest.raises(DeployError, match="green did not pass its check: a story took"):
        release.release(
            ModelFolder.open(PRETRAINED), alone, store, settings, deployment=None, timeout=60, progress=print
        )
    record = store.load()
    assert record is not None
    assert (record.active, record.urls["green"]) == ("blue", None)
    with pytest.raises(DeploymentError, match="green has no deployment that passed its check"):
        switch(store, settings, None, timeout=1)
    with pytest.raises(DeploymentError, match="there is nothing to roll back to"):
        store.rollback()
    assert release.stop(alone, store, "green", force=True)[1], "its process is there to be looked at"


def test_stopping_ends_the_process_and_takes_the_address_away(alone: LoopbackPlatform) -> None:
    store = open_deployments(load_settings())
    assert alone.pid("blue") is not None
    assert release.stop(alone, store, "blue", force=True) == ("blue", True)
    assert alone.pid("blue") is None
    assert store.endpoint("https://default.example") == "https://default.example"
    assert release.stop(alone, store, "blue", force=True) == ("blue", False)


def test_an_upload_is_made_once_and_is_the_folder(tmp_path: Path) -> None:
    platform = LoopbackPlatform(tmp_path, drain=1)
    folder = ModelFolder.open(PRETRAINED)
    assert [platform.upload(folder), platform.upload(folder)] == [True, False]
    assert ModelFolder.open(tmp_path / "models" / folder.digest).digest == folder.digest
    assert [path.name for path in (tmp_path / "models").iterdir()] == [folder.digest]


def test_what_was_not_uploaded_is_not_started(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="ffffffffffff was not uploaded"):
        LoopbackPlatform(tmp_path, drain=1).start("blue", "f" * 64)


def test_a_process_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    (tmp_path / "models" / "broken").mkdir(parents=True)
    with pytest.raises(DeployError, match=r"the service did not start: .*config\.json"):
        LoopbackPlatform(tmp_path, drain=1).start("blue", "broken")
    assert LoopbackPlatform(tmp_path, drain=1).stop("blue") is False


def test_a_record_of_a_foreign_process_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "blue.json").write_text(json.dumps({"pid": os.getpid()}), "utf-8")
    assert LoopbackPlatform(tmp_path, drain=1).stop("blue") is False
    (tmp_path / "green.json").write_text("{", "utf-8")
    assert LoopbackPlatform(tmp_path, drain=1).stop("green") is False
