"""`story deploy` on Modal, as far as it goes without Modal: the real client, its control plane a stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import story
from model.architecture.folder import PRETRAINED
from model.serving.deployments import FileDeploymentStore
from tests.deploy.conftest import Run
from tests.deploy.modal_server import ControlPlane, environment
from tests.model.serving.http.serving import paced, serving

DIGEST = (PRETRAINED / "digest").read_text("ascii").strip()
NO_ACCOUNT = "story: Modal does not know you: run `modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"


def called(*arguments: str) -> Result:
    return CliRunner().invoke(story.app, ["deploy", *arguments])


@pytest.fixture
def modal(plane: ControlPlane, tmp_path: Path) -> dict[str, str]:
    """The environment in which Modal is the stand-in."""
    return {**environment(plane, tmp_path), "STORY_DEPLOYMENTS": str(tmp_path / "deployments.json")}


def test_a_folder_is_uploaded_whole_under_its_digest_and_once(
    run: Run, plane: ControlPlane, modal: dict[str, str]
) -> None:
    first = run("story.py", "deploy", "upload", **modal)
    second = run("story.py", "deploy", "upload", "--json", **modal)
    assert (first.returncode, first.stdout, first.stderr) == (0, f"{DIGEST[:12]} uploaded\n", "")
    assert json.loads(second.stdout) == {"version": DIGEST, "uploaded": False}
    whole = {f"{DIGEST}/{path.name}" for path in PRETRAINED.iterdir() if path.is_file()}
    assert plane.files == {"vo-write-me-a-story-models": whole}
    assert len(plane.asked["VolumePutFiles"]) == 1


def test_a_deployed_version_must_answer_at_the_address_that_modal_returns(
    run: Run, plane: ControlPlane, modal: dict[str, str], tmp_path: Path
) -> None:
    """The service behind the address is real, and serves another version."""
    backend, _ = paced(slots=4, queue=4)
    with serving(backend) as service:
        plane.address = service.url
        done = run("story.py", "deploy", "deploy", "--timeout", "1", **modal)
    assert done.returncode == 1
    assert f"{service.url} was not ready after" in done.stderr
    assert f"it serves 0123456789ab, not {DIGEST[:12]}" in done.stderr
    assert plane.deployed == {"write-me-a-story-blue"}
    (story_class,) = [request.function for request in plane.asked["FunctionCreate"]]
    assert story_class.volume_mounts[0].sub_path == f"/{DIGEST}"
    assert FileDeploymentStore(tmp_path / "deployments.json").load() is None
    stopped = run("story.py", "deploy", "stop", "--deployment", "blue", **modal)
    assert (stopped.returncode, stopped.stdout) == (0, "blue ended\n"), stopped.stderr
    assert [request.app_id for request in plane.asked["AppStop"]] == ["ap-write-me-a-story-blue"]


def test_a_version_that_answers_and_generates_is_ready(
    run: Run, plane: ControlPlane, modal: dict[str, str], tmp_path: Path
) -> None:
    from model.serving.backend import LocalBackend
    from model.settings import load_settings

    with serving(LocalBackend.load(load_settings())) as service:
        plane.address = service.url
        done = run("story.py", "deploy", "deploy", "--json", **modal)
        assert done.returncode == 0, done.stderr
        smoke = run("story.py", "deploy", "smoke", "--json", **modal)
        one = run("-m", "modal", "run", "-m", "deploy.modal_app::smoke", "--prompt", "Mia", **modal)
    report: dict[str, Any] = json.loads(done.stdout)
    assert (report["deployment"], report["url"], report["version"]) == ("blue", service.url, DIGEST)
    assert json.loads(smoke.stdout)["verdict"] == "passed"
    assert (one.returncode, "Mia" in one.stdout) == (0, True), one.stdout + one.stderr
    record = FileDeploymentStore(tmp_path / "deployments.json").load()
    assert record is not None
    assert (record.active, record.url, record.versions["blue"]) == ("blue", service.url, DIGEST)


def test_a_refused_token_is_reported_like_a_missing_one(run: Run, plane: ControlPlane, modal: dict[str, str]) -> None:
    plane.known_token = False
    done = run("story.py", "deploy", "upload", **modal)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(NO_ACCOUNT)
    assert done.stderr.count("\n") == 1
    assert "as-test" not in done.stderr


@pytest.mark.parametrize("verb", ["upload", "deploy", "stop"])
def test_without_an_account_one_line_says_what_to_do(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = called(verb)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(NO_ACCOUNT)
    assert done.stderr.count("\n") == 1


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modal", None)
    done = called("upload")
    assert done.exit_code == 2
    assert "story: story deploy --platform modal needs the 'modal' packages: pip install" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["status"], 1, "nothing is deployed yet"),
        (["url"], 1, "nothing is deployed yet: run `story deploy deploy`"),
        (["switch"], 1, "nothing is deployed yet: run `story deploy deploy`"),
        (["rollback"], 1, "nothing is deployed yet: there is nothing to roll back to"),
        (["smoke"], 1, "nothing is deployed yet: run `story deploy deploy`"),
        (["switch", "--to", "red"], 2, "'red' is not one of 'blue', 'green'"),
        (["upload", "--platform", "moon"], 2, "'moon' is not one of 'modal', 'loopback'"),
        (["upload", "--platform", "loopback", "--model", "none"], 2, "none is not a model folder"),
        (["upload", "--platform", "loopback", "--model", "models:/story-writer/7"], 2, "`story register` makes one"),
    ],
)
def test_errors_are_one_line_and_have_an_exit_code(
    arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    done = called(*arguments)
    assert done.exit_code == code
    assert said in done.output


def test_help_of_deploy_loads_nothing_heavy(run: Run) -> None:
    """Typer itself takes pydantic for an option with a choice of words."""
    program = (
        "import sys, story\ntry:\n    story.app(['deploy', 'deploy', '--help'])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print(sorted({'modal', 'httpx', 'redis', 'numpy', 'uvicorn'} & set(sys.modules)))"
    )
    assert run("-c", program).stdout.splitlines()[-1] == "[]"
