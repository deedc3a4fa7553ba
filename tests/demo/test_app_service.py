"""The service's routes beside the page: one process, one backend, and neither in the other's way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import socketio

from model.serving.backend import LocalBackend
from model.serving.http.app import SharedState
from model.serving.rate_limit import Limiter, quotas_of
from model.settings import ServiceOptions, Settings
from tests.demo.engines import local_backend
from tests.demo.served import Served, serve


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    backend = local_backend(slots=4, step_seconds=0.005, end_bias=-50)
    with serve(backend, options=ServiceOptions(settings=Settings(story_max_body=4096))) as made:
        yield made


def engine_of(served: Served) -> Any:
    assert isinstance(served.backend, LocalBackend)
    return served.backend.engine


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_the_page_and_the_routes_are_all_there(served: Served) -> None:
    page = httpx.get(served.url, timeout=None)
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    assert httpx.get(f"{served.url}config", timeout=None).status_code == 200
    assert httpx.get(f"{served.url}api/health", timeout=None).json()["status"] == "healthy"
    assert "/v1/completions" in httpx.get(f"{served.url}openapi.json", timeout=None).json()["paths"]
    assert "story_slots 4.0" in httpx.get(f"{served.url}metrics", timeout=None).text
    answer = httpx.post(f"{served.url}api/generate", json={"prompt": "One day", "max_tokens": 4}, timeout=None)
    assert answer.json()["usage"]["completion_tokens"] == 4


def test_its_errors_keep_the_services_form_and_the_pages_keep_theirs(served: Served) -> None:
    wrong = httpx.post(f"{served.url}v1/completions", json={"prompt": "x", "temperature": 9}, timeout=None)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "temperature")
    assert "x-request-id" in wrong.headers
    assert httpx.get(f"{served.url}v1/completions", timeout=None).json()["error"]["code"] == "method_not_allowed"
    assert httpx.get(f"{served.url}v1/nothing", timeout=None).json()["error"]["code"] == "not_found"
    long = httpx.post(f"{served.url}api/generate", content=b"x" * 5000, timeout=None)
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")
    assert "x-request-id" not in httpx.get(f"{served.url}api/nothing", timeout=None).headers


def test_the_openai_client_streams_through_the_pages_server_token_by_token(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(
            model="story-writer", prompt="One day", max_tokens=100, stream=True, extra_body={"seed": 1}
        )
        first = next(stream)
        assert engine_of(served).stats().active == 1
        written = engine_of(served).stats().tokens
        received = first.choices[0].text + "".join(chunk.choices[0].text for chunk in stream)
        whole = client.completions.create(model="story-writer", prompt="One day", max_tokens=100, seed=1)
    assert written < engine_of(served).stats().tokens - 150, "the first came long before the last was made"
    assert received == whole.choices[0].text


@pytest.mark.parametrize("encoding", ["identity", "gzip", "br"])
def test_no_layer_of_the_page_gathers_or_packs_the_events(encoding: str, served: Served) -> None:
    body = {"prompt": "One day", "max_tokens": 50, "stream": True, "return_token_ids": True}
    headers = {"accept-encoding": encoding}
    parts = 0
    with httpx.stream("POST", f"{served.url}v1/completions", json=body, headers=headers, timeout=None) as response:
        assert "content-encoding" not in response.headers
        for _ in response.iter_raw():
            parts += 1
    assert parts > 20


def test_a_user_of_the_routes_who_leaves_frees_the_slot(served: Served) -> None:
    body = {"prompt": "One day", "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", f"{served.url}v1/completions", json=body, timeout=None) as response:
        parts = response.iter_bytes()  # kept: with it the connection would go
        next(parts)
        assert engine_of(served).stats().active == 1
    until(lambda: engine_of(served).stats().active == 0)


async def test_socket_io_answers_at_its_address(served: Served) -> None:
    client = socketio.AsyncClient(reconnection=False)
    complete: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    client.on("story_complete", lambda data: complete.set_result(data))
    await client.connect(served.url, transports=["websocket"])
    try:
        await client.emit("generate_story", {"prompt": "One day", "max_tokens": 5})
        assert (await asyncio.wait_for(complete, 10))["usage"]["completion_tokens"] == 5
    finally:
        await client.disconnect()


def test_a_client_cannot_give_itself_another_address_and_each_story_counts_wherever_it_is_asked_for() -> None:
    shared = SharedState(Limiter(quotas_of("2/minute", "client", "stories")))
    with serve(local_backend(), shared=shared) as served:
        answers = [
            httpx.post(
                f"{served.url}{path}",
                json={"prompt": "One day", "max_tokens": 2},
                headers={"x-forwarded-for": f"192.0.2.{number}"},
                timeout=None,
            ).status_code
            for number, path in enumerate(("api/generate", "v1/completions", "api/generate"))
        ]
    assert answers == [200, 200, 429]


def test_before_it_closes_it_refuses_the_new_and_finishes_the_running() -> None:
    backend = local_backend(slots=2, step_seconds=0.01, end_bias=-50)
    with serve(backend) as served:
        body = {"prompt": "One day", "max_tokens": 80, "stream": True}
        with httpx.stream("POST", f"{served.url}v1/completions", json=body, timeout=None) as response:
            lines = response.iter_lines()
            next(lines)
            closing = threading.Thread(target=served.drain, args=(20,))
            closing.start()
            until(lambda: httpx.get(f"{served.url}api/health", timeout=None).status_code == 503)
            assert httpx.post(f"{served.url}api/generate", json={"prompt": "x"}, timeout=None).status_code == 503
            assert closing.is_alive()
            received = list(lines)
        closing.join(10)
    assert received[-2] == "data: [DONE]"


def test_a_second_signal_need_not_wait() -> None:
    backend = local_backend(slots=2, step_seconds=0.01, end_bias=-50)
    with serve(backend) as served:
        body = {"prompt": "One day", "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", f"{served.url}v1/completions", json=body, timeout=None) as response:
            lines = response.iter_lines()
            next(lines)
            closing = threading.Thread(target=served.drain, args=(60,))
            closing.start()
            served.abort()
            closing.join(5)
            assert not closing.is_alive()
            assert "event: error" in list(lines)
