"""The whole way of a version, against a real MLflow server and the running app: what is promoted is what writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource, connect_sse

from demo.asgi import open_demo_backend
from experiments.gate.run import promote, rollback, run_gate
from experiments.registry.versions import register
from model.architecture.folder import PRETRAINED, ModelFolder
from model.engine.load import load_engine
from model.generation import GenerationRequest, SamplingParams
from model.runtimes.native.runtime import NativeRuntime
from model.serving.http.app import SharedState
from model.settings import Settings
from tests.demo.served import Served, serve
from tests.experiments.gate.worse import held_out_file, log_quality, log_speed, noised, thresholds
from tests.mlflow_server import MlflowServer
from tests.model.small_model import small_folder
from training.tracking.store import open_store

STORY = {"prompt": "One day", "max_tokens": 120, "seed": 3}
BEFORE_THE_PAUSE = 10


class Pause:
    """Holds one engine in the middle of a story: its decode steps wait, those of other engines do not."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.reached = threading.Event()
        self.runtime: object = None
        self.steps = 0

    def step(self, runtime: object) -> None:
        """Called before each step of any engine."""
        if runtime is not self.runtime:
            return
        self.steps += 1
        if self.steps > BEFORE_THE_PAUSE:
            self.reached.set()
            self.go.wait()


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pause]:
    made, original = Pause(), NativeRuntime.step_in_place

    def step(self: NativeRuntime, *arguments: Any) -> Any:
        made.step(self)
        return original(self, *arguments)

    monkeypatch.setattr(NativeRuntime, "step_in_place", step)
    yield made
    made.go.set()


@pytest.fixture
def uri(mlflow: MlflowServer) -> Iterator[str]:
    """The server; what is registered goes at the end."""
    yield mlflow.address
    open_store(mlflow.address).delete_registered_model("story-writer")


@contextmanager
def app(uri: str) -> Iterator[Served]:
    """The app, which follows the champion."""
    settings = Settings(
        story_model="models:/story-writer@champion", story_model_refresh=0.2, mlflow_tracking_uri=uri, story_slots=2
    )
    shared = SharedState.from_settings(settings)
    with serve(open_demo_backend("auto", settings, shared), shared=shared) as served:
        yield served


def alone(folder: Path) -> str:
    """The story that this model writes, by an engine of its own."""
    sampling = SamplingParams(seed=STORY["seed"])  # type: ignore[arg-type]
    with load_engine(folder) as engine:
        request = GenerationRequest(prompt="One day", max_tokens=120, sampling=sampling)
        return engine.submit(request).wait(20).text


def story(served: Served) -> tuple[str, str]:
    """The next story of the app, and the digest that it names."""
    answer = httpx.post(f"{served.url}api/generate", json=STORY, timeout=None).json()
    return answer["text"], answer["version"]


def model_of(served: Served) -> dict[str, Any]:
    health = httpx.get(f"{served.url}api/health", timeout=None).json()
    assert health["status"] == "healthy"
    return dict(health["model"])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300  # against a hang; the app looks five times a second
    while not condition():
        assert time.monotonic() < end, "the app did not follow"
        time.sleep(0.02)


def begin(uri: str, folder: ModelFolder, place: Path) -> None:
    """Make a model the first champion, and evaluate it."""
    register(folder, uri, alias="champion")
    log_quality(uri, folder, held_out_file(place))


def go_the_whole_way(uri: str, folder: ModelFolder, place: Path, *, against: ModelFolder) -> None:
    """Register a model, evaluate it, log a benchmark of it, and have the gate judge it and its verdict promote it."""
    bounds = thresholds(place)
    register(folder, uri)
    log_quality(uri, folder, held_out_file(place))
    log_speed(uri, folder, bounds, against=against)
    assert run_gate(uri, bounds).verdict == "pass"
    promote(uri, bounds, apply=True)


def test_what_is_promoted_writes_the_next_story_and_a_rollback_brings_the_old_one_back(
    uri: str, pause: Pause, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = ModelFolder.open(small_folder()), noised(tmp_path, strength=0.02)
    shipped, old, new = alone(PRETRAINED), alone(first.path), alone(second.path)
    assert len({shipped, old, new}) == 3
    with app(uri) as served:
        assert (story(served), model_of(served)["number"]) == ((shipped, ModelFolder.open(PRETRAINED).digest), None)

        begin(uri, first, tmp_path)
        until(lambda: model_of(served)["number"] == 1)
        assert story(served) == (old, first.digest)

        pause.runtime = running_runtime(served)
        headers = {"Cache-Control": "no-cache"}
        body = {**STORY, "stream": True}
        with (
            httpx.Client(timeout=None) as client,
            connect_sse(client, "POST", f"{served.url}api/generate", json=body, headers=headers) as source,
        ):
            assert pause.reached.wait(300)
            go_the_whole_way(uri, second, tmp_path, against=first)
            until(lambda: model_of(served)["number"] == 2)
            assert model_of(served) == {
                "id": "story-writer",
                "name": "story-writer 2",
                "version": second.digest,
                "number": 2,
                "alias": "champion",
            }
            assert story(served) == (new, second.digest)
            pause.go.set()
            assert written_by(source) == (old, first.digest)

        (listed,) = httpx.get(f"{served.url}v1/models", timeout=None).json()["data"]
        assert (listed["number"], listed["alias"], listed["version"]) == (2, "champion", second.digest)

        rollback(uri)
        until(lambda: model_of(served)["number"] == 1)
        assert story(served) == (old, first.digest)
        assert "story_model_refused_total 0.0" in httpx.get(f"{served.url}metrics", timeout=None).text
    assert "mlflow.store" not in capfd.readouterr().err, "MLflow says what it waits for in between"


def running_runtime(served: Served) -> object:
    """The runtime of the engine that new stories go to."""
    backend: Any = served.backend
    for name in ("_only", "backend"):
        backend = getattr(backend, name)
    return backend.engine._scheduler._runtime


def written_by(source: EventSource) -> tuple[str, str]:
    """The text of the stream to its end, and the digest that its end names."""
    text = ""
    for event in source.iter_sse():
        if event.event == "token":
            text += event.json()["text"]
        elif event.event == "complete":
            assert event.json()["text"] == text
            return text, event.json()["version"]
    raise AssertionError("the stream has no end")
