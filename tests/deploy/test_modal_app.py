"""What Modal would be asked for: read off the real client's requests and off its public objects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy import modal_app
from model.architecture.folder import PRETRAINED
from tests.deploy.conftest import Run
from tests.deploy.modal_server import ControlPlane, control_plane, environment
from tests.model.engines import until

REVISION = "f" * 64
GREEN = {"STORY_DEPLOYMENT": "green", "STORY_REVISION": REVISION, "STORY_GPU": "T4"}


def deploy(run: Run, plane: ControlPlane, home: Path, *reference: str, **settings: str) -> dict[str, Any]:
    """The functions that `modal deploy` of this asks for, by name. A warning would have been an error."""
    done = run("-m", "modal", "deploy", *reference, **environment(plane, home), **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    return {request.function.function_name: request.function for request in plane.asked["FunctionCreate"]}


def commands(plane: ControlPlane) -> list[str]:
    return [line for request in plane.asked["ImageGetOrCreate"] for line in request.image.dockerfile_commands]


def given(plane: ControlPlane) -> dict[str, str]:
    """All environment that the containers would get."""
    return {name: value for secret in plane.asked["SecretGetOrCreate"] for name, value in secret.env_dict.items()}


def sources(plane: ControlPlane) -> set[str]:
    """The files that the containers would get, those of our source below the folder where it lies there."""
    return {
        file.filename.removeprefix(f"{modal_app.SOURCE_AT}/")
        for request in plane.asked["MountGetOrCreate"]
        for file in request.files
    }


def test_importing_the_definitions_is_silent_and_needs_only_what_the_service_has(run: Run) -> None:
    heavy = "{'torch', 'onnxruntime', 'gradio', 'mlflow', 'training', 'experiments', 'demo', 'story'}"
    program = f"import sys, deploy.modal_app; print(sorted({heavy} & set(sys.modules)))"
    done = run("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.fixture(scope="module")
def service(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ControlPlane, dict[str, Any]]]:
    """Green, deployed once for several tests to look at; it takes seconds."""
    with control_plane() as plane:
        yield plane, deploy(run, plane, tmp_path_factory.mktemp("home"), "-m", "deploy.modal_app", **GREEN)


def test_the_service_is_asked_for_as_it_was_meant(service: tuple[ControlPlane, dict[str, Any]]) -> None:
    plane, functions = service
    assert set(functions) == {"Story"}
    story = functions["Story"]
    assert plane.deployed == {"write-me-a-story-green"}
    assert story.is_server
    assert (story.resources.gpu_config.gpu_type, story.resources.gpu_config.count) == ("T4", 1)
    assert not story.http_config.unauthenticated, "a proxy token is asked for"
    assert story.http_config.port == modal_app.PORT
    assert story.http_config.exit_grace_period > modal_app.DRAIN
    assert story.max_concurrent_inputs == modal_app.SLOTS + modal_app.QUEUE
    scaling = story.autoscaler_settings
    assert 0 < scaling.target_concurrency_float < modal_app.SLOTS
    assert (scaling.min_containers, scaling.max_containers, scaling.scaledown_window) == (0, 4, 300)
    assert story.checkpointing_enabled
    (mount,) = story.volume_mounts
    assert (mount.volume_id, mount.mount_path) == ("vo-write-me-a-story-models", "/weights")
    assert mount.read_only
    assert mount.sub_path == f"/{REVISION}"
    assert given(plane) == {"STAGE": "PROD", **GREEN}
    sent = sources(plane)
    assert {"deploy/modal_app.py", "deploy/release/container.py", "/constraints.txt"} <= sent
    assert not any(name.startswith(("demo/", "training/", "tests/")) for name in sent)


def test_the_image_is_pinned_and_holds_nothing_that_serving_does_not_need(
    service: tuple[ControlPlane, dict[str, Any]], repository: Path
) -> None:
    plane, _ = service
    asked = "\n".join(commands(plane))
    assert f"python:{modal_app.PYTHON}" in asked
    (install,) = [line for line in commands(plane) if "uv pip install" in line]
    assert "-c /constraints.txt" in install
    assert set(modal_app.SERVING) <= set(install.split())
    assert not {"gradio", "mlflow", "onnx", "modal", "playwright"} & set(install.split())
    assert f"uv:{modal_app.UV} " in asked
    assert "://" not in install
    (constraints,) = [
        file
        for request in plane.asked["MountGetOrCreate"]
        for file in request.files
        if file.filename == "/constraints.txt"
    ]
    lines = (repository / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    wanted = {*modal_app.SERVING, *modal_app.needs(), *modal_app.needs("train")}
    assert {canonicalize_name(Requirement(name).name) for name in wanted} <= pinned
    assert constraints.mode & 0o400


def test_training_and_page_are_asked_for_as_they_were_meant(run: Run, plane: ControlPlane, tmp_path: Path) -> None:
    shared = {
        "USE_MODAL": "true",
        "MODAL_ENDPOINT_URL": "https://green.example",
        "MODAL_KEY": "wk-1",
        "MODAL_SECRET": "ws-1",
        "REDIS_URL": "redis://example",
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "MLFLOW_TRACKING_TOKEN": "secret",
    }
    functions = deploy(run, plane, tmp_path, "-m", "deploy.modal_app::workshop", DATABASE_URL="unrelated", **shared)
    assert set(functions) == {"train", "page", "prepare", "sweep_trial"}
    assert plane.deployed == {"write-me-a-story"}
    train, page = functions["train"], functions["page"]
    assert train.resources.gpu_config.gpu_type == "L4"
    assert train.retry_policy.retries == 10
    assert train.timeout_secs == 24 * 60 * 60
    assert train.single_use_containers
    trial, prepare = functions["sweep_trial"], functions["prepare"]
    assert trial.resources.gpu_config.gpu_type == "L4"
    assert prepare.resources.gpu_config.count == 0
    assert trial.autoscaler_settings.max_containers == 32
    assert not trial.single_use_containers, "the next trial finds it warm"
    assert [mount.mount_path for mount in (*trial.volume_mounts, *prepare.volume_mounts)] == ["/runs", "/runs"]
    (mount,) = train.volume_mounts
    assert (mount.volume_id, mount.mount_path, mount.read_only) == ("vo-write-me-a-story-runs", "/runs", False)
    assert page.resources.gpu_config.count == 0
    assert page.webhook_config.requested_suffix == "write-me-a-story"
    assert not page.webhook_config.requires_proxy_auth, "a browser cannot send a proxy token"
    assert page.max_concurrent_inputs == modal_app.USERS
    assert page.autoscaler_settings.max_containers == 1, "a session lives in one process"
    # Of the tests' own environment, and of what other tests brought into it.
    quiet = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    assert given(plane) == {"STAGE": "PROD", **shared, **quiet}
    sent = sources(plane)
    assert {"story.py", "demo/assets/page.css", "training/recipes/small.toml"} <= sent
    assert {"experiments/sweep/remote.py", "experiments/sweep/spaces/small.yaml"} <= sent
    assert {"model/pretrained/model.safetensors", "demo/asgi.py"} <= sent


def test_a_tracking_store_that_is_a_file_here_becomes_one_on_the_volume(
    run: Run, plane: ControlPlane, tmp_path: Path
) -> None:
    """Also: the file itself can be named instead of its module, as `modal run` users like to."""
    deploy(run, plane, tmp_path, "deploy/modal_app.py::workshop")
    assert given(plane)["MLFLOW_TRACKING_URI"] == "sqlite:////runs/mlflow.db"
    sent = sources(plane)
    assert {"modal_app.py", "model/settings.py"} <= sent


def test_entry_points_can_be_run_by_name(run: Run, tmp_path: Path) -> None:
    for reference, option in (("train", "--preset"), ("smoke", "--prompt")):
        done = run("-m", "modal", "run", f"deploy/modal_app.py::{reference}", "--help", HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert option in done.stdout


def test_public_objects_say_the_same() -> None:
    assert isinstance(modal_app.Story, modal.Server)
    assert modal_app.app.name == "write-me-a-story-blue"
    assert modal_app.workshop.name == "write-me-a-story"
    service = modal_app.Story.info()
    assert (service.gpus, service.unauthenticated, service.port) == ([("L4", 1)], False, 8000)
    assert service.exit_grace_period == modal_app.GRACE > modal_app.DRAIN
    shipped = (PRETRAINED / "digest").read_text("ascii").strip()
    mount = service.volumes["/weights"]
    assert (mount.name, mount.read_only, mount.sub_path) == (modal_app.MODELS, True, f"/{shipped}")
    training = modal_app.train.info()
    assert (training.gpus, training.max_retries, training.timeout) == ([("L4", 1)], 10, 24 * 60 * 60)
    assert training.volumes["/runs"].name == modal_app.RUNS
    assert modal_app.page.info().gpus == []


class Committed:
    """Stands for the Volume, which only exists on Modal; counts commits and reloads."""

    def __init__(self) -> None:
        self.times = self.reloads = 0

    def reload(self) -> None:
        self.reloads += 1

    def commit(self) -> None:
        self.times += 1


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Committed:
    committed = Committed()
    monkeypatch.setattr(modal_app, "runs", committed)
    monkeypatch.setattr(modal_app, "RUNS_AT", str(tmp_path / "runs"))
    return committed


def _record_commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that `story` would get; training for real takes minutes."""
    commands: list[tuple[str, ...]] = []

    def run_story(*arguments: str) -> int:
        commands.append(arguments)
        return 0

    monkeypatch.setattr(modal_app, "run_story", run_story)
    return commands


