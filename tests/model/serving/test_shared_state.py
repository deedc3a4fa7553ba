"""Rate limits, cache and Redis over HTTP, while Redis is killed, hangs and comes back."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import socketio

from model.errors import InputError
from model.serving.http.app import SharedState
from model.settings import load_settings
from tests.model.serving.http.serving import Running, events, paced, serving, streaming, until
from tests.redis_server import redis_server


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Four stories a minute for a client, ten for all, behind a proxy on this machine."""
    monkeypatch.setenv("STORY_LIMIT_STORIES", "4/minute")
    monkeypatch.setenv("STORY_LIMIT_TOKENS", "600/minute")
    monkeypatch.setenv("STORY_LIMIT_ALL_STORIES", "10/minute")
    monkeypatch.setenv("STORY_TRUSTED_PROXIES", "127.0.0.1")
    shared = SharedState.from_settings(load_settings())
    local, _ = paced(slots=4, queue=4, end_bias=-3.0)
    with serving(shared.with_cache(local), shared=shared) as running:
        yield running


def ask(running: Running, client: str, path: str = "/api/generate", **body: Any) -> httpx.Response:
    body = {"prompt": "Once", "max_tokens": 20} | body
    return running.client.post(path, json=body, headers={"x-forwarded-for": client})


def test_a_client_that_asks_too_much_gets_429_with_the_time_to_wait_and_others_go_on(limited: Running) -> None:
    for path in ("/api/generate", "/v1/completions") * 2:
        assert ask(limited, "192.0.2.1", path).status_code == 200
    for path in ("/api/generate", "/v1/completions"):
        for stream in (False, True):
            refused = ask(limited, "198.51.100.1, 192.0.2.1", path, stream=stream)
            assert refused.status_code == 429
            assert 55 <= int(refused.headers["retry-after"]) <= 60
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
            assert error["message"].startswith("the limit of one client is reached: 4 stories per minute; try again")
    assert ask(limited, "192.0.2.2").status_code == 200
    figures = limited.figures()
    assert figures['story_limit_refusals_total{resource="stories",scope="client"}'] == 4
    assert figures['story_streams_total{outcome="limited"}'] == 4
    assert figures["story_limit_windows"] == 5


def test_all_clients_together_have_a_limit_too(limited: Running) -> None:
    answers = [ask(limited, f"192.0.2.{number}") for number in range(11)]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429]
    assert "all clients together" in answers[-1].json()["error"]["message"]


def test_several_stories_of_one_request_count_as_that_many(limited: Running) -> None:
    assert ask(limited, "192.0.2.1", "/v1/completions", n=3).status_code == 200
    assert ask(limited, "192.0.2.1", "/v1/completions", n=2).status_code == 429
    assert ask(limited, "192.0.2.1", "/v1/completions", n=1).status_code == 200


def test_tokens_count_as_written_and_not_as_asked_for(limited: Running) -> None:
    for seed in range(3):  # each reserves most of what there is, and gives back what its early end leaves
        answer = ask(limited, "192.0.2.1", max_tokens=500, seed=seed, stop=["e", "o", " "])
        assert answer.json()["usage"]["completion_tokens"] < 30
    never = ask(limited, "192.0.2.1", max_tokens=601)
    assert (never.status_code, never.json()["error"]["param"]) == (422, "max_tokens")
    full = ask(limited, "192.0.2.1", max_tokens=600)
    assert (full.status_code, "600 tokens per minute" in full.json()["error"]["message"]) == (429, True)


def test_what_is_wrong_with_a_request_costs_nothing_and_is_reported_first(limited: Running) -> None:
    for _ in range(6):
        assert ask(limited, "192.0.2.1", temperature=9).status_code == 422
    assert ask(limited, "192.0.2.1").status_code == 200


async def test_socket_io_has_the_same_limits(limited: Running) -> None:
    events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    client = socketio.AsyncClient(reconnection=False)
    client.on("story_complete", lambda data: events.put_nowait(("complete", data)))
    client.on("story_error", lambda data: events.put_nowait(("error", data)))
    await client.connect(limited.url, headers={"x-forwarded-for": "192.0.2.9"}, transports=["websocket"])
    try:
        for expected in ["complete"] * 4 + ["error"]:
            await client.emit("generate_story", {"prompt": "Once", "max_tokens": 5})
            name, data = await asyncio.wait_for(events.get(), 10)
            assert name == expected
        assert data["error"]["code"] == "rate_limited"
    finally:
        await client.disconnect()


def test_a_story_asked_again_is_served_from_the_cache_in_the_same_events(limited: Running) -> None:
    asked = {"prompt": "Once", "max_tokens": 40, "seed": 7, "stream_options": {"include_usage": True}}
    streamed = []
    for client in ("192.0.2.1", "192.0.2.2"):
        body = {**asked, "stream": True}
        with limited.client.stream("POST", "/v1/completions", json=body, headers={"x-forwarded-for": client}) as answer:
            streamed.append((answer.headers["x-story-backend"], list(events(answer.iter_lines()))))
    (first, written), (second, replayed) = streamed
    assert (first, second) == ("local", "cache")

    def texts(which: list[tuple[str, Any]]) -> str:
        return "".join(data["choices"][0]["text"] for _, data in which if data != "[DONE]" and data["choices"])

    assert texts(written) == texts(replayed)
    assert len(replayed) >= len(written), "in no larger pieces than the first client got"
    assert written[-2][1]["usage"] == replayed[-2][1]["usage"]
    assert (written[-2][1]["served_by"], replayed[-2][1]["served_by"]) == ("local", "cache")
    figures = limited.figures()
    assert figures['story_cache_requests_total{outcome="hit"}'] == 1
    assert figures['story_cache_requests_total{outcome="miss"}'] == 1
    assert figures["story_cache_stories"] == 1
    assert figures["story_cache_bytes"] > 300


