"""Blue/green state: what the record allows, and its stores under several processes and while they fail."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from model.serving.deployments import (
    DEPLOYMENTS,
    KEY,
    Deployment,
    DeploymentError,
    DeploymentState,
    DeploymentStore,
    FileDeploymentStore,
    RedisDeploymentStore,
    StaleDeploymentError,
    open_deployments,
)
from model.settings import load_settings
from tests.redis_server import RedisServer, redis_server

A, B = "https://a.example", "https://b.example"


def both() -> DeploymentState:
    return DeploymentState(active="blue").updated("blue", A, "1").updated("green", B, "2")


def test_a_switch_moves_new_stories_and_a_rollback_moves_them_back() -> None:
    switched = both().switched("green")
    assert (switched.active, switched.url, switched.previous, switched.idle) == ("green", B, "blue", "blue")
    back = switched.rolled_back()
    assert (back.active, back.url, back.previous) == ("blue", A, "green")
    assert back.rolled_back().active == "green"


def test_a_switch_to_where_stories_go_already_changes_nothing() -> None:
    record = both()
    assert record.switched("blue") is record


def test_nobody_can_switch_to_a_deployment_without_a_proven_deployment() -> None:
    record = DeploymentState(active="blue").updated("blue", A, "1")
    with pytest.raises(DeploymentError, match="green has no deployment that passed its check"):
        record.switched("green")
    assert record.switched("blue").active == "blue"


def test_a_rollback_never_leads_to_another_version_than_the_one_before() -> None:
    switched = both().switched("green")
    with pytest.raises(DeploymentError, match="what ran before the last switch is gone"):
        switched.updated("blue", None, None).rolled_back()
    with pytest.raises(DeploymentError, match="what ran before the last switch is gone"):
        switched.updated("blue", None, None).updated("blue", A, "3").rolled_back()
    assert switched.updated("blue", "https://moved.example", "1").rolled_back().url == "https://moved.example"


def test_an_address_must_be_one() -> None:
    for wrong in ("a.example", "ftp://a.example", "http://", ""):
        with pytest.raises(InputError, match=r"url must be an http\(s\) address"):
            both().updated("green", wrong, "1")


def test_a_switch_that_was_decided_by_an_older_record_changes_nothing(tmp_path: Path) -> None:
    store = FileDeploymentStore(tmp_path / "deployments.json")
    store.set_deployment("blue", A, "1")
    seen = store.set_deployment("green", B, "2").generation
    store.set_deployment("green", B, "3")
    with pytest.raises(StaleDeploymentError, match="changed meanwhile"):
        store.switch(generation=seen)
    record = store.load()
    assert record is not None
    assert (record.active, record.generation) == ("blue", seen + 1)
    assert store.switch(generation=record.generation).active == "green"


def test_a_slash_at_the_end_does_not_double_later() -> None:
    assert both().updated("blue", f"{A}/", "1").url == A


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("place"), st.sampled_from(DEPLOYMENTS), st.sampled_from([None, A, B])),
        st.tuples(st.just("switch"), st.sampled_from(DEPLOYMENTS), st.none()),
        st.tuples(st.just("rollback"), st.none(), st.none()),
    ),
    max_size=12,
)


@given(_steps)
def test_whatever_happens_the_record_stays_whole_and_survives_being_stored(
    steps: list[tuple[str, Deployment, str]],
) -> None:
    record = DeploymentState(active="blue").updated("blue", A, "1")
    for number, (what, deployment, url) in enumerate(steps):
        before = record
        try:
            if what == "place":
                record = record.updated(deployment, url, f"v{number}")
            elif what == "switch":
                record = record.switched(deployment)
                assert record.url is not None
            else:
                record = record.rolled_back()
                assert record.url is not None
        except DeploymentError:
            record = before
        assert record is before or record.generation == before.generation + 1
        assert record.previous != record.active
        assert all((record.urls[both] is None) == (record.versions[both] is None) for both in DEPLOYMENTS)
        assert DeploymentState.parse(record.model_dump_json(), "here") == record


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=8,
        ).map(json.dumps),
    )
)
def test_what_is_no_record_is_reported_in_one_line_and_breaks_nothing(stored: bytes | str) -> None:
    with pytest.raises(DeploymentError, match=r"^here does not hold a deployment record: "):
        DeploymentState.parse(stored, "here")


@given(
    field=st.sampled_from(["active", "previous", "urls", "versions", "changed", "generation"]),
    value=st.one_of(
        st.integers(),
        st.just("red"),
        st.lists(st.none()),
        st.just({"blue": None}),
        st.just({"blue": 7, "green": 7}),
        st.just({"blue": "javascript:x", "green": None}),
        st.just(float("inf")),
        st.booleans(),
    ),
)
def test_a_record_with_one_wrong_field_is_refused(field: str, value: object) -> None:
    whole = both().model_dump()
    good = {"changed": (int, float), "generation": (int,)}
    if type(value) in good.get(field, ()) and value != float("inf"):
        return
    if field == "versions" and value == {"blue": "javascript:x", "green": None}:
        return  # a version may be called anything
    with pytest.raises(DeploymentError, match="does not hold a deployment record"):
        DeploymentState.parse(json.dumps({**whole, field: value}), "here")


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


def test_the_first_deployment_is_active_and_a_switch_is_seen_by_who_reads_elsewhere(store: DeploymentStore) -> None:
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
        subprocess.Popen([sys.executable, "-c", WRITER, name, str(rounds)], cwd=repository, env=dict(os.environ))
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


def test_a_damaged_file_is_reported_once_and_stories_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_place_that_cannot_be_written_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(DeploymentError, match=r"cannot be written: "):
        FileDeploymentStore(tmp_path / "file" / "deployments.json").set_deployment("blue", "https://a.example", "1")


def test_the_file_lies_in_the_users_state_folder_unless_set_otherwise(
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
        with caplog.at_level(logging.WARNING):
            assert [store.endpoint(None) for _ in range(50)] == ["https://a.example"] * 50
        assert len(caplog.records) == 1
        with pytest.raises(DeploymentError, match="cannot be written") as caught:
            store.switch()
        assert "hunter2" not in caplog.text + str(caught.value)
        server.start()
        RedisDeploymentStore(server.url).set_deployment("green", "https://b.example", "2")
        deadline = time.monotonic() + 30
        while store.endpoint(None) != "https://b.example":
            assert time.monotonic() < deadline, "a Redis that came back is asked again"
            time.sleep(0.05)


def test_a_redis_that_never_answered_leaves_the_default(tmp_path: Path) -> None:
    store = RedisDeploymentStore("redis://127.0.0.1:1/0")
    assert store.endpoint("https://default.example") == "https://default.example"


def test_a_key_that_holds_something_else_is_reported_and_left_alone(server: RedisServer) -> None:
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
