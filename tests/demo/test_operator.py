"""An operator on the page Experiments, over a real registry: who is one, and what a confirmed dry run moves."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from demo import operator as module
from demo.operator import FAILURE_SECONDS, MAX_FAILURES, Operator
from experiments.dashboard.client import StoreClient
from experiments.gate.run import promote, rollback
from experiments.registry.versions import versions
from model.serving.deployments import FileDeploymentStore
from model.serving.rate_limit import MemoryWindows
from model.serving.session import GenerationManager
from model.settings import ServiceOptions, Settings
from tests.demo.scripted import ScriptedBackend
from tests.demo.served import serve
from tests.experiments.dashboard.direct import DirectClient
from tests.experiments.gate.promoted import Place, judged
from tests.experiments.gate.worse import thresholds
from tests.json_server import json_server

TOKEN = "a token of an operator, for tests"
CLIENT = "192.0.2.7"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The registry after the challenger, version 2, has passed the gate; version 1 is the champion."""
    thresholds(tmp_path)
    monkeypatch.setattr(module, "THRESHOLDS", tmp_path / "thresholds.yaml")
    return judged(tmp_path)


def operator_on(uri: str, **settings: Any) -> Operator:
    return Operator(settings=Settings(story_operator_token=SecretStr(TOKEN), **settings), store=DirectClient(uri))


def ask(operator: Operator, action: str, client: str = CLIENT, **given: object) -> dict[str, Any]:
    return asyncio.run(operator.answer({"token": TOKEN, "action": action} | given, client))


def aliases(uri: str) -> dict[str, int]:
    return {alias: each.number for each in versions(uri) for alias in each.aliases}


def test_a_version_is_promoted_and_rolled_back_after_a_dry_run_that_moves_nothing(place: Place) -> None:
    operator = operator_on(place.uri)
    dry = ask(operator, "promote", version="2")
    printed = promote(place.uri, place.bounds, version="2").described("would be promoted")
    assert dry["note"] == f"V{printed[1:]}", "as `story promote` without --yes says it"
    assert not dry["done"]
    assert aliases(place.uri) == {"champion": 1, "challenger": 2}
    done = ask(operator, "promote", version="2", plan=dry["plan"])
    assert done["done"]
    assert done["note"].endswith("is promoted; champion so far: version 1")
    assert aliases(place.uri) == {"champion": 2, "previous": 1}
    back = ask(operator, "rollback")
    assert "would be champion again; champion so far: version 2" in back["note"]
    assert aliases(place.uri) == {"champion": 2, "previous": 1}
    assert ask(operator, "rollback", plan=back["plan"])["done"]
    assert aliases(place.uri) == {"champion": 1, "previous": 2}


def test_what_changed_after_the_dry_run_is_refused_and_shown_anew(place: Place) -> None:
    operator = operator_on(place.uri)
    dry = ask(operator, "promote", version="2")
    promote(place.uri, place.bounds, version="2", apply=True)  # in a terminal
    late = ask(operator, "promote", version="2", plan=dry["plan"])
    assert (late["note"], late["done"], late["plan"]) == ("Version 2 is the champion already", False, "")
    back = ask(operator, "rollback")
    rollback(place.uri)
    stale = ask(operator, "rollback", plan=back["plan"])
    assert not stale["done"]
    changed = "The registry changed meanwhile, and nothing was moved. Now: version 2 ("
    assert stale["note"].startswith(changed)
    assert aliases(place.uri) == {"champion": 1, "previous": 2}
    assert ask(operator, "rollback", plan=stale["plan"])["done"], "the new dry run can be confirmed"
    assert aliases(place.uri) == {"champion": 2, "previous": 1}


def test_the_gate_refuses_in_one_line(place: Place) -> None:
    operator = operator_on(place.uri)
    assert ask(operator, "promote", version="1")["note"] == "Version 1 is the champion already"
    for version in ("7", "", "x" * 5000, "models:/other/1"):
        refused = ask(operator, "promote", version=version, plan="2/x/1/y")
        assert not refused["done"]
        assert refused["note"]
        assert "\n" not in refused["note"]
    assert ask(operator, "rollback")["note"] == "There is no previous champion to go back to"
    assert ask(operator, "delete")["note"] == "There is no such action."
    assert aliases(place.uri) == {"champion": 1, "challenger": 2}