def test_a_story_from_the_cache_counts_as_a_story_and_not_as_tokens(limited: Running) -> None:
    for _ in range(3):
        assert ask(limited, "192.0.2.1", seed=7, max_tokens=250).status_code == 200
    first = ask(limited, "192.0.2.1", seed=7, max_tokens=250).json()["usage"]["completion_tokens"]
    assert 2 * first > 100, "written twice and more, they would not leave so many"
    assert ask(limited, "192.0.2.1", max_tokens=1).status_code == 429


def test_without_a_seed_and_with_no_cache_a_story_is_written_anew(limited: Running) -> None:
    for headers, body in (({}, {}), ({"cache-control": "no-cache"}, {"seed": 7}), ({}, {"seed": 7})):
        asked = {"prompt": "Once", "max_tokens": 5, **body}
        assert limited.client.post("/api/generate", json=asked, headers=headers).json()["served_by"] == "local"
    outcomes = {
        name: limited.figures()[f'story_cache_requests_total{{outcome="{name}"}}']
        for name in ("hit", "miss", "joined", "bypassed")
    }
    assert outcomes == {"hit": 0, "miss": 1, "joined": 0, "bypassed": 2}


def test_a_client_that_follows_another_hears_the_story_while_it_is_written() -> None:
    shared = SharedState.from_settings(load_settings())
    local, _ = paced(slots=1, queue=0, step_seconds=0.005)
    with serving(shared.with_cache(local), shared=shared) as running:
        asked: dict[str, Any] = {"prompt": "Once", "max_tokens": 100, "seed": 7}
        with streaming(running, **asked) as first:
            next(first)
            with streaming(running, **asked) as second:
                next(second)
                assert running.figures()["story_slots_active"] == 1
                ended = [list(stream)[-1] for stream in (first, second)]
        assert ended == [("", "[DONE]")] * 2
        assert running.figures()['story_cache_requests_total{outcome="joined"}'] == 1


def test_an_unlimited_service_says_nothing_of_limits(shipped: Running) -> None:
    figures = shipped.figures()
    assert not [name for name in figures if name.startswith(("story_limit_refusals", "story_cache", "story_redis"))]


def test_a_redis_that_is_killed_or_hangs_in_mid_load_fails_no_request_and_holds_none_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answers: list[list[int]] = [[] for _ in range(4)]
    with redis_server() as redis:
        monkeypatch.setenv("REDIS_URL", redis.url)
        monkeypatch.setenv("STORY_LIMIT_STORIES", "100000/minute")
        monkeypatch.setenv("STORY_LIMIT_ALL_TOKENS", "100000000/minute")
        shared = SharedState.from_settings(load_settings())
        local, _ = paced(slots=4, queue=64, step_seconds=0.001, end_bias=-3.0)
        over = threading.Event()

        def load(number: int) -> None:
            with httpx.Client(base_url=running.url, timeout=30) as client:
                seed = 0
                while not over.is_set():
                    seed += 1
                    # Half of them ask for the same stories again and again, half for a new one each time.
                    asked = seed % 5 if number % 2 else seed + 1000 * number
                    body = {"prompt": "Once", "max_tokens": 20, "seed": asked}
                    answers[number].append(client.post("/api/generate", json=body).status_code)
                    time.sleep(0.01)

        def live(seconds: float) -> None:
            """Go on for a while, in which each client gets several answers: none is held up."""
            counts = [len(got) for got in answers]
            time.sleep(seconds)
            until(lambda: all(len(got) > count + 3 for got, count in zip(answers, counts, strict=True)))

        with serving(shared.with_cache(local), shared=shared) as running:
            clients = [threading.Thread(target=load, args=(number,)) for number in range(4)]
            for client in clients:
                client.start()
            try:
                live(0.5)
                until(lambda: running.figures()["story_redis_up"] == 1)
                redis.stop()
                live(0.7)
                assert running.figures()["story_redis_up"] == 0
                redis.start()
                until(lambda: running.figures()["story_redis_up"] == 1)
                live(0.3)
                assert redis.process is not None
                os.kill(redis.process.pid, signal.SIGSTOP)
                live(1.0)
                assert running.figures()["story_redis_up"] == 0
                os.kill(redis.process.pid, signal.SIGCONT)
                until(lambda: running.figures()["story_redis_up"] == 1)
                live(0.3)
            finally:
                over.set()
                for client in clients:
                    client.join(30)
            figures = running.figures()
    assert {status for got in answers for status in got} == {200}
    assert figures['story_cache_requests_total{outcome="hit"}'] > 0
    events = [record.getMessage() for record in caplog.records if "Redis" in record.getMessage()]
    # Lost and found in turn, each logged once; on a machine without a moment's time it may be lost once more.
    assert ["gone" in message for message in events] == [True, False] * (len(events) // 2)
    assert len(events) // 2 == figures["story_redis_losses_total"] >= 2
    assert not [message for message in events if "hunter2" in message]


def test_an_address_that_is_no_redis_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "http://127.0.0.1:6379")
    with pytest.raises(InputError, match="REDIS_URL must start with redis://"):
        SharedState.from_settings(load_settings())


async def test_a_redis_that_was_never_there_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("STORY_LIMIT_STORIES", "1/minute")
    shared = SharedState.from_settings(load_settings())
    async with shared.running():
        assert shared.cache is not None
        assert await shared.cache.get("k") is None
        assert shared.redis is not None
        assert not shared.redis.up
        (await shared.limiter.admit("a", [])).release()


def test_without_the_cache_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORY_CACHE", "off")
    shared = SharedState.from_settings(load_settings())
    local, _ = paced()
    assert shared.with_cache(local) is local
