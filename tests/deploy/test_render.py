"""Render: a deployment succeeds only when the new model answers; the blueprint fits our settings, without secrets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.render import DIGEST, Timing, main
from model.settings import Settings
from tests.json_server import Asked, json_server

TIMING = Timing(live=60, healthy=60, interval=0.01)
"""Longer than a busy machine takes; the tests of a deadline shorten it."""
NEW = DIGEST.read_text().strip()
OLD = "0" * 64


@dataclass
class FakeRender:
    """Render's API, and the app that it runs. Lists are answered in order; their last value stays."""

    runtime: str = "docker"
    statuses: list[str] = field(default_factory=lambda: ["build_in_progress", "update_in_progress", "live"])
    models: list[str] = field(default_factory=lambda: [OLD, NEW])
    healthy: bool = True

    def answer(self, asked: Asked) -> tuple[int, Any]:
        if asked.path == "/api/health":
            model = self.models.pop(0) if len(self.models) > 1 else self.models[0]
            status = "healthy" if self.healthy else "unhealthy"
            body = {"status": status, "version": "0.1.0", "model": {"version": model}}
            return (200 if self.healthy else 503), body
        if asked.path == "/hook":
            return 200, {}
        if asked.token != "Bearer key-of-render":
            return 401, {"message": "unauthorized"}
        if asked.path == "/v1/services/srv-1":
            return 200, {"id": "srv-1", "serviceDetails": {"runtime": self.runtime}}
        if (asked.method, asked.path) == ("POST", "/v1/services/srv-1/deploys"):
            return 201, {"id": "dep-1", "status": "created"}
        if asked.path == "/v1/services/srv-1/deploys/dep-1":
            status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            return 200, {"id": "dep-1", "status": status}
        return 404, {}


Api = tuple[FakeRender, list[Asked], dict[str, str]]


@pytest.fixture
def api() -> Iterator[Api]:
    """The API, the requests that it got, and the environment of the deploy job."""
    fake = FakeRender()
    with json_server(fake.answer) as (address, seen):
        environment = {
            "RENDER_API": f"{address}/v1",
            "RENDER_API_KEY": "key-of-render",
            "RENDER_SERVICE_ID": "srv-1",
            "APP_URL": f"{address}/",
            "GITHUB_SHA": "c" * 40,
            "IMAGE": "registry/app@sha256:1",
            "OUTCOME": "success",
            "NOTIFY_URL": f"{address}/hook",
        }
        yield fake, seen, environment


def test_it_waits_for_render_and_then_for_the_new_model_several_times(
    api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, seen, environment = api
    fake.models = [OLD, NEW, OLD, NEW]
    assert main(["deploy"], environment, TIMING) == 0
    assert f"live: version 0.1.0, model {NEW[:12]}" in capsys.readouterr().out
    assert next(asked.body for asked in seen if asked.method == "POST") == {"commitId": "c" * 40}
    looks = [asked for asked in seen if asked.path == "/api/health"]
    assert len(looks) == 6, "an old instance in between restarts the count"
    assert all(asked.token == "" for asked in looks), "the key goes to Render and nowhere else"


def test_a_service_of_a_prebuilt_image_gets_the_image_that_was_scanned(api: Api) -> None:
    fake, seen, environment = api
    fake.runtime = "image"
    assert main(["deploy"], environment, TIMING) == 0
    (deployed,) = [asked.body for asked in seen if asked.method == "POST"]
    assert deployed == {"imageUrl": "registry/app@sha256:1"}


@pytest.mark.parametrize(
    ("change", "deadline", "said"),
    [
        ({"statuses": ["build_in_progress", "build_failed"]}, {}, "Render: build_failed"),
        ({"statuses": ["update_in_progress"]}, {"live": 0.2}, "still says update_in_progress"),
        ({"models": [OLD]}, {"healthy": 0.2}, f"does not answer with {NEW[:12]}: model 000"),
        ({"healthy": False}, {"healthy": 0.2}, "/api/health answered 503"),
    ],
)
def test_a_failure_is_one_line_that_names_it(
    change: dict[str, Any], deadline: dict[str, Any], said: str, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, _, environment = api
    for name, value in change.items():
        setattr(fake, name, value)
    assert main(["deploy"], environment, replace(TIMING, **deadline)) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_errors_do_not_contain_the_key(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    environment = api[2]
    assert main(["deploy"], environment | {"RENDER_API_KEY": "wrong-key"}, TIMING) == 1
    assert main(["deploy"], environment | {"RENDER_API_KEY": ""}, TIMING) == 1
    error = capsys.readouterr().err
    assert error == "render: Render answered 401\nrender: RENDER_API_KEY is not set\n"
    assert main(["everything"], environment) == 2


def test_the_webhook_gets_one_post_and_its_address_is_not_printed(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    _, seen, environment = api
    assert main(["notify"], environment) == 0
    (asked,) = seen
    assert "deployment success" in asked.body["text"]
    assert main(["notify"], environment | {"NOTIFY_URL": "http://127.0.0.1:9/secret-path"}) == 1
    printed = capsys.readouterr()
    assert "secret-path" not in printed.out + printed.err


def test_no_webhook_is_no_failure_and_the_script_needs_no_package(repository: Path) -> None:
    command = [sys.executable, "-S", "deploy/render.py", "notify"]
    run = subprocess.run(command, cwd=repository, env={}, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "no NOTIFY_URL, nothing is posted\n")


def test_the_blueprints_variables_are_settings_and_its_secrets_are_asked_for(repository: Path) -> None:
    (service,) = yaml.safe_load((repository / "render.yaml").read_text("utf-8"))["services"]
    assert (repository / service["dockerfilePath"]).is_file()
    assert service["autoDeployTrigger"] == "off", "the pipeline deploys, after its gate"
    variables = {variable["key"]: variable for variable in service["envVars"]}
    assert {key.lower() for key in variables} <= set(Settings.model_fields)
    secret = {key for key, variable in variables.items() if variable.get("sync") is False}
    mlflow = {"STORY_MODEL", *(f"MLFLOW_TRACKING_{name}" for name in ("URI", "USERNAME", "PASSWORD"))}
    assert secret == mlflow | {"MODAL_ENDPOINT_URL", "MODAL_KEY", "MODAL_SECRET", "REDIS_URL", "DATABASE_URL"}
    given = {key.lower(): value["value"] for key, value in variables.items() if "value" in value}
    assert given.keys().isdisjoint(key.lower() for key in secret)
    assert service["maxShutdownDelaySeconds"] > Settings(**given).story_drain, "running requests finish"
