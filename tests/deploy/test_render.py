"""A deployment is good when the new model answers, and in no other case; against real servers on the loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.render import DIGEST, Pace, main
from tests.workflows.json_server import Asked, json_server

PACE = Pace(live=0.2, healthy=0.2, pause=0.01)
WANTED = DIGEST.read_text().strip()


class World:
    """Render's interface, and the app that it runs."""

    def __init__(self) -> None:
        self.runtime = "docker"
        self.statuses = ["build_in_progress", "update_in_progress", "live"]
        self.models = ["0" * 64, WANTED]
        """Served by the app from one look to the next; the last one stays."""
        self.healthy = True

    def answer(self, asked: Asked) -> tuple[int, Any]:
        """What either answers."""
        if asked.path == "/api/health":
            model = self.models.pop(0) if len(self.models) > 1 else self.models[0]
            body = {
                "status": "ok" if self.healthy else "unavailable",
                "version": "0.1.0",
                "model": {"version": model},
            }
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


Place = tuple[World, list[Asked], dict[str, str]]


@pytest.fixture
def place() -> Iterator[Place]:
    world = World()
    with json_server(world.answer) as (address, seen):
        yield world, seen, {
            "RENDER_API": f"{address}/v1", "RENDER_API_KEY": "key-of-render", "RENDER_SERVICE_ID": "srv-1",
            "APP_URL": f"{address}/", "GITHUB_SHA": "c" * 40, "IMAGE": "registry/app@sha256:1", "OUTCOME": "success",
            "NOTIFY_URL": f"{address}/hook",
        }  # fmt: skip


def test_it_waits_for_render_and_then_for_the_new_model_several_times(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    world, seen, environment = place
    world.models = ["0" * 64, WANTED, "0" * 64, WANTED]
    assert main(["deploy"], environment, PACE) == 0
    assert f"live: version 0.1.0, model {WANTED[:12]}" in capsys.readouterr().out
    assert next(asked.body for asked in seen if asked.method == "POST") == {"commitId": "c" * 40}
    looks = [asked for asked in seen if asked.path == "/api/health"]
    assert len(looks) == 6, "an old instance in between begins the count again"
    assert all(asked.token == "" for asked in looks), "the key goes to Render and nowhere else"


def test_a_service_that_runs_a_prebuilt_image_gets_the_very_image_that_was_scanned(place: Place) -> None:
    world, seen, environment = place
    world.runtime = "image"
    assert main(["deploy"], environment, PACE) == 0
    assert next(asked.body for asked in seen if asked.method == "POST") == {
        "imageUrl": "registry/app@sha256:1"
    }


def _fails(world: World) -> None:
    world.statuses = ["build_in_progress", "build_failed"]


def _hangs(world: World) -> None:
    world.statuses = ["update_in_progress"]


def _old(world: World) -> None:
    world.models = ["0" * 64]


def _ill(world: World) -> None:
    world.healthy = False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_fails, "Render: build_failed"),
        (_hangs, "still says update_in_progress"),
        (_old, f"does not answer with {WANTED[:12]}: model 000"),
        (_ill, "/api/health answered 503"),
    ],
)
def test_anything_else_is_a_failure_that_is_named(
    change: Callable[[World], None], said: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    world, _, environment = place
    change(world)
    assert main(["deploy"], environment, PACE) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_wrong_key_and_a_missing_name_are_told_without_the_key(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = place[2]
    assert main(["deploy"], environment | {"RENDER_API_KEY": "wrong-key"}, PACE) == 1
    assert main(["deploy"], environment | {"RENDER_API_KEY": ""}, PACE) == 1
    error = capsys.readouterr().err
    assert error == "render: Render answered 401\nrender: RENDER_API_KEY is not set\n"
    assert main(["everything"], environment) == 2


def test_the_webhook_is_told_once_and_its_address_by_nobody(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    _, seen, environment = place
    assert main(["notify"], environment) == 0
    (asked,) = seen
    assert "deployment success" in asked.body["text"]
    assert main(["notify"], environment | {"NOTIFY_URL": ""}) == 0, "no webhook is no failure"
    assert len(seen) == 1
    assert main(["notify"], environment | {"NOTIFY_URL": "http://127.0.0.1:9/secret-path"}) == 1
    told = capsys.readouterr()
    assert "secret-path" not in told.out + told.err


def test_it_needs_nothing_that_is_to_be_installed(repository: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-S", "deploy/render.py", "notify"]
    run = subprocess.run(command, cwd=repository, env={}, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "no NOTIFY_URL, so nobody is told\n")
