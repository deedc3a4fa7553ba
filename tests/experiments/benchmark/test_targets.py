"""Targets: the engine in this process, its cold start, our own service, and a server for each kind of failure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from experiments.benchmark.load import LoadGenerator, Plan
from experiments.benchmark.measures import Listener, Phase, Sample
from experiments.benchmark.targets import (
    Ending,
    Failed,
    LocalTarget,
    Target,
    UnreachableError,
    WebTarget,
    _StreamParser,
    open_target,
)
from model.architecture.folder import PRETRAINED, ModelFolder
from model.errors import InputError
from model.settings import Settings
from tests.experiments.benchmark.broken_server import DONE, END, USAGE, Answer, answering, chunk
from tests.experiments.benchmark.made import row as made_row
from tests.model.serving.http.serving import paced, serving
from tests.model.small_model import small_folder

PLAN = Plan(max_tokens=12, timeout=20.0)


def rows(target: Target, count: int = 1, *, phase: Phase = "single", plan: Plan = PLAN) -> list[Sample]:
    """`count` requests at once."""

    async def run() -> list[Sample]:
        async with target.running():
            load = LoadGenerator(plan)
            asked = (load.ask(target, phase, plan.request(phase, n), number=n) for n in range(count))
            return list(await asyncio.gather(*asked))

    return asyncio.run(run())


def test_tokens_are_counted_as_the_engine_made_them() -> None:
    backend, network = paced(slots=2)
    output = rows(LocalTarget(backend, None), count=2)
    assert [(row.tokens, row.finish, sum(row.counts)) for row in output] == [(12, "length", 12)] * 2
    rows_decoded = sum(size for kind, size in network.calls if kind == "step")
    assert rows_decoded == 2 * 11  # the first token of each comes of its prompt
    assert all(row.started <= row.arrivals[0] <= row.arrivals[-1] <= row.ended for row in output)


def test_a_full_queue_is_busy() -> None:
    backend, _ = paced(slots=1, queue=1, step_seconds=0.005)
    errors = [row.error for row in rows(LocalTarget(backend, None), count=5)]
    assert (errors.count("busy"), errors.count(None)) == (3, 2)


def test_a_model_that_fails_is_an_error_and_the_next_story_is_written() -> None:
    backend, network = paced(slots=1)
    network.fail_next = RuntimeError("the device is gone")
    broken, after = rows(LocalTarget(backend, None), count=2)
    assert (broken.error, broken.ok, broken.finish) == ("error", False, "")
    assert broken.message
    assert after.ok


def test_a_request_whose_time_is_up_frees_its_slot() -> None:
    backend, _ = paced(slots=1, step_seconds=0.1)
    (row,) = rows(LocalTarget(backend, None), plan=Plan(max_tokens=400, timeout=0.25))
    assert row.error == "timeout"
    assert row.tokens < 400
    assert backend.engine.stats().active == 0


def test_the_target_is_the_settings_model_and_knows_its_digest() -> None:
    target = open_target("local", Settings())
    assert target.digest == ModelFolder.open(PRETRAINED).digest
    assert target.processes() == [os.getpid()]


def test_a_cold_start_is_a_new_process_up_to_its_first_token() -> None:
    (row,) = rows(open_target("local", Settings()), phase="cold")
    assert (row.error, row.tokens, row.message) == (None, 1, "")
    assert row.ttft is not None
    assert row.ttft > 0.2, "importing ONNX Runtime alone takes longer"


def test_a_cold_start_that_fails_says_why(tmp_path: Path) -> None:
    backend, _ = paced()
    (row,) = rows(LocalTarget(backend, tmp_path / "nowhere"), phase="cold")
    assert row.error == "error"
    assert "nowhere is not a model folder" in row.message


def test_a_registered_version_is_measured_as_the_folder_it_was_made_of(tmp_path: Path) -> None:
    from experiments.registry.versions import register

    uri = f"sqlite:///{tmp_path}/registry.db"
    digest = register(ModelFolder.open(small_folder()), uri).digest
    for name in ("models:/story-writer/1", "models:/story-writer@challenger"):
        target = open_target(name, Settings(mlflow_tracking_uri=uri))
        assert (target.name, target.digest) == (name, digest)
    with pytest.raises(InputError, match="version must be a number, an alias or a digest"):
        open_target("models:/story-writer/7", Settings(mlflow_tracking_uri=uri))


def test_only_its_own_endpoint_is_sent_the_proxy_token() -> None:
    settings = Settings(
        modal_endpoint_url="https://stories.example/app", modal_key="wk-1", modal_secret=SecretStr("ws-2")
    )
    own = ("https://stories.example/app", "https://stories.example/app/", "https://stories.example/app/v1")
    for address in own:
        target = open_target(address, settings)
        assert isinstance(target, WebTarget)
        assert target._headers == {"Modal-Key": "wk-1", "Modal-Secret": "ws-2"}
        assert "ws-2" not in target.name
    for address in ("https://stories.example/apple", "https://other.example/app", "http://stories.example/app"):
        target = open_target(address, settings)
        assert isinstance(target, WebTarget)
        assert target._headers == {}


def test_any_other_address_is_sent_the_api_key() -> None:
    settings = Settings(
        modal_endpoint_url="https://stories.example/app",
        modal_key="wk-1",
        modal_secret=SecretStr("ws-2"),
        openai_api_key=SecretStr("sk-3"),
    )
    headers = {}
    for address in ("https://stories.example/app", "https://other.example/v1"):
        target = open_target(address, settings)
        assert isinstance(target, WebTarget)
        headers[address] = target._headers
    assert list(headers.values()) == [{"Modal-Key": "wk-1", "Modal-Secret": "ws-2"}, {"Authorization": "Bearer sk-3"}]
    with pytest.raises(InputError, match=r"^OPENAI_API_KEY must be plain ASCII without spaces around it, and is not$"):
        open_target("https://other.example", Settings(openai_api_key=SecretStr("sk-3\nsk-4")))


def test_the_settings_choose_the_local_model() -> None:
    target = open_target("local", Settings())
    assert (target.name, target.digest) == ("local", ModelFolder.open(PRETRAINED).digest)
    target = open_target("local", Settings(story_model=str(small_folder())))
    assert target.name == "local (model)"
    assert target.digest == ModelFolder.open(small_folder()).digest


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/completions"])
def test_our_service_is_asked_counted_and_known_by_its_digest(path: str) -> None:
    backend, network = paced(slots=2)
    with serving(backend) as running:
        target = WebTarget(running.url + path)
        (row,) = rows(target)
        steps = sum(1 for kind, _ in network.calls if kind == "step")
    assert (row.error, row.finish, row.tokens) == (None, "length", 12)
    assert sum(row.counts) == 12 == steps + 1  # the first token comes of the prompt
    assert row.started <= row.arrivals[0] <= row.arrivals[-1] <= row.ended
    assert target.name == running.url
    assert target.digest == "0123456789abcdef" * 4


def test_the_serving_process_of_this_machine_is_found_by_its_port() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert WebTarget(f"http://localhost:{port}").processes() == [os.getpid()]
        assert WebTarget(f"http://stories.example:{port}").processes() == []


def test_a_full_queue_of_the_service_is_busy_and_the_others_are_written() -> None:
    backend, _ = paced(slots=1, queue=1, step_seconds=0.01)
    with serving(backend) as running:
        output = rows(WebTarget(running.url), count=5)
    assert [row.error for row in output].count("busy") == 3
    assert all(row.message.startswith("HTTP 429 (") for row in output if row.error)
    assert sum(row.ok for row in output) == 2


def test_a_request_that_takes_too_long_is_given_up_and_frees_its_slot() -> None:
    backend, _ = paced(slots=1, step_seconds=0.05)
    with serving(backend) as running:
        (row,) = rows(WebTarget(running.url), plan=Plan(max_tokens=400, timeout=0.3))
        assert (row.error, row.finish) == ("timeout", "")
        assert row.tokens < 400
        (after,) = rows(WebTarget(running.url), plan=Plan(max_tokens=2))
    assert after.ok, "the slot was not freed"


HTML = {"Content-Type": "text/html"}


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (Answer(b'{"error":{"message":"later"}}', 429), "busy", "HTTP 429 (later)"),
        (Answer(b'{"error":{"message":"full"}}', 503, {"Retry-After": "3"}), "busy", "HTTP 503 (full)"),
        (Answer(b"gone wrong", 503, HTML), "http_5xx", "HTTP 503 (gone wrong)"),
        (Answer(b'{"error":null}', 500), "http_5xx", 'HTTP 500 ({"error":null})'),
        (Answer(b'{"error":{"message":"who are you"}}', 401), "rejected", "HTTP 401 (who are you)"),
        (Answer(chunk("a", token_ids=[1])), "truncated", "the stream ended before [DONE], after 1 messages"),
        (Answer(chunk("a", token_ids=[1]) + b"data: {", reset=True), "truncated", ""),
        (Answer(b""), "truncated", "the stream ended before [DONE], after 0 messages"),
        (Answer(b"<p>hello</p>", 200, HTML), "malformed", "Expected response header Content-Type"),
        (Answer(b"data: {oops\n\n"), "malformed", "an event is not usable: '{oops' Invalid JSON"),
        (Answer(b"data: 7\n\n"), "malformed", "an event is not usable: '7' must be an object"),
        (Answer(b'data: {"text": "a"}\n\n'), "malformed", "an event has no choices"),
        (Answer(chunk("a") + END + DONE), "malformed", "neither usage nor token ids"),
        (Answer(chunk("a", token_ids=[1]) + DONE), "malformed", "the finish reason is None"),
        (Answer(chunk(finish_reason="content_filter") + DONE), "error", "the finish reason is content_filter"),
        (Answer(chunk("a") + b'data: {"error":{"message":"the model failed"}}\n\n'), "error", "the model failed"),
        (Answer(b'event: error\ndata: {"error":"broke off"}\n\n' + DONE), "error", "broke off"),
    ],
)
def test_each_way_to_fail_has_its_kind(answer: Answer, kind: str, message: str) -> None:
    with answering(answer) as (address, _):
        (row,) = rows(WebTarget(address))
    assert (row.error, row.finish) == (kind, "")
    assert message in row.message


def test_a_server_that_is_gone_refuses() -> None:
    async def go() -> Sample:
        with answering(Answer(b""), models={"data": []}) as (address, _):
            target = WebTarget(address)
            running = target.running()
            await running.__aenter__()
        row = await LoadGenerator(PLAN).ask(target, "single", PLAN.request("single", 0))
        await running.__aexit__(None, None, None)
        return row

    assert asyncio.run(go()).error == "refused"


def test_where_nobody_answers_there_is_nothing_to_measure() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = WebTarget(f"http://lily:hunter2@127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(UnreachableError, match=r"^http://127\.0\.0\.1:\d+ does not answer: ") as caught:
            rows(target)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", ["ftp://a.example", "http://", "https:///v1", "local"])
def test_an_address_is_checked(address: str) -> None:
    with pytest.raises(InputError, match=r"^target must be an http\(s\) address, got "):
        WebTarget(address)


def test_a_plain_server_of_the_contract_is_counted_by_its_usage() -> None:
    """No token ids, several tokens a message: messages give the times, usage gives the tokens."""
    body = chunk("Once upon") + chunk("") + chunk(" a time") + END + USAGE + DONE
    models = {"data": [{"id": "some-model", "version": "v1"}]}
    with answering(Answer(body), models=models) as (address, seen):
        target = WebTarget(address, headers={"Modal-Key": "k"})
        (row,) = rows(target)
    assert (row.ok, row.tokens, row.counts) == (True, 5, [0, 0])
    assert target.digest is None
    (asked,) = seen
    request = PLAN.request("single", 0)
    assert asked["path"] == "/v1/completions"
    assert (asked["model"], asked["prompt"], asked["max_tokens"]) == ("some-model", request.prompt, 12)
    assert (asked["seed"], asked["temperature"]) == (request.sampling.seed, request.sampling.temperature)
    assert asked["stream"] is True
    assert asked["headers"]["Modal-Key"] == "k"


def test_usage_stands_above_token_ids() -> None:
    with answering(Answer(chunk("a", token_ids=[1, 2]) + END + USAGE + DONE)) as (address, _):
        (row,) = rows(WebTarget(address))
    assert (row.tokens, row.counts) == (5, [2])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "usage", "error", "token_ids", "text", "finish_reason", "completion_tokens"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@given(st.lists(JSON.map(json.dumps) | st.text(max_size=8), max_size=3))
def test_whatever_a_server_sends_is_an_ending_or_a_failure(events: list[str]) -> None:
    parser = _StreamParser(Listener(made_row(), time.monotonic))
    with contextlib.suppress(Failed):  # what else is raised fails this test
        for event in [*events, "[DONE]"]:
            parser.take(event)
        ending = parser.ending()
        assert isinstance(ending, Ending)
        assert ending.finish in ("stop", "length")
        assert ending.tokens >= 0