@pytest.mark.parametrize(
    "given", [None, [], {}, {"token": None}, {"token": [TOKEN]}, {"token": TOKEN[:-1]}, {"token": "\ud800"}]
)
def test_without_the_token_nothing_is_answered_and_the_registry_is_not_asked(given: object, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for action in ("sign in", "promote", "rollback", "switch"):
        sent = given | {"action": action} if isinstance(given, dict) else given
        answer = asyncio.run(operator_on(uri).answer(sent, CLIENT))
        assert answer["note"] == "This is not the operator's token."
        assert not (answer["signed_in"])
        assert not (answer["switch"])
        assert not (answer["done"])
        assert not answer["plan"]
    assert list(tmp_path.iterdir()) == [], "the registry would have been made"


def test_wrong_tokens_are_rate_limited_for_each_client_and_logged_without_the_token(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    now = [0.0]
    settings = Settings(story_operator_token=SecretStr(TOKEN))
    store = DirectClient(f"sqlite:///{tmp_path}/mlflow.db")
    operator = Operator(settings=settings, store=store, failures=MemoryWindows(clock=lambda: now[0]))
    with caplog.at_level(logging.DEBUG):
        for _ in range(3 * MAX_FAILURES):
            assert ask(operator, "sign in")["signed_in"], "the right token uses nothing up"
        for _ in range(MAX_FAILURES):
            assert "not the operator" in ask(operator, "sign in", token="a wrong one")["note"]
        locked = ask(operator, "sign in")
        assert (locked["signed_in"], locked["note"]) == (False, "Too many wrong tokens; try again in 300 s.")
        assert ask(operator, "sign in", client="192.0.2.8")["signed_in"], "another client is not locked out"
        now[0] += FAILURE_SECONDS
        assert ask(operator, "sign in")["signed_in"]
    assert "the token is wrong" in caplog.text
    assert TOKEN not in caplog.text
    assert "a wrong one" not in caplog.text
    assert TOKEN not in repr(operator)


def test_deployments_are_switched_after_a_dry_run_once_the_idle_one_is_ready(tmp_path: Path) -> None:
    deployments = FileDeploymentStore(tmp_path / "deployments.json")
    operator = operator_on(f"sqlite:///{tmp_path}/mlflow.db", story_deployments=str(deployments.path))
    assert not ask(operator, "sign in")["switch"]
    assert ask(operator, "switch")["note"] == "Nothing is deployed yet; `story deploy deploy` does it"
    with json_server(lambda _: (200, {"model": {"version": "b" * 64}})) as (url, seen):
        deployments.set_deployment("blue", url, "a" * 64)
        assert not ask(operator, "sign in")["switch"], "there is one only"
        deployments.set_deployment("green", url, "b" * 64)
        assert ask(operator, "sign in")["switch"]
        dry = ask(operator, "switch")
        assert dry["note"] == f"New stories would go to green (bbbbbbbbbbbb) at {url}; so far to blue"
        assert not seen
        deployments.set_deployment("green", url, "b" * 64)  # deployed again meanwhile
        stale = ask(operator, "switch", plan=dry["plan"])
        assert not stale["done"]
        assert stale["note"].startswith("The deployments changed meanwhile, and nothing was switched. Now: new stories")
        record = deployments.load()
        assert record is not None
        assert record.active == "blue"
        done = ask(operator, "switch", plan=stale["plan"])
    assert (done["done"], done["note"]) == (True, f"New stories go to green (bbbbbbbbbbbb) at {url}")
    record = deployments.load()
    assert record is not None
    assert record.active == "green"
    assert [each.path for each in seen] == ["/api/health"]


@pytest.mark.parametrize(
    ("token", "public", "there"), [(TOKEN, False, True), (TOKEN, True, False), (None, False, False)]
)
def test_there_is_no_operator_on_a_share_link_or_without_a_token(
    token: str | None, public: bool, there: bool, tmp_path: Path
) -> None:
    settings = Settings(story_operator_token=None if token is None else SecretStr(token))
    options = ServiceOptions(settings=settings, public=public)
    store = StoreClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert (Operator.of(GenerationManager(ScriptedBackend("A story."), options=options), store) is not None) == there
    with serve(ScriptedBackend("A story."), options=options, experiments=store) as served, httpx.Client() as client:
        config = client.get(f"{served.url}config", timeout=None).json()
        (versions_part,) = [each for each in config["components"] if each["props"].get("elem_id") == "versions"]
        assert ("Operator" in versions_part["props"]["html_template"]) == there
        body = {
            "data": {"token": TOKEN, "action": "sign in"},
            "fn_name": "operate",
            "component_id": versions_part["id"],
            "session_hash": "x",
        }
        url = f"{served.url}gradio_api/component_server"
        answer = client.post(url, json=body, timeout=None)
        assert (answer.status_code == 200 and answer.json()["signed_in"]) == there
        foreign = client.post(url, json=body, timeout=None, headers={"origin": "https://evil.example"})
        assert foreign.status_code == 403
        public_names = client.get(f"{served.url}gradio_api/info", timeout=None).json()["named_endpoints"]
        assert not any("operate" in name for name in public_names)
