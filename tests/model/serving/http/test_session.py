"""Sessions over HTTP: how streams flow, and what a client that disconnects leaves behind."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from model.engine.stream import Job
from model.errors import StoryError
from model.generation import GenerationRequest, SamplingParams
from model.serving.backend import LocalBackend
from tests.model.fake_runtime import FakeRuntime
from tests.model.serving.http.serving import Running, paced, serving, streaming, until


def test_while_nothing_comes_a_comment_says_that_the_connection_lives() -> None:
    backend, network = paced()
    with serving(backend, keep_alive=0.03) as running:
        network.gate.clear()
        try:
            with streaming(running, prompt="Once", max_tokens=4) as flow:
                # The first token comes from reading the prompt; then the network stands still.
                received = [next(flow) for _ in range(4)]
                network.gate.set()
                received += list(flow)
        finally:
            network.gate.set()
    names = [name for name, _ in received]
    assert names.count(":") >= 3
    assert received[-1] == ("", "[DONE]")


def test_comments_come_before_the_first_token_too_while_a_story_waits_in_the_queue() -> None:
    backend, _ = paced(slots=1, step_seconds=0.01)
    with serving(backend, keep_alive=0.05) as running:
        held = backend.engine.submit(GenerationRequest(prompt="Once", max_tokens=4000))
        until(lambda: backend.engine.stats().active == 1)
        with streaming(running, prompt="Two", max_tokens=3, stream_options={"include_usage": True}) as flow:
            assert [next(flow) for _ in range(3)] == [(":", "still here")] * 3
            held.cancel()
            received = [data for name, data in flow if name != ":"]
    assert received[-1] == "[DONE]"
    assert received[-2]["times"]["queued"] > 0.1
    assert received[-2]["times"]["ttft"] >= received[-2]["times"]["queued"]


def test_a_finished_story_leaves_nothing_that_only_the_collector_would_free() -> None:
    def jobs() -> int:
        return sum(type(found) is Job for found in gc.get_objects())

    backend, _ = paced()
    with serving(backend) as running:
        running.post("/v1/completions", prompt="Once", max_tokens=3)
        gc.collect()
        before = jobs()
        gc.disable()
        try:
            for seed in range(5):
                with streaming(running, prompt="Once", max_tokens=3, seed=seed) as flow:
                    assert list(flow)[-1] == ("", "[DONE]")
                assert running.post("/api/generate", prompt="Two", max_tokens=3, seed=seed).status_code == 200
            until(lambda: running.get("/api/health").json()["open"] == 0)
            until(lambda: jobs() <= before + 1)  # the engine's thread may still hold its last one
        finally:
            gc.enable()


def test_a_failure_in_mid_story_is_an_error_event_and_never_text() -> None:
    backend, network = paced(step_seconds=0.01)
    with serving(backend) as running, streaming(running, prompt="Once", max_tokens=4000, n=2) as flow:
        next(flow)
        network.fail_next = RuntimeError("inner words")
        received = list(flow)
    name, data = received[-1]
    assert (name, data["error"]["code"], data["error"]["type"]) == ("error", "model_failed", "service_unavailable")
    assert "[DONE]" not in [data for _, data in received]
    assert all(choice["finish_reason"] is None for _, data in received[:-1] for choice in data["choices"])


def test_a_backend_that_ends_breaks_its_stories_off_with_an_error() -> None:
    backend, _ = paced(step_seconds=0.01)
    with serving(backend) as running:
        with streaming(running, prompt="Once", max_tokens=4000) as flow:
            next(flow)
            backend.engine.close()
            assert list(flow)[-1][0] == "error"
        response = running.post("/v1/completions", prompt="x")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")


def test_a_slow_client_holds_up_nobody() -> None:
    backend, _ = paced(slots=2)
    with serving(backend) as running, streaming(running, prompt="Once", max_tokens=3000, n=1) as slow:
        next(slow)
        answer = running.post("/v1/completions", prompt="Two", max_tokens=50)
        assert answer.status_code == 200
        until(lambda: backend.engine.stats().active == 0)  # the slow client's slot too, before it is read
        assert list(slow)[-1] == ("", "[DONE]")


def test_32_stories_at_once_are_the_stories_that_each_is_alone(shipped: Running) -> None:
    """Over HTTP with the shipped model, half of them streamed, twice as many as there are slots."""
    start = threading.Barrier(32)

    def generate(seed: int) -> str:
        start.wait(30)
        if seed % 2:
            answer = shipped.post("/v1/completions", prompt="One day", max_tokens=40, seed=seed)
            assert answer.status_code == 200
            return str(answer.json()["choices"][0]["text"])
        with streaming(shipped, prompt="One day", max_tokens=40, seed=seed) as flow:
            received = [data for _, data in flow if data != "[DONE]"]
        return "".join(chunk["choices"][0]["text"] for chunk in received)

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(generate, range(32)))
    figures = shipped.figures()
    assert figures['story_streams_total{outcome="error"}'] == 0
    backend = shipped.service.manager.backend
    assert isinstance(backend, LocalBackend)
    for seed, received in enumerate(together):
        asked = GenerationRequest(prompt="One day", max_tokens=40, sampling=SamplingParams(seed=seed))
        assert backend.engine.submit(asked).wait(30).text == received


def test_one_service_counts_nothing_of_another(shipped: Running) -> None:
    before = shipped.figures()
    backend, _ = paced()
    with serving(backend) as other:
        other.post("/v1/completions", prompt="x", max_tokens=2)
        assert other.figures()['story_streams_total{outcome="length"}'] == 1
    after = shipped.figures()
    name = 'story_streams_total{outcome="length"}'
    assert after[name] == before[name]


@contextlib.contextmanager
def connected(running: Running, path: str = "/v1/completions", **body: Any) -> Iterator[socket.socket]:
    """A raw connection on which a request has been sent."""
    parts = urlsplit(running.url)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Length: {len(raw)}\r\n\r\n"
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=10) as connection:
        connection.sendall(head.encode() + raw)
        yield connection


def read_tokens(connection: socket.socket, count: int) -> None:
    got = b""
    while got.count(b"data: ") < count:
        got += connection.recv(4096)


@contextlib.contextmanager
def leaving(running: Running, backend: LocalBackend, network: FakeRuntime) -> Iterator[None]:
    """Whoever leaves in this context is written no further, not by a step that has not begun.

    The network is held until the service has noticed, so that no time counts.
    """
    network.gate.clear()
    try:
        steps = backend.engine.stats().steps
        yield
        until(lambda: running.figures()["story_streams_open"] == 0)
    finally:
        network.gate.set()
    until(lambda: backend.engine.stats().active == 0)
    assert backend.engine.stats().steps - steps <= 2, "one that ran, and one that waited at the gate"


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
def test_a_client_who_leaves_in_mid_story_frees_the_slot_at_the_next_step(how: str, path: str) -> None:
    backend, network = paced(step_seconds=0.01)
    with (
        serving(backend) as running,
        connected(running, path, prompt="Once", max_tokens=4000, stream=True) as connection,
    ):
        read_tokens(connection, 5)
        assert backend.engine.stats().active == 1
        with leaving(running, backend, network):
            if how == "reset":  # with unread data and no lingering: the peer gets a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        figures = running.figures()
    assert figures['story_streams_total{outcome="cancelled"}'] == 1
    assert figures["story_slots_active"] == 0


def test_whoever_asked_for_a_whole_story_and_left_is_written_no_further() -> None:
    backend, network = paced(step_seconds=0.01)
    with serving(backend) as running:
        with connected(running, prompt="Once", max_tokens=4000) as connection:
            until(lambda: backend.engine.stats().tokens >= 5)
            with leaving(running, backend, network):
                connection.close()
        assert backend.engine.stats().finished["cancelled"] == 1


def test_all_choices_of_a_client_who_left_are_ended() -> None:
    backend, network = paced(slots=4, step_seconds=0.01)
    with serving(backend) as running:
        with connected(running, prompt="Once", max_tokens=4000, stream=True, n=4) as connection:
            read_tokens(connection, 8)
            assert backend.engine.stats().active == 4
            with leaving(running, backend, network):
                connection.close()
        assert backend.engine.stats().finished["cancelled"] == 4


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_the_queue_is_never_written_for(stream: bool) -> None:
    backend, _ = paced(slots=1, queue=1, step_seconds=0.01)
    with serving(backend) as running:
        first = backend.engine.submit(GenerationRequest(prompt="Once", max_tokens=4000))
        until(lambda: first.tokens)  # else it may be the one that waits below
        with connected(running, prompt="Two", max_tokens=4000, stream=stream):
            until(lambda: backend.engine.stats().waiting == 1)
        until(lambda: backend.engine.stats().waiting == 0)
        assert backend.engine.stats().active == 1
        assert first.tokens
        with pytest.raises(StoryError, match="still being written"):
            _ = first.completion
        first.cancel()


def test_of_several_choices_for_which_there_is_no_capacity_none_is_begun() -> None:
    backend, _ = paced(slots=2, queue=1, step_seconds=0.01)
    with serving(backend) as running:
        held = backend.engine.submit(GenerationRequest(prompt="Once", max_tokens=4000))
        until(lambda: backend.engine.stats().active == 1)
        response = running.post("/v1/completions", prompt="Once", n=3, max_tokens=4000)
        assert response.status_code == 429
        held.cancel()
        until(lambda: backend.engine.stats().active == backend.engine.stats().waiting == 0)
        assert running.post("/v1/completions", prompt="Once", n=2, max_tokens=3).status_code == 200


def test_leaving_before_the_body_has_come_troubles_nobody(caplog: pytest.LogCaptureFixture) -> None:
    backend, _ = paced()
    with serving(backend) as running:
        parts = urlsplit(running.url)
        assert parts.hostname is not None
        with socket.create_connection((parts.hostname, parts.port or 80)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert running.post("/v1/completions", prompt="Once", max_tokens=3).status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