def _train(**options: Any) -> int:
    with pytest.warns(UserWarning, match="executing locally"):
        return modal_app.train.local(**options)


def test_training_prepares_missing_shards_and_resumes_a_run_that_is_there(
    volume: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = _record_commands(monkeypatch)
    runs = tmp_path / "runs"
    assert _train(preset="tiny", name="a", minutes=5.0, fields="steps=3 rows=4") == 0
    shards = str(runs / "data" / "tinystories")
    order = ("train", "--preset", "tiny", "--data", shards, "--out", str(runs / "a"), "steps=3", "rows=4")
    assert commands == [("data", "--download", "--out", shards), (*order, "--minutes", "5.0")]
    commands.clear()
    (runs / "data" / "tinystories").mkdir(parents=True)
    (runs / "data" / "tinystories" / "train.bin").write_bytes(b"")
    for kept in ("last", "last.old"):
        (runs / kept / kept).mkdir(parents=True)
        (runs / kept / kept / "config.json").write_text("{}", "utf-8")
        assert _train(name=kept) == 0
        assert commands[-1][-1] == "--resume"
    assert len(commands) == 2, "the shards are made once"


def test_a_trial_is_trained_by_the_sweep_s_own_code_on_what_the_volume_holds_now(
    volume: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/experiments/sweep/test_remote.py` has that code itself."""
    trained: list[tuple[Any, ...]] = []
    monkeypatch.setattr("experiments.sweep.remote.train_remotely", lambda *given: trained.append(given))
    wire: Any = object()
    with pytest.warns(UserWarning, match="executing locally"):
        modal_app.sweep_trial.local({"key": "k"}, wire)
    assert trained == [({"key": "k"}, wire, tmp_path / "runs", volume.commit)]
    assert volume.reloads == 1


def test_shards_are_made_once_for_all_trials(
    volume: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = _record_commands(monkeypatch)
    with pytest.warns(UserWarning, match="executing locally"):
        modal_app.prepare.local()
    shards = tmp_path / "runs" / "data" / "tinystories"
    assert commands == [("data", "--download", "--out", str(shards))]


def test_the_commands_are_ones_that_story_understands(volume: Committed, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.main import get_command

    import story

    commands = _record_commands(monkeypatch)
    _train(minutes=2.0, fields="steps=3")
    group: Any = get_command(story.app)
    for verb, *arguments in commands:
        assert group.commands[verb].make_context(verb, [*arguments, *(["--resume"] if verb == "train" else [])])


def _stub_story(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A `story` command of the test's own: training for real takes minutes. It is a real process."""
    (folder / "story.py").write_text(text, "utf-8")
    monkeypatch.setattr(modal_app, "SOURCE_AT", str(folder))


def test_a_run_commits_meanwhile_and_at_its_end(
    volume: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modal_app, "COMMIT_EVERY", 0.05)
    _stub_story(tmp_path, monkeypatch, "import time; time.sleep(0.3)")
    assert modal_app.run_story("train") == 0
    assert volume.times >= 2


def test_a_run_that_fails_is_an_error_so_that_modal_tries_again(
    volume: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub_story(tmp_path, monkeypatch, "import sys; sys.exit(1)")
    with pytest.raises(subprocess.CalledProcessError):
        modal_app.run_story("train")
    assert volume.times == 1


def test_when_the_machine_is_taken_away_the_run_saves_and_the_volume_is_committed(
    volume: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stub_story(
        tmp_path,
        monkeypatch,
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    pathlib.Path('saved').write_text('yes')\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('started').touch()\ntime.sleep(60)\n",
    )
    main = threading.main_thread().ident
    assert main is not None
    # A shell starts what it puts in the background with SIGINT ignored, and Python then raises nothing at it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(modal_app, "COMMIT_EVERY", 0)
    committed: list[bool] = []  # whether the run had saved by then
    monkeypatch.setattr(volume, "commit", lambda: committed.append((tmp_path / "saved").exists()))

    def take_away() -> None:
        # The first commit says that `story` watches the run: a signal before that meets it half started.
        until(lambda: (tmp_path / "started").exists() and bool(committed), seconds=60)
        signal.pthread_kill(main, signal.SIGINT)

    taker = threading.Thread(target=take_away)
    taker.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            modal_app.run_story("train")
    finally:
        signal.signal(signal.SIGINT, before)
    taker.join()
    assert (tmp_path / "saved").read_text() == "yes"
    assert (committed[0], committed[-1]) == (False, True)


def test_the_page_is_made_by_the_factory_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/demo/test_asgi.py` has the factory itself; loading Gradio takes seconds."""
    module = types.ModuleType("demo.asgi")
    monkeypatch.setattr(module, "create_app", lambda: "the application", raising=False)
    monkeypatch.setitem(sys.modules, "demo.asgi", module)
    assert modal_app.page.local() == "the application"
