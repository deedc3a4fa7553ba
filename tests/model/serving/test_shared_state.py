"""The guard with a real Redis that is killed, hung and brought back while stories are told."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

import httpx
import pytest

from model.errors import InputError
from model.serving.shared_state import SharedState
from model.settings import load_settings
from tests.model.serving.http.serving import paced, serving, until
from tests.redis_server import redis_server


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
            readers = [threading.Thread(target=load, args=(number,)) for number in range(4)]
            for reader in readers:
                reader.start()
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
                for reader in readers:
                    reader.join(30)
            figures = running.figures()
    assert {status for got in answers for status in got} == {200}
    assert figures['story_cache_requests_total{outcome="hit"}'] > 0
    told = [record.getMessage() for record in caplog.records if "Redis" in record.getMessage()]
    # Lost and found in turn, each told once; on a machine without a moment's time it may be lost once more.
    assert ["gone" in message for message in told] == [True, False] * (len(told) // 2)
    assert len(told) // 2 == figures["story_redis_losses_total"] >= 2
    assert not [message for message in told if "hunter2" in message]


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
