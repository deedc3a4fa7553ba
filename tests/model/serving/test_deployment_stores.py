"""Where the record lives: a real file and a real Redis, under several processes and while they fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.errors import InputError
from model.serving.deployments import (
    KEY,
    DeploymentError,
    DeploymentStore,
    FileDeploymentStore,
    RedisDeploymentStore,
    open_deployments,
)
from model.settings import load_settings
from tests.redis_server import RedisServer, redis_server

WRITER = """
import sys
from model.serving.deployments import open_deployments
from model.settings import load_settings

store = open_deployments(load_settings())
name = sys.argv[1]
for number in range(int(sys.argv[2])):
    store.set_deployment("green", f"http://{name}.example", f"{name}-{number}")
    store.switch()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.fixture(params=["file", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeploymentStore:
    """An empty store, as the settings open it; its settings are in the environment for other processes."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("server")
        monkeypatch.setenv("REDIS_URL", server.url)
        opened = open_deployments(load_settings())
        assert isinstance(opened, RedisDeploymentStore)
        opened._writer.delete(KEY)
    else:
        monkeypatch.setenv("STORY_DEPLOYMENTS", str(tmp_path / "some" / "deployments.json"))
        opened = open_deployments(load_settings())
        assert isinstance(opened, FileDeploymentStore)
    return opened


def test_before_anything_is_deployed_stories_go_to_the_default(store: DeploymentStore) -> None:
    assert (store.read(), store.load()) == (None, None)
    assert store.endpoint("https://default.example") == "https://default.example"
    assert store.endpoint(None) is None
    for ask in (store.switch, store.rollback):
        with pytest.raises(DeploymentError, match="nothing is deployed yet"):
            ask()
    assert store.load() is None


def test_the_first_deployment_is_active_and_a_switch_is_seen_by_who_reads_elsewhere(
    store: DeploymentStore,
) -> None:
    reader = open_deployments(load_settings())
    store.set_deployment("green", "https://b.example", "2")
    assert reader.endpoint("https://default.example") == "https://b.example"
    store.set_deployment("blue", "https://a.example", "1")
    assert reader.endpoint(None) == "https://b.example"
    assert store.switch().active == "blue"
    assert reader.endpoint(None) == "https://a.example"
    assert store.rollback().active == "green"
    assert reader.endpoint(None) == "https://b.example"
    assert reader.read() == store.load()


def test_a_change_that_is_not_allowed_leaves_the_record_as_it_was(store: DeploymentStore) -> None:
    before = store.set_deployment("blue", "https://a.example", "1")
    with pytest.raises(DeploymentError, match="green has no deployment"):
        store.switch("green")
    assert store.load() == before
    assert store.switch("blue") == before
    assert store.load() == before


def test_writers_in_several_processes_lose_nothing(store: DeploymentStore, repository: Path) -> None:
    rounds, names = 15, ("ann", "ben", "cat")
    store.set_deployment("blue", "http://blue.example", "0")
    seen: list[int] = []
    done = threading.Event()
    reader = open_deployments(load_settings())

    def read() -> None:
        while not done.is_set():
            record = reader.read()
            assert record is not None
            assert record.url is not None
            seen.append(record.generation)

    watching = threading.Thread(target=read)
    watching.start()
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name, str(rounds)], cwd=repository, env=dict(os.environ)
        )
        for name in names
    ]
    codes = [writer.wait(60) for writer in writers]
    done.set()
    watching.join()
    assert codes == [0] * len(names)
    record = store.load()
    assert record is not None
    # Each placing is a change; so is each switch, for the writers go to and fro.
    assert record.generation == 1 + 2 * rounds * len(names)
    assert seen == sorted(seen), "a reader never sees an older record after a newer one"


def test_an_unchanged_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "deployments.json"
    store = FileDeploymentStore(path)
    store.set_deployment("blue", "https://a.example", "1")
    first = store.read()
    assert store.read() is first
    store.set_deployment("blue", "https://a.example", "2")
    second = store.read()
    assert second is not first
    assert second is not None
    assert second.versions["blue"] == "2"
    path.unlink()
    assert store.read() is None


def test_a_read_of_the_file_costs_next_to_nothing(tmp_path: Path) -> None:
    store = FileDeploymentStore(tmp_path / "deployments.json")
    store.set_deployment("blue", "https://a.example", "1")
    began = time.perf_counter()
    for _ in range(1000):
        store.endpoint(None)
    assert (time.perf_counter() - began) / 1000 < 0.001


def test_a_damaged_file_is_told_once_and_stories_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "deployments.json"
    store = FileDeploymentStore(path)
    store.set_deployment("blue", "https://a.example", "1")
    assert store.endpoint(None) == "https://a.example"
    path.write_text('{"active": "blue"', "utf-8")
    with caplog.at_level(logging.WARNING):
        assert [store.endpoint(None) for _ in range(5)] == ["https://a.example"] * 5
    assert len(caplog.records) == 1
    assert "does not hold a deployment record" in caplog.text
    with pytest.raises(DeploymentError, match="does not hold a deployment record"):
        store.switch()
    assert path.read_text("utf-8") == '{"active": "blue"', "a file that is not understood is not overwritten"
    assert FileDeploymentStore(path).endpoint("https://default.example") == "https://default.example"


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(DeploymentError, match=r"cannot be written: "):
        FileDeploymentStore(tmp_path / "file" / "deployments.json").set_deployment(
            "blue", "https://a.example", "1"
        )


def test_the_file_lies_in_the_users_state_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_deployments(load_settings()).where == str(
        Path.home() / ".local/state/write-me-a-story/deployments.json"
    )
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert open_deployments(load_settings()).where == str(tmp_path / "write-me-a-story" / "deployments.json")


def test_while_redis_is_gone_the_last_known_deployment_stands_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("model.serving.deployments.RETRY_AFTER", 0.3)
    with redis_server() as server:
        store = RedisDeploymentStore(server.url)
        store.set_deployment("blue", "https://a.example", "1")
        assert store.endpoint(None) == "https://a.example"
        server.stop()
        began = time.perf_counter()
        with caplog.at_level(logging.WARNING):
            assert [store.endpoint(None) for _ in range(50)] == ["https://a.example"] * 50
        assert time.perf_counter() - began < 1.0
        assert len(caplog.records) == 1
        with pytest.raises(DeploymentError, match="cannot be written") as caught:
            store.switch()
        assert "hunter2" not in caplog.text + str(caught.value)
        server.start()
        RedisDeploymentStore(server.url).set_deployment("green", "https://b.example", "2")
        deadline = time.monotonic() + 5
        while store.endpoint(None) != "https://b.example":
            assert time.monotonic() < deadline, "a Redis that came back is asked again"
            time.sleep(0.05)


def test_a_redis_that_never_answered_leaves_the_default(tmp_path: Path) -> None:
    store = RedisDeploymentStore("redis://127.0.0.1:1/0")
    assert store.endpoint("https://default.example") == "https://default.example"


def test_a_key_that_holds_something_else_is_told_and_left_alone(server: RedisServer) -> None:
    store = RedisDeploymentStore(server.url)
    store._writer.set(KEY, b"\x00\xff")
    try:
        with pytest.raises(DeploymentError, match="story:deployments does not hold a deployment record"):
            store.set_deployment("blue", "https://a.example", "1")
        assert store.endpoint("https://default.example") == "https://default.example"
        assert store._writer.get(KEY) == b"\x00\xff"
    finally:
        store._writer.delete(KEY)


def test_an_address_that_is_no_redis_is_refused_without_being_shown() -> None:
    with pytest.raises(InputError, match="REDIS_URL must start with redis://") as caught:
        RedisDeploymentStore("http://user:hunter2@127.0.0.1")
    assert "hunter2" not in str(caught.value)
