"""`story promote --yes --deploy`: the alias moves, and the version gets new requests once it has passed its check."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import story
from deploy.release.platforms import LoopbackPlatform
from experiments.gate.run import run_gate
from experiments.registry.versions import holder
from model.serving.deployments import DEPLOYMENTS, open_deployments, state_folder
from model.settings import load_settings
from tests.experiments.gate.promoted import Place, copied, evaluated
from tests.experiments.gate.worse import log_speed


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A store whose challenger has passed the gate, and a state folder in which nothing is deployed."""
    place = copied(tmp_path, evaluated())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield place
    platform = LoopbackPlatform(state_folder() / "loopback", drain=1)
    for deployment in DEPLOYMENTS:
        if (pid := platform.pid(deployment)) is not None:
            os.kill(pid, signal.SIGKILL)


def test_a_promoted_version_is_deployed_and_gets_new_requests(place: Place, tmp_path: Path) -> None:
    log_speed(place.uri, place.challenger, place.bounds, against=place.champion)
    assert run_gate(place.uri, place.bounds).verdict == "pass"
    bounds = tmp_path / "bounds.yaml"
    bounds.write_text((place.stories.parent / "thresholds.yaml").read_text())
    options = ["--deploy", "--platform", "loopback", "--thresholds", str(bounds), "--json"]

    refused = CliRunner().invoke(story.app, ["promote", *options])
    assert (refused.exit_code, refused.stderr) == (2, "story: --deploy goes with --yes only\n")

    done = CliRunner().invoke(story.app, ["promote", "--yes", *options])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    champion = holder(place.uri, "champion")
    assert champion is not None
    assert (report["version"], report["digest"]) == (champion.number, champion.digest) == (2, place.challenger.digest)
    assert (report["active"], report["release"]["smoke"]["verdict"]) == ("blue", "passed")
    state = open_deployments(load_settings()).load()
    assert state is not None
    assert state.versions[state.active] == place.challenger.digest
    health = httpx.get(f"{state.url}/api/health", timeout=None).json()
    assert health["model"]["version"] == place.challenger.digest
