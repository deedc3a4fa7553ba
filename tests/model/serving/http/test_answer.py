"""A client that goes away takes its story with it: however it asked, and wherever the story stood."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from model.generation import GenerationRequest
from model.serving.backend import LocalBackend
from tests.model.serving.http.serving import Running, paced, serving, until


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


def steps_until_free(backend: LocalBackend) -> int:
    """Wait until no slot is taken; the steps that the engine made meanwhile."""
    before = backend.engine.stats().steps
    until(lambda: backend.engine.stats().active == 0)
    return backend.engine.stats().steps - before


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
def test_a_reader_who_leaves_in_mid_story_frees_the_slot_within_a_step_or_two(how: str, path: str) -> None:
    backend, _ = paced(step_seconds=0.02)
    with (
        serving(backend) as running,
        connected(running, path, prompt="Once", max_tokens=4000, stream=True) as connection,
    ):
        read_tokens(connection, 5)
        assert backend.engine.stats().active == 1
        if how == "reset":  # with unread data and no lingering: the peer gets a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        left = time.monotonic()
        assert steps_until_free(backend) <= 3
        assert time.monotonic() - left < 0.2
        until(lambda: running.figures()["story_streams_open"] == 0)
        figures = running.figures()
    assert figures['story_streams_total{outcome="cancelled"}'] == 1
    assert figures["story_slots_active"] == 0


def test_whoever_asked_for_a_whole_story_and_left_is_written_no_further() -> None:
    backend, _ = paced(step_seconds=0.02)
    with serving(backend) as running:
        with connected(running, prompt="Once", max_tokens=4000):
            until(lambda: backend.engine.stats().tokens >= 5)
        assert steps_until_free(backend) <= 3
        until(lambda: running.figures()["story_streams_open"] == 0)
        assert backend.engine.stats().finished["cancelled"] == 1


def test_all_choices_of_a_reader_who_left_are_ended() -> None:
    backend, _ = paced(slots=4, step_seconds=0.02)
    with serving(backend) as running:
        with connected(running, prompt="Once", max_tokens=4000, stream=True, n=4) as connection:
            read_tokens(connection, 8)
            assert backend.engine.stats().active == 4
        assert steps_until_free(backend) <= 3
        assert backend.engine.stats().finished["cancelled"] == 4


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_the_line_is_never_written_for(stream: bool) -> None:
    backend, _ = paced(slots=1, queue=1, step_seconds=0.01)
    with serving(backend) as running:
        first = backend.engine.submit(GenerationRequest(prompt="Once", max_tokens=4000))
        with connected(running, prompt="Two", max_tokens=4000, stream=stream):
            until(lambda: backend.engine.stats().waiting == 1)
        until(lambda: backend.engine.stats().waiting == 0)
        assert backend.engine.stats().active == 1
        assert not first.done
        first.cancel()


def test_of_several_choices_for_which_there_is_no_room_none_is_begun() -> None:
    backend, _ = paced(slots=2, queue=1, step_seconds=0.01)
    with serving(backend) as running:
        response = running.post("/v1/completions", prompt="Once", n=4, max_tokens=4000)
        assert response.status_code == 429
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
