"""What an alias names is what writes: new versions, running stories, refusals, outages and the way back."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.architecture.folder import PRETRAINED, ModelFolder, compute_digest
from model.engine.load import load_engine
from model.errors import InputError
from model.generation import GenerationRequest, SamplingParams
from model.serving.backend import LocalBackend, ModelInfo
from model.serving.cache import CachingBackend, LRUCache, ResponseCache
from model.serving.following import FollowingBackend, open_local
from model.serving.metrics import Meter
from model.serving.registry import RegisteredVersion, RegistryError, cache_folder
from model.settings import Settings
from tests.model.engines import NO_END, engine, runtime
from tests.model.fake_runtime import FakeRuntime
from tests.model.small_model import copy_of, small_folder


class Versions:
    """A registry in this process: the folders of versions 1, 2, …, and one alias."""

    address = "here"

    def __init__(self, *folders: Path) -> None:
        self.folders = list(folders)
        self.champion: int | None = 1
        self.down = False
        self.downloads: list[int] = []

    def find(self, wanted: str) -> RegisteredVersion:
        if self.down:
            raise RegistryError("the registry does not answer")
        if self.champion is None:
            raise InputError("version", f"must be an alias, got {wanted!r}")
        stated = (self.folders[self.champion - 1] / "digest").read_text().strip()
        return RegisteredVersion(number=self.champion, digest=stated, aliases=("champion",), source="")

    def download(self, version: RegisteredVersion, out: Path) -> None:
        self.downloads.append(version.number)
        if self.down:
            raise RegistryError("the registry does not answer")
        shutil.copytree(self.folders[version.number - 1], out, dirs_exist_ok=True)


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = {"story_model": "models:/story-writer@champion", "story_slots": 2, "story_queue": 4}
    return Settings(**given | more)


def opened(versions: Versions) -> FollowingBackend:
    backend = open_local(settings(), lambda _: versions)
    assert isinstance(backend, FollowingBackend)
    return backend


@pytest.fixture
async def following(
    versions: Versions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[FollowingBackend]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    backend = opened(versions)
    async with backend.running():
        yield backend


@pytest.fixture
def versions() -> Versions:
    """Version 1 is the small model, version 2 the shipped one."""
    return Versions(small_folder(), PRETRAINED)


def asked(seed: int = 5, tokens: int = 24, **more: Any) -> GenerationRequest:
    return GenerationRequest(prompt="One day", max_tokens=tokens, sampling=SamplingParams(seed=seed), **more)


@cache
def alone(folder: Path, seed: int = 5) -> str:
    with load_engine(folder) as made:
        return made.submit(asked(seed)).wait(20).text


async def story(backend: Any, seed: int = 5) -> str:
    stream = await backend.submit(asked(seed))
    async for _ in stream:
        pass
    return str(stream.completion.text)


def shown(backend: FollowingBackend) -> tuple[str, int | None, str]:
    model = backend.model
    return model.name, model.number, model.alias


def broken(target: Path) -> Path:
    """A folder in order by its digest, whose network ends each story at once."""
    folder = copy_of(small_folder(), target)
    weights = load_file(folder / "model.safetensors")
    weights["embedding.weight"] = weights["embedding.weight"] * np.float32(1e25)
    save_file(weights, folder / "model.safetensors")
    (folder / "digest").write_text(compute_digest(folder))
    return folder


async def test_the_next_story_is_the_new_versions_and_rollback_is_the_way_back(
    following: FollowingBackend, versions: Versions
) -> None:
    assert await story(following) == alone(small_folder())
    first = await following.fingerprint()
    versions.champion = 2
    await following.refresh()
    assert shown(following) == ("story-writer 2", 2, "champion")
    assert following.model.version == ModelFolder.open(PRETRAINED).digest
    assert await story(following) == alone(PRETRAINED)
    assert await following.fingerprint() != first
    versions.champion = 1
    await following.refresh()
    assert shown(following) == ("story-writer 1", 1, "champion")
    assert await story(following) == alone(small_folder())
    assert await following.fingerprint() == first
    assert versions.downloads == [1, 2], "the way back is from the cache"
    assert following.health().detail == "ready"


async def test_a_running_story_ends_on_the_old_version_which_is_then_freed(
    following: FollowingBackend, versions: Versions, gated: FakeRuntime
) -> None:
    await following.engine.aclose()
    old = LocalBackend(engine(gated), ModelInfo("at a pace", "0" * 64), capacity=4)
    following.backend = old
    gated.gate.clear()
    running = await following.submit(asked())
    versions.champion = 2
    await following.refresh()
    assert await story(following) == alone(PRETRAINED)
    assert old.engine.stats().active + old.engine.stats().waiting == 1
    gated.gate.set()
    async for _ in running:
        pass
    assert (running.completion.finish_reason, running.completion.usage.completion_tokens) == ("length", 24)
    assert running.fingerprint == await old.fingerprint()
    with engine(runtime(**NO_END)) as same:
        assert running.completion.text == same.submit(asked()).wait(20).text
    async with asyncio.timeout(20):
        while following._retired:
            await asyncio.sleep(0)
    assert not old.engine._thread.is_alive()


async def test_stories_on_an_old_version_are_cancelled_when_the_service_stops(
    versions: Versions, gated: FakeRuntime
) -> None:
    following = opened(versions)
    async with following.running():
        await following.engine.aclose()
        following.backend = LocalBackend(engine(gated), ModelInfo("at a pace", "0" * 64), capacity=4)
        gated.gate.clear()
        running = await following.submit(asked())
        versions.champion = 2
        await following.refresh()
        gated.gate.set()
        running.cancel()
    assert running.completion.finish_reason in ("cancelled", "length")
    assert not following._retired


@pytest.mark.parametrize("fault", ["damaged", "cannot write"])
async def test_a_version_that_fails_is_refused_until_the_alias_has_named_another(
    fault: str, following: FollowingBackend, versions: Versions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = broken(tmp_path / "bad")
    if fault == "damaged":
        (bad / "tokenizer.json").write_text("{}")
    versions.folders.append(bad)
    versions.champion = 3
    for _ in range(3):
        await following.refresh()
    assert versions.downloads == [1, 3], "it is tried once"
    assert await story(following) == alone(small_folder())
    health = following.health()
    assert (health.ready, health.models_refused) == (True, 1)
    why = "is damaged" if fault == "damaged" else "it cannot write"
    assert health.detail.startswith("ready; story-writer 3 (")
    assert "the champion, was refused" in health.detail
    assert why in health.detail
    assert str(tmp_path) not in health.detail
    assert [why in record.message for record in caplog.records] == [True]
    versions.champion = 2
    await following.refresh()
    assert (following.health().detail, shown(following)[1]) == ("ready", 2)
    versions.champion = 3
    await following.refresh()
    assert (following.health().models_refused, shown(following)[1]) == (2, 2)
    lines = Meter(following).text().decode().splitlines()
    digest = following.model.version
    assert f'story_model_info{{alias="champion",digest="{digest}",version="2"}} 1.0' in lines
    assert "story_model_refused_total 2.0" in lines


async def test_while_the_registry_does_not_answer_what_runs_goes_on(
    following: FollowingBackend, versions: Versions, caplog: pytest.LogCaptureFixture
) -> None:
    versions.champion, versions.down = 2, True
    for _ in range(3):
        await following.refresh()
    assert await story(following) == alone(small_folder())
    assert following.health().detail == "ready; the champion is not known: the registry does not answer"
    assert len(caplog.records) == 1, "an outage is logged once"
    versions.down = False
    await following.refresh()
    assert (shown(following)[1], following.health().detail, following.health().models_refused) == (2, "ready", 0)


async def test_a_download_that_breaks_off_is_tried_again(
    following: FollowingBackend, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.champion = 2
    with monkeypatch.context() as patched:
        patched.setattr(versions, "download", lambda version, out: versions.find(""))
        patched.setattr(versions, "find", Versions.find.__get__(versions))
        found = versions.find("champion")
        patched.setattr(versions, "find", lambda wanted: found if wanted else _gone())
        await following.refresh()
    assert (shown(following)[1], following.health().models_refused) == (1, 0)
    await following.refresh()
    assert shown(following)[1] == 2


def _gone() -> RegisteredVersion:
    raise RegistryError("the registry does not answer")


async def test_before_there_is_a_champion_the_shipped_model_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, versions: Versions
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    versions.champion = None
    backend = opened(versions)
    assert shown(backend) == ("the model that ships with this repository", None, "")
    assert backend.health().ready
    async with backend.running():
        engine_before = backend.engine
        versions.champion = 2
        await backend.refresh()
        assert shown(backend) == ("story-writer 2", 2, "champion")
        assert backend.engine is engine_before, "the same files are not loaded again"


async def test_a_restart_without_the_registry_serves_the_last_version(
    following: FollowingBackend, versions: Versions
) -> None:
    versions.down = True
    again = opened(versions)
    assert shown(again) == ("story-writer 1", 1, "champion")
    assert again.health().detail == "ready; the champion is not known: the registry does not answer"
    shutil.rmtree(cache_folder())
    assert shown(opened(versions))[1] is None


async def test_the_response_cache_does_not_serve_the_old_versions_story(
    following: FollowingBackend, versions: Versions
) -> None:
    cache = ResponseCache(LRUCache(1_000_000, 60), 60)
    cached = CachingBackend(following, cache)
    assert await story(cached) == await story(cached) == alone(small_folder())
    versions.champion = 2
    await following.refresh()
    assert await story(cached) == await story(cached) == alone(PRETRAINED)
    assert (cache.requests["miss"], cache.requests["hit"]) == (2, 2)


async def test_it_looks_by_itself_every_few_seconds(versions: Versions) -> None:
    backend = FollowingBackend("champion", settings(story_model_refresh=0.1), versions)
    async with backend.running(), asyncio.timeout(20):
        versions.champion = 2
        while shown(backend)[1] != 2:
            await asyncio.sleep(0.01)


def test_a_number_is_not_followed(versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fixed = open_local(settings(story_model="models:/story-writer/1"), lambda _: versions)
    assert isinstance(fixed, LocalBackend)
    assert (fixed.model.number, fixed.model.alias) == (1, "")
    with contextlib.closing(fixed.engine):
        pass
