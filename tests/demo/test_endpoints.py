"""The page's public endpoints with Gradio's own client, and a signal while a story of the page runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from experiments.dashboard.client import StoreClient
from model.generation import GenerationRequest, SamplingParams
from model.serving.backend import LocalBackend
from tests.demo.engines import local_backend
from tests.demo.served import Served, serve
from tests.demo.test_app import LAUNCHER
from tests.experiments.dashboard.made import made
from tests.model.serving.http.serving import until

pytestmark = pytest.mark.filterwarnings(
    # Gradio 6.31 on pandas 3, at the end of each event: as errors they would break the server's queue.
    "ignore:'future.no_silent_downcasting' is deprecated",
    "ignore:The copy keyword is deprecated",
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    experiments = StoreClient(made().uri, first_timeout=300, timeout=60)
    with serve(local_backend(slots=2, queue=0, step_seconds=0.005, end_bias=-50), experiments=experiments) as running:
        yield running


@contextlib.contextmanager
def connected(url: str) -> Iterator[Client]:
    client = Client(url, verbose=False)
    try:
        yield client
    finally:
        client.close()


def engine_of(served: Served) -> Any:
    assert isinstance(served.backend, LocalBackend)
    return served.backend.engine


def test_the_endpoints_are_typed_streamed_and_cancellable_and_nothing_else_is_public(served: Served) -> None:
    with connected(served.url) as client:
        named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
        inside = {"/surprise", "/distribution", "/memory", "/evidence", "/layers"}  # see test_inside_page.py
        assert set(named) == {"/write", "/continue", "/alternatives", "/futures", "/status", "/grow_up", *inside}
        types = {part["parameter_name"]: part["python_type"]["type"] for part in named["/write"]["parameters"]}
        assert (types["prompt"], types["max_tokens"], types["temperature"]) == ("str", "int", "float")

        job = client.submit("One day", max_tokens=30, seed=5, api_name="/write")
        parts = list(job)
        alone = GenerationRequest(prompt="One day", max_tokens=30, sampling=SamplingParams(seed=5))
        expected = engine_of(served).submit(alone).wait(30).text
        assert parts[-1]["story"] == "One day" + expected
        assert (parts[-1]["finish_reason"], parts[-1]["seed"]) == ("length", 5)
        assert len({part["text"] for part in parts}) > 2
        assert all(expected.startswith(part["text"]) for part in parts)

        more = client.predict(parts[-1]["story"], max_tokens=4, seed=5, api_name="/continue")
        assert more["story"] == parts[-1]["story"] + more["text"]

        likely = client.predict("One day", api_name="/alternatives")["alternatives"]
        assert [each["probability"] for each in likely] == sorted((e["probability"] for e in likely), reverse=True)
        assert sum(limb["count"] for limb in client.predict("One day", api_name="/futures")["futures"]) == 16

        with pytest.raises(AppError, match="Temperature must be between 0 and 2, got 7"):
            client.predict("One day", temperature=7, api_name="/write")

        status = client.predict(api_name="/status")
        assert (status["state"], status["slots"]) == ("ready", 2)
        assert status["stories"] >= 2  # and what was looked at

        endless = client.submit("One day", max_tokens=1000, api_name="/write")
        next(iter(endless))
        assert engine_of(served).stats().active == 1
        endless.cancel()
        until(lambda: engine_of(served).stats().active == 0)


def test_a_prompt_is_continued_by_the_ages_of_a_run(served: Served) -> None:
    with connected(served.url) as client:
        parts = list(client.submit("One day", "learned", 5, api_name="/grow_up"))
        last = parts[-1]
        assert [len(part["ages"]) for part in parts[: len(last["ages"]) + 1]] == [*range(len(last["ages"]) + 1)]
        assert (last["run"], last["count"]) == ("learned", len(last["ages"]))
        assert last["ages"] == client.predict("One day", "", 5, api_name="/grow_up")["ages"], "the best run"
        with pytest.raises(AppError, match="This run has kept no ages"):
            client.predict("One day", "stopped", api_name="/grow_up")


@pytest.fixture
def process(repository: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONWARNINGS": "ignore"}
    order = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(order, stdout=subprocess.PIPE, text=True, env=environment) as made:
        try:
            yield made
        finally:
            made.kill()


@pytest.mark.parametrize("signals", [1, 2])
def test_on_sigterm_a_story_of_the_page_ends_whole_new_ones_are_refused_and_a_second_signal_aborts(
    signals: int, process: subprocess.Popen[str]
) -> None:
    assert process.stdout is not None
    url = process.stdout.readline().removeprefix("Write me a story: ").strip()
    with connected(url) as client:
        job = client.submit("One day", max_tokens=400 if signals == 1 else 1000, seed=5, api_name="/write")
        next(iter(job))
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("Closing: running stories finish first")
        with pytest.raises(AppError, match=r"restarted .* try again in a minute"):
            client.predict("Another day", api_name="/write")
        if signals == 1:
            last = job.result(timeout=60)
            assert last["finish_reason"] == "length"
            with local_backend(end_bias=-50).engine as engine:
                alone = GenerationRequest(prompt="One day", max_tokens=400, sampling=SamplingParams(seed=5))
                assert last["text"] == engine.submit(alone).wait(60).text
        else:
            process.send_signal(signal.SIGTERM)
            with pytest.raises(AppError, match="restarted"):
                job.result(timeout=60)
        assert process.wait(60) == 0
